"""Batch comparisons of answers by question: each answer is computed once, in however many pairs it is.

Ouyang et al. 2022 (arXiv 2203.02155), section 3.5.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, compress, count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.batches.shared_prompt import SharedPromptBatch, join
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute.seeds import mix


class Comparison(NamedTuple):
    """A question's prompt and distinct answers (token ids), and its pairs as (chosen, rejected) answers."""

    question_id: int
    prompt: list[int]
    answers: list[list[int]]
    pairs: list[tuple[int, int]]
    gaps: list[float]  # of each pair: by how much the chosen answer's score is higher
    older: list[bool | None]  # of each pair: whether the chosen answer is the older; None: unknown

    @property
    def best(self) -> list[int]:
        """Return the answers that are chosen in a pair and rejected in none; usually one."""
        return sorted({w for w, _ in self.pairs} - {x for _, x in self.pairs})


class Batch(NamedTuple):
    """Q questions with all their answers, S in all, and their P pairs."""

    inputs: SharedPromptBatch
    chosen: Tensor  # (P,) number of each pair's chosen answer
    rejected: Tensor  # (P,)
    best: Tensor  # (Q,) numbers of the questions' best answers
    gap: Tensor  # (P,) float32
    weight: Tensor  # (P,) float32: 1 / number of pairs of the pair's question
    age_sign: Tensor  # (P,) float32: 1 if the chosen answer is the older, -1 if the younger, 0 if unknown


class Texts(NamedTuple):
    """A comparison as text, before tokenisation."""

    prompt: str
    answers: list[str]
    pairs: list[tuple[int, int]]
    gaps: list[float]
    older: list[bool | None]


PAIR_COLUMNS = ["question_id", "prompt", "chosen", "rejected", "gap", "chosen_older"]
RANKING_COLUMNS = ["question_id", "prompt", "answers", "scores", "ages"]


def from_pairs(rows: Iterable[dict[str, Any]]) -> dict[int, Texts]:
    """Group rows with ``PAIR_COLUMNS`` by question, in order of first appearance."""
    grouped: dict[int, Texts] = {}
    numbers: dict[int, dict[str, int]] = {}
    for row in rows:
        texts = grouped.setdefault(row["question_id"], Texts(row["prompt"], [], [], [], []))
        index = numbers.setdefault(row["question_id"], {})
        chosen, rejected = (index.setdefault(row[side], len(index)) for side in ("chosen", "rejected"))
        texts.answers[:] = index
        texts.pairs.append((chosen, rejected))
        texts.gaps.append(row["gap"])
        texts.older.append(row["chosen_older"])
    return grouped


def from_rankings(rows: Iterable[dict[str, Any]], *, most_answers: int) -> dict[int, Texts]:
    """Return every pair of answers whose scores differ, from rows with ``RANKING_COLUMNS``.

    Of more than ``most_answers`` that many are used, evenly spaced by rank.
    """
    found = {}
    for row in rows:
        scores, ages = row["scores"], row["ages"]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        used = [order[i] for i in evenly_spaced(len(order), most_answers)]
        pairs = [(i, j) for i, j in combinations(range(len(used)), 2) if scores[used[i]] > scores[used[j]]]
        if not pairs:
            continue
        found[row["question_id"]] = Texts(
            prompt=row["prompt"],
            answers=[row["answers"][i] for i in used],
            pairs=pairs,
            gaps=[scores[used[i]] - scores[used[j]] for i, j in pairs],
            older=[ages[used[i]] < ages[used[j]] if ages else None for i, j in pairs],
        )
    return found


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` indices, evenly spaced, first and last included (most >= 2)."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def encode_with(
    encoder: Encoder, texts: Mapping[int, Texts], *, report_progress: Callable[[int, int], None] | None = None
) -> list[Comparison]:
    """Return questions as token ids, without the pairs whose answers are equal once cut.

    An answer that is then in no pair is left out, and so is a question without a pair. ``encoder`` counts
    what is cut and left out. ``report_progress`` is called with the number of questions done, and in all.
    """
    found = []
    for number, (question_id, question) in enumerate(texts.items(), 1):
        prompt = encoder.encode_prompt(question.prompt)
        answers = [encoder.encode_answer(answer) for answer in question.answers]
        distinct = [answers[w] != answers[x] for w, x in question.pairs]
        encoder.count_pairs(len(distinct), equal=distinct.count(False))
        if any(distinct):
            comparison = Comparison(
                question_id=question_id,
                prompt=prompt,
                answers=answers,
                pairs=question.pairs,
                gaps=question.gaps,
                older=question.older,
            )
            found.append(_select_pairs(comparison, distinct))
        if report_progress:
            report_progress(number, len(texts))
    return found


def _select_pairs(comparison: Comparison, selected: list[bool]) -> Comparison:
    """Return the question with the ``selected`` pairs, and only the answers of these."""
    if all(selected):
        return comparison
    pairs = list(compress(comparison.pairs, selected))
    used = sorted({index for pair in pairs for index in pair})
    new_index = {old: new for new, old in enumerate(used)}
    return comparison._replace(
        answers=[comparison.answers[index] for index in used],
        pairs=[(new_index[w], new_index[x]) for w, x in pairs],
        gaps=list(compress(comparison.gaps, selected)),
        older=list(compress(comparison.older, selected)),
    )


def hold_out(question_ids: Sequence[int], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the questions to train on and of held-out ones.

    About ``share`` is held out, by hash of the id; each part has at least one of two or more questions.
    """
    held_out = [mix(seed, question_id) % 10_000 < share * 10_000 for question_id in question_ids]
    if len(held_out) > 1 and all(x == held_out[0] for x in held_out):
        held_out[0] = not held_out[0]
    training = [not held for held in held_out]
    return list(compress(count(), training)), list(compress(count(), held_out))


def collate(questions: Sequence[Comparison], *, pad_id: int, device: torch.device, hidden_size: int) -> Batch:
    """Batch all answers and all pairs of some questions, for a model of width ``hidden_size``."""
    comparisons = list(questions)
    chosen: list[int] = []
    rejected: list[int] = []
    best: list[int] = []
    first = 0
    for comparison in comparisons:
        chosen += [first + w for w, _ in comparison.pairs]
        rejected += [first + loser for _, loser in comparison.pairs]
        best += [first + answer for answer in comparison.best]
        first += len(comparison.answers)
    gaps: list[float] = []
    weights: list[float] = []
    signs: list[int] = []
    for comparison in comparisons:
        gaps += comparison.gaps
        weights += [1 / len(comparison.pairs)] * len(comparison.pairs)
        signs += map(age_sign, comparison.older)
    texts = [(c.prompt, c.answers) for c in comparisons]
    return Batch(
        inputs=join(texts, pad_id=pad_id, device=device, hidden_size=hidden_size),
        chosen=torch.tensor(chosen, dtype=torch.long, device=device),
        rejected=torch.tensor(rejected, dtype=torch.long, device=device),
        best=torch.tensor(best, dtype=torch.long, device=device),
        gap=torch.tensor(gaps, dtype=torch.float32, device=device),
        weight=torch.tensor(weights, dtype=torch.float32, device=device),
        age_sign=torch.tensor(signs, dtype=torch.float32, device=device),
    )


def age_sign(older: bool | None) -> int:
    """Return 1 if the chosen answer is the older, -1 if it is the younger, 0 if unknown (None)."""
    return 0 if older is None else 1 if older else -1


def age_bias(comparisons: Iterable[Comparison]) -> float:
    """Return the log-odds that the older answer of a pair is chosen, over the pairs of which it is known.

    It is the order effect of Davidson and Beaver 1977 (On extending the Bradley-Terry model to incorporate
    within-pair order effects) for answers of equal strength.
    """
    signs = [age_sign(older) for c in comparisons for older in c.older]
    return math.log((signs.count(1) + 1) / (signs.count(-1) + 1))


def micro_batches(
    comparisons: Sequence[Comparison], max_rows: int, *, num_answers: Iterable[int] | None = None
) -> list[Sequence[Comparison]]:
    """Split into parts of at most ``max_rows`` answers, or of one question with more; 0 does not split.

    ``num_answers`` of each question, if they are known, spare reading the questions.
    """
    bounds, rows = [0], 0
    if num_answers is None:
        num_answers = (len(comparison.answers) for comparison in comparisons)
    for index, number in enumerate(num_answers if max_rows else ()):
        if rows and rows + number > max_rows:
            bounds.append(index)
            rows = 0
        rows += number
    parts = [comparisons[first:last] for first, last in pairwise([*bounds, len(comparisons)])]
    return [part for part in parts if part]
