"""Name the files with trained weights in an artifact, and find the weights that a user starts from."""

from pathlib import Path

from tasks.artifacts.artifact import Artifact, only, user_artifact
from tasks.config.pipeline import Pipeline
from tasks.config.sections.dpo import Dpo
from tasks.config.sections.ppo import Ppo
from tasks.config.sections.reward import Reward
from tasks.config.sections.sft import Sft
from tasks.config.sections.tuning import Tuning
from tasks.system.errors import InputError

WEIGHT_FILES = {"lora": ("adapter",), "bottleneck": ("bottleneck",), "full": ("model",)}


def weight_files(settings: Sft | Reward | Dpo) -> tuple[str, ...]:
    """Return the files and folders of the artifact that hold the trained weights."""
    if not isinstance(settings, Reward):
        return WEIGHT_FILES[settings.tune]
    if settings.tune == "full":
        return (*WEIGHT_FILES["full"], "score.safetensors")
    return _adapters(settings.members)


def only_weights(policy: Artifact) -> Artifact:
    """Return the trained weights of a policy whose settings are those of another run."""
    folders = {path.partition("/")[0] for path in policy["files"]}
    kept = next(names for names in WEIGHT_FILES.values() if folders.issuperset(names))
    return only(policy, *kept)


def judge_files(settings: Reward) -> tuple[str, ...]:
    """Return the files and folders of a reward model that judges need, with the held-out member."""
    return _adapters(settings.num_trained) if settings.held_out_member else weight_files(settings)


def _adapters(count: int) -> tuple[str, ...]:
    return tuple(f"adapter-{number}" if number else "adapter" for number in range(count))


def start_weights(config: Pipeline, stage: str) -> dict[str, Artifact]:
    """Return the weights that the stage starts from as its input "start", if the settings name any.

    Raises InputError.
    """
    settings = getattr(config, stage)
    assert isinstance(settings, Tuning | Ppo)
    if not settings.start:
        return {}
    place = Path(settings.start).expanduser()
    if not place.exists():
        raise InputError(f"{stage}.start: there is no file or folder {place}")
    if (place.is_file() and place.suffix != ".safetensors") or (
        place.is_dir() and not any(place.rglob("*.safetensors"))
    ):
        raise InputError(
            f"{stage}.start: {place} holds no weights in safetensors format; other formats are not loaded"
        )
    return {"start": user_artifact(place)}
