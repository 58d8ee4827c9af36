"""Find the text that the user has PPO mix in, and make it an input of the stage."""

import json
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError

MOST_BYTES = 2**20  # of the first row
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.gz")


def mixed_text(config: Pipeline) -> dict[str, Artifact]:
    """Return the file of ppo.ptx.path as the input "text", if the settings name one. Raises InputError."""
    if not config.ppo.ptx.path:
        return {}
    path = Path(config.ppo.ptx.path).expanduser()
    if not path.is_file():
        raise InputError(f"ppo.ptx.path: there is no file {path}")
    if not path.name.endswith(ENDINGS):
        raise InputError(f"ppo.ptx.path: {path.name} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix == ".jsonl":
        _check_first_row(path)
    return {"text": user_artifact(path)}


def _check_first_row(path: Path) -> None:
    with path.open("rb") as lines:
        first = lines.readline(MOST_BYTES)
    try:
        row = json.loads(first)
    except ValueError:  # also UnicodeDecodeError; a longer row than this is read later
        row = {"text": ""} if len(first) == MOST_BYTES else None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f"ppo.ptx.path: row 1 of {path.name} is no JSON object with a column text")
