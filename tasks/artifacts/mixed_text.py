"""Find the text that the user has PPO mix in, and make it an input of the stage."""

from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError


def mixed_text(config: Pipeline) -> dict[str, Artifact]:
    """Return the file of ppo.ptx.path as the input "text", if the settings name one. Raises InputError."""
    if not config.ppo.ptx.path:
        return {}
    path = Path(config.ppo.ptx.path).expanduser()
    if not path.is_file():
        raise InputError(f"ppo.ptx.path: there is no file {path}")
    return {"text": user_artifact(path)}
