"""Render the report's section on the answers that SFT, DPO and PPO sampled while they trained."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from markupsafe import Markup

from tasks.reporting import pages
from tasks.reporting.evaluation.policies import NAMES
from tasks.reporting.numbers import MINUS
from tasks.reporting.text import clip_text

TEMPLATE = "training_samples.html.j2"
FILE = "samples.jsonl"
STAGES = ("sft", "dpo", "ppo")
NUM_OPEN = 2  # questions whose answers are shown; the others are folded
LONGEST_TEXT = 600  # characters of an answer that are shown


class AnswerView(TypedDict):
    """An answer at some step."""

    step: int
    text: str
    facts: list[tuple[str, str]]
    is_cut: bool  # it reached the limit of tokens before it ended
    same_as: int | None  # the first of the steps right before it with the same answer


class StageAnswers(TypedDict):
    """The answers to a question while one stage trained."""

    stage: str
    name: str
    answers: list[AnswerView]


class QuestionView(TypedDict):
    """A question and the answers to it."""

    question: str
    stages: list[StageAnswers]


def render_section(folders: Mapping[str, Path]) -> Markup:
    """Return the section as HTML, with the stages' artifacts by name; empty if no stage sampled answers."""
    samples = {stage: _read(folders[stage] / FILE) for stage in STAGES if stage in folders}
    questions = _build_questions({stage: lines for stage, lines in samples.items() if lines})
    if not questions:
        return Markup()
    environment = pages.build_environment()
    environment.filters["clip"] = partial(clip_text, most=LONGEST_TEXT)
    page = environment.get_template(TEMPLATE).render(
        questions=questions, stages=[one["name"] for one in questions[0]["stages"]], num_open=NUM_OPEN
    )
    return Markup(page)  # noqa: S704 - rendered with everything escaped


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a stage, by step; none if it took none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _build_questions(samples: Mapping[str, list[dict[str, Any]]]) -> list[QuestionView]:
    """Return the questions in their order, which all stages share."""
    texts: dict[int, str] = {}
    for lines in samples.values():
        texts |= {answer["question_id"]: answer["question"] for line in lines for answer in line["answers"]}
    questions: list[QuestionView] = []
    for question_id, text in texts.items():
        stages = [_build_stage(stage, lines, question_id) for stage, lines in samples.items()]
        questions.append({"question": text, "stages": [stage for stage in stages if stage["answers"]]})
    return questions


def _build_stage(stage: str, lines: list[dict[str, Any]], question_id: int) -> StageAnswers:
    answers: list[AnswerView] = []
    for line in lines:
        for answer in line["answers"]:
            if answer["question_id"] == question_id:
                answers.append(_build_answer(line["step"], answer, answers[-1] if answers else None))
    return {"stage": stage, "name": NAMES[stage], "answers": answers}


def _build_answer(step: int, answer: Mapping[str, Any], before: AnswerView | None) -> AnswerView:
    facts = [("tokens", str(answer["length"]))]
    for name, title in (("kl", "KL"), ("reward", "reward")):
        if answer.get(name) is not None:
            facts.append((title, _format_signed(answer[name])))
    same_as = None
    if before and before["text"] == answer["answer"]:
        same_as = before["step"] if before["same_as"] is None else before["same_as"]
    return {
        "step": step,
        "text": answer["answer"],
        "facts": facts,
        "is_cut": not answer["ended"],
        "same_as": same_as,
    }


def _format_signed(value: float) -> str:
    """Return a number with two decimals; never a negative zero."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", MINUS)
