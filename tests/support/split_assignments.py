"""Assign splits and group near-duplicates among a few questions, and compare all pairs as a reference."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tasks.dataset.columns import from_rows
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
        paths.append(folder / f"{start:06}.arrow")
        question_files.write(from_rows(questions[start : start + size]), paths[-1], near_duplicates=True)
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


def find_similar_pairs(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    """Return every similar pair (i < j), by a product of matrices instead of sketches."""
    columns: dict[str, int] = {}
    held = [
        sorted({columns.setdefault(" ".join(run), len(columns)) for run in _word_trigrams(text.split())})
        for text in texts
    ]
    indices = np.concatenate([np.array(row, dtype=np.int64) for row in held])
    pointers = np.concatenate([[0], np.cumsum([len(row) for row in held])])
    matrix = csr_matrix((np.ones(len(indices)), indices, pointers), shape=(len(texts), len(columns)))
    shared = (matrix @ matrix.T).tocoo()
    sizes = np.array([len(row) for row in held])
    index = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    return {
        (int(i), int(j))
        for i, j in zip(shared.row[index >= threshold], shared.col[index >= threshold], strict=True)
        if i < j
    }


def _word_trigrams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words)] if len(words) < 3 else list(zip(words, words[1:], words[2:], strict=False))


def connected_components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    first = list(range(count))
    for _ in range(count):
        before = list(first)
        for i, j in pairs:
            first[i] = first[j] = min(first[i], first[j])
        if first == before:
            break
    return first
