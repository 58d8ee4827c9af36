"""Assign splits and find near duplicates of a few prompts in tests."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks.dataset.curation import question_files, split_assignment
from tasks.dataset.curation.near_duplicates import build_sketches, group_near_duplicates
from tasks.dataset.question import Answer, Question


def question(
    number: int, prompt: str, *, author: str = "", scores: tuple[float, ...] = (2, 1), split: str = ""
) -> Question:
    answers = tuple(
        Answer(place, score, 0, False, "", f"answer {place}", "", "", "")
        for place, score in enumerate(scores)
    )
    return Question(number, prompt, "", "site", "", author, "", answers, None, split)


def write_questions(questions: list[Question], folder: Path, size: int) -> list[Path]:
    """Write files of ``size`` questions each and return them."""
    paths = []
    for start in range(0, len(questions), size):
        paths.append(folder / f"{start:06}.jsonl")
        question_files.write(questions[start : start + size], paths[-1], near_duplicates=True)
    return paths


def assign_splits(
    prompts: Sequence[tuple[int, str]],
    shares: Mapping[str, float],
    given: Mapping[int, str] | None = None,
    *,
    alike: float = 1.0,
) -> list[str]:
    """Return the split of each (question id, prompt), as the data stage assigns it."""
    questions = sorted(
        question(number, prompt, split=(given or {}).get(number, "")) for number, prompt in prompts
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = write_questions(questions, Path(folder), 1000)
        assignment = split_assignment.assign_splits(
            paths, shares, Counter(), alike=alike, distinct=False, per_author=None
        )
    found = {
        one.id: question_files.SPLITS[split] for one, split in zip(questions, assignment.splits, strict=True)
    }
    return [found[number] for number, _ in prompts]


def groups(texts: Sequence[str], threshold: float) -> list[int]:
    """Return for each normalised text the index of the first text of its group."""
    sketches, leaders = build_sketches(texts), np.arange(len(texts))
    starts = [0, *sketches.ends[:-1].tolist()]
    group_near_duplicates(
        leaders,
        sketches.bands,
        lambda number: sketches.shingles[starts[number] : sketches.ends[number]],
        threshold,
    )
    return [int(leader) for leader in leaders]
