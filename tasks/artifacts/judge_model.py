"""Find the model and the prompt of the language model that judges."""

from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.artifacts.base_model import check_model_folder
from tasks.config.judge_prompts import find_template, read_template
from tasks.config.judges import LocalJudge, NoJudge
from tasks.system.errors import InputError


def judge_inputs(judge: NoJudge | LocalJudge) -> dict[str, Artifact]:
    """Return the judge's model folder and prompt as inputs; nothing if no language model judges.

    Both are known by their content, not their path. Raises InputError.
    """
    if isinstance(judge, NoJudge):
        return {}
    folder = Path(judge.path).expanduser()
    if not folder.exists():
        raise InputError(f"judge.path: there is no model folder {folder}")
    check_model_folder(folder, setting="judge.path")
    template = find_template(judge.prompt)
    read_template(template)
    return {"judge": user_artifact(folder), "prompt": user_artifact(template)}
