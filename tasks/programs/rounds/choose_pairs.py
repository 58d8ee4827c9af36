"""Make pairs of the answers to a question, and choose those that are asked about.

Christiano et al. 2017 (arXiv 1706.03741), section 2.2.4: the pairs on which an ensemble disagrees most. It
compares segments of trajectories; these are whole answers, and the ensemble is trained anew in each round.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.programs.rounds.hashed_number import hashed_number
from tasks.system.hashing import canonical

RUN_WORDS = 3
Numbers = NDArray[np.float64]


class Pair(NamedTuple):
    """Two answers to one question."""

    pair_id: str
    question_id: int
    prompt: str
    messages: list[dict[str, Any]] | None
    first: Mapping[str, Any]  # a row of the candidates
    second: Mapping[str, Any]
    disagreement: float | None = None

    @property
    def margin(self) -> float | None:
        """Return by how much the reward of the first answer is higher; None without a reward model."""
        if self.first["reward"] is None:
            return None
        return float(self.first["reward"] - self.second["reward"])


def pair_id(prompt: str, first: str, second: str) -> str:
    """Return what identifies a pair: the same whichever answer is named first."""
    return hashlib.sha256(canonical([prompt, *sorted((first, second))])).hexdigest()[:32]


def pair_up(rows: Sequence[Mapping[str, Any]], *, alike: float) -> list[Pair]:
    """Return every pair of answers to the same question that are not alike, in the order of their ids.

    ``rows`` are candidates; their order does not matter. Which answer of a pair is the first one depends on
    the pair alone, so sides say nothing about policies.
    """
    ordered = sorted(rows, key=lambda row: (row["question_id"], row["policy"], row["draw"]))
    pairs: list[Pair] = []
    for _, group in groupby(ordered, key=lambda row: row["question_id"]):
        answers = distinct_answers([*group], alike=alike)
        pairs += [_build_pair(one, other) for one, other in combinations(answers, 2)]
    return sorted(pairs, key=lambda pair: pair.pair_id)


def _build_pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> Pair:
    name = pair_id(one["prompt"], one["answer"], other["answer"])
    low, high = sorted((one, other), key=lambda row: row["answer"])
    first, second = (low, high) if hashed_number("side", 0, name) < 0.5 else (high, low)
    return Pair(name, one["question_id"], one["prompt"], one["messages"], first, second)


def distinct_answers(rows: Sequence[Mapping[str, Any]], *, alike: float) -> list[Mapping[str, Any]]:
    """Return the rows of one question without those whose answer is like that of a row before it.

    Two answers are alike if their sets of three-word runs have at least the Jaccard index ``alike``.
    """
    kept: list[tuple[frozenset[tuple[str, ...]], Mapping[str, Any]]] = []
    for row in rows:
        runs = word_runs(row["answer"])
        if all(jaccard(runs, others) < alike for others, _ in kept):
            kept.append((runs, row))
    return [row for _, row in kept]


def word_runs(text: str) -> frozenset[tuple[str, ...]]:
    """Return the set of three-word runs of a text; a shorter text is one run."""
    words = text.split()
    size = min(RUN_WORDS, len(words))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def jaccard(one: frozenset[Any], other: frozenset[Any]) -> float:
    """Return the share of the elements of two sets, not both empty, that both have."""
    return len(one & other) / len(one | other)


def disagreement(first: Numbers, second: Numbers) -> Numbers:
    """Return how much the members of an ensemble disagree on the order of two answers, (P, M) each -> (P,).

    ``first`` and ``second`` are raw rewards, whose difference is the log odds that the first answer is
    better. It is the standard deviation of that probability over the members: 0 to 0.5.
    """
    deviations: Numbers = _first_is_better(first, second).std(axis=1)
    return deviations


def decided(first: Numbers, second: Numbers, *, confidence: float) -> NDArray[np.bool_]:
    """Return which pairs all members decide the same way with at least this probability, (P, M) -> (P,)."""
    chance = _first_is_better(first, second)
    agreed: NDArray[np.bool_] = (chance.min(axis=1) >= confidence) | (chance.max(axis=1) <= 1 - confidence)
    return agreed


def _first_is_better(first: Numbers, second: Numbers) -> Numbers:
    odds: Numbers = np.exp(-np.logaddexp(0, second - first))
    return odds


def choose(
    pairs: Sequence[Pair],
    *,
    by: Literal["random", "disagreement"],
    count: int,
    per_question: int,
    seed: int,
) -> list[Pair]:
    """Return at most ``count`` pairs, and of a question at most ``per_question``, in the order of choice.

    A random order depends on the seed and each pair alone; equal disagreements are in that order.
    """
    ordered = sorted(pairs, key=lambda pair: hashed_number("choose", seed, pair.pair_id))
    if by == "disagreement":
        ordered.sort(key=lambda pair: -(pair.disagreement or 0.0))
    return [*_limited(ordered, per_question)][:count]


def _limited(pairs: Sequence[Pair], per_question: int) -> Iterator[Pair]:
    taken = Counter[int]()
    for pair in pairs:
        if taken[pair.question_id] < per_question:
            taken[pair.question_id] += 1
            yield pair
