"""Comparisons of one question's answers: each answer is forwarded once, however many pairs it is in (Ouyang et al. 2022, section 3.5)."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches.prompts import Template
from tasks.rlhf.batches.shared_prompt import SharedPromptBatch, join
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute.seeds import mix


class Comparison(NamedTuple):
    """A question's prompt and distinct answers as token ids, and its pairs as (chosen, rejected) indices of the answers."""

    question_id: int
    prompt: list[int]
    answers: list[list[int]]
    pairs: list[tuple[int, int]]
    gaps: list[float]  # of each pair: by how much the chosen answer's score is higher
    older: list[bool | None]  # of each pair: whether the chosen answer is the older; None: nobody knows

    @property
    def best(self) -> list[int]:
        """Answers that are chosen in a pair and rejected in none; usually one."""
        return sorted({w for w, _ in self.pairs} - {x for _, x in self.pairs})


class Batch(NamedTuple):
    """Some questions, Q, with all their answers, S in all, and their pairs."""

    branches: SharedPromptBatch
    chosen: Tensor  # (P,) number of each pair's chosen answer
    rejected: Tensor  # (P,)
    best: Tensor  # (Q,) numbers of the questions' best answers
    gap: Tensor  # (P,) float32
    share: Tensor  # (P,) float32: one over the pairs of its question
    older: Tensor  # (P,) float32: 1 where the chosen answer is the older, -1 where it is the younger, 0 where nobody knows


class Texts(NamedTuple):
    """A question before it is tokens."""

    prompt: str
    answers: list[str]
    pairs: list[tuple[int, int]]
    gaps: list[float]
    older: list[bool | None]


PAIR_COLUMNS = ["question_id", "prompt", "chosen", "rejected", "gap", "chosen_older"]
RANKING_COLUMNS = ["question_id", "prompt", "answers", "scores", "ages"]


def from_pairs(rows: Iterable[dict[str, Any]]) -> dict[int, Texts]:
    """Rows with ``PAIR_COLUMNS`` grouped by question, in order of first appearance."""
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
    """Rows with ``RANKING_COLUMNS``: every pair of answers whose scores differ. Of more than ``most_answers`` some are taken, evenly by rank."""
    found = {}
    for row in rows:
        scores, ages = row["scores"], row["ages"]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        taken = [order[i] for i in evenly_spaced(len(order), most_answers)]
        pairs = [(i, j) for i, j in combinations(range(len(taken)), 2) if scores[taken[i]] > scores[taken[j]]]
        if not pairs:
            continue
        gaps = [scores[taken[i]] - scores[taken[j]] for i, j in pairs]
        older = [ages[taken[i]] < ages[taken[j]] if ages else None for i, j in pairs]
        found[row["question_id"]] = Texts(
            row["prompt"], [row["answers"][i] for i in taken], pairs, gaps, older
        )
    return found


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, the first and the last among them (most >= 2)."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def encode(
    texts: Mapping[int, Texts],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> list[Comparison]:
    """Questions as token ids."""
    lengths = {"max_prompt_tokens": max_prompt_tokens, "max_answer_tokens": max_answer_tokens}
    return encode_with(Encoder(tokenizer, template=template, **lengths), texts)


def encode_with(
    encoder: Encoder, texts: Mapping[int, Texts], *, told: Callable[[int, int], None] | None = None
) -> list[Comparison]:
    """Return questions as token ids, without the pairs whose answers are equal once cut, which ``encoder`` counts with what it cuts.

    An answer that is in no pair then is left out, and so is a question without a pair. ``told`` is called with how many questions are done.
    """
    found = []
    for number, (question_id, question) in enumerate(texts.items(), 1):
        prompt, answers = (
            encoder.prompt(question.prompt),
            [encoder.answer(answer) for answer in question.answers],
        )
        distinct = [answers[w] != answers[x] for w, x in question.pairs]
        encoder.count_pairs(len(distinct), equal=distinct.count(False))
        if any(distinct):
            found.append(
                _keep(
                    Comparison(question_id, prompt, answers, question.pairs, question.gaps, question.older),
                    distinct,
                )
            )
        if told:
            told(number, len(texts))
    return found


def _keep(comparison: Comparison, kept: list[bool]) -> Comparison:
    """The question with some of its pairs and the answers that these are of."""
    if all(kept):
        return comparison
    pairs = list(compress(comparison.pairs, kept))
    used = sorted({place for pair in pairs for place in pair})
    number = {place: new for new, place in enumerate(used)}
    return comparison._replace(
        answers=[comparison.answers[place] for place in used],
        pairs=[(number[w], number[x]) for w, x in pairs],
        gaps=list(compress(comparison.gaps, kept)),
        older=list(compress(comparison.older, kept)),
    )


def hold_out(
    comparisons: list[Comparison], *, share: float, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out questions: about ``share`` of them by hash of the id, but at least one on each side."""
    held = [mix(seed, c.question_id) % 10_000 < share * 10_000 for c in comparisons]
    if len(comparisons) > 1 and all(x == held[0] for x in held):
        held[0] = not held[0]
    return [c for c, h in zip(comparisons, held, strict=True) if not h], [
        c for c, h in zip(comparisons, held, strict=True) if h
    ]


def collate(comparisons: list[Comparison], *, pad_id: int, device: torch.device, hidden_size: int) -> Batch:
    """All answers and all pairs of some questions, for a model of width ``hidden_size``."""
    chosen: list[int] = []
    rejected: list[int] = []
    best: list[int] = []
    first = 0
    for comparison in comparisons:
        chosen += [first + w for w, _ in comparison.pairs]
        rejected += [first + loser for _, loser in comparison.pairs]
        best += [first + answer for answer in comparison.best]
        first += len(comparison.answers)
    gaps = torch.tensor([gap for c in comparisons for gap in c.gaps], dtype=torch.float32, device=device)
    shares = torch.tensor(
        [1 / len(c.pairs) for c in comparisons for _ in c.pairs], dtype=torch.float32, device=device
    )
    older = torch.tensor(
        [age_sign(known) for c in comparisons for known in c.older], dtype=torch.float32, device=device
    )
    branches = join(
        [(c.prompt, c.answers) for c in comparisons], pad_id=pad_id, device=device, hidden_size=hidden_size
    )
    numbers = [torch.tensor(some, dtype=torch.long, device=device) for some in (chosen, rejected, best)]
    return Batch(branches, numbers[0], numbers[1], numbers[2], gaps, shares, older)


def age_sign(older: bool | None) -> int:
    """1 where the chosen answer is the older, -1 where it is the younger, 0 where nobody knows."""
    return 0 if older is None else 1 if older else -1


def age_bias(comparisons: Iterable[Comparison]) -> float:
    """By how much the older answer is ahead before anything is read: log-odds that it is the chosen one, over the pairs of which it is known.

    The order effect of Davidson and Beaver 1977 (On extending the Bradley-Terry model to incorporate within-pair order effects), at equal strength.
    """
    signs = [age_sign(older) for c in comparisons for older in c.older]
    return math.log((signs.count(1) + 1) / (signs.count(-1) + 1))


def micro_batches(comparisons: list[Comparison], max_rows: int) -> list[list[Comparison]]:
    """Split so that no part has more than ``max_rows`` answers unless one question alone has; 0 does not split."""
    parts: list[list[Comparison]] = [[]]
    rows = 0
    for comparison in comparisons:
        if max_rows and parts[-1] and rows + len(comparison.answers) > max_rows:
            parts.append([])
            rows = 0
        parts[-1].append(comparison)
        rows += len(comparison.answers)
    return [part for part in parts if part]
