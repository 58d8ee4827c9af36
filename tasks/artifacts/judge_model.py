"""Find the model, the prompt and the environment of the language model that judges."""

import os
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.artifacts.base_model import check_model_folder
from tasks.config.judge_prompts import find_template, read_template
from tasks.config.sections.judges import (
    JUDGE_KEY,
    JUDGE_URL,
    EndpointJudge,
    LanguageJudge,
    LocalJudge,
    NoJudge,
)
from tasks.system.errors import InputError


def judge_inputs(judge: LanguageJudge) -> dict[str, Artifact]:
    """Return the judge's prompt and, if it is local, its model folder as inputs; nothing without a judge.

    Both are known by their content, not their path. Raises InputError.
    """
    if isinstance(judge, NoJudge):
        return {}
    template = find_template(judge.prompt)
    read_template(template)
    prompt = {"prompt": user_artifact(template)}
    return prompt | _model_input(judge) if isinstance(judge, LocalJudge) else prompt


def _model_input(judge: LocalJudge) -> dict[str, Artifact]:
    folder = Path(judge.path).expanduser()
    if not folder.exists():
        raise InputError(f"judge.path: there is no model folder {folder}")
    check_model_folder(folder, setting="judge.path")
    return {"judge": user_artifact(folder)}


def check_judge_environment(judge: LanguageJudge) -> None:
    """Refuse an endpoint whose address or key this process's environment lacks. Raises InputError."""
    if not isinstance(judge, EndpointJudge):
        return
    if not os.environ.get(JUDGE_URL, "").startswith(("https://", "http://")):
        problem = "is no address" if os.environ.get(JUDGE_URL) else "is not set"
        raise InputError(
            f"judge.kind=endpoint: {JUDGE_URL} {problem}: name the endpoint's base URL there, such as "
            "https://HOST/v1"
        )
    if not os.environ.get(JUDGE_KEY):
        raise InputError(
            f"judge.kind=endpoint: {JUDGE_KEY} is not set: put the endpoint's key there, or any word if it "
            "asks for none"
        )
