"""Comparisons of one question's answers: each answer is forwarded once, however many pairs it is in (Ouyang et al. 2022, section 3.5)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.rlhf.branches import Branches, join
from tasks.rlhf.prompts import Template, encode_answer, encode_prompt
from tasks.rlhf.schedules import mix


class Comparison(NamedTuple):
    """A question's prompt and distinct answers as token ids, and its pairs as (chosen, rejected) indices of the answers."""

    question_id: int
    prompt: list[int]
    answers: list[list[int]]
    pairs: list[tuple[int, int]]

    @property
    def best(self) -> list[int]:
        """Answers that are chosen in a pair and rejected in none; usually one."""
        return sorted({w for w, _ in self.pairs} - {x for _, x in self.pairs})


class Batch(NamedTuple):
    """Some questions with all their answers, S in all, and their pairs."""

    branches: Branches
    chosen: Tensor  # (P,) number of each pair's chosen answer
    rejected: Tensor  # (P,)
    best: Tensor  # (Q,) numbers of the questions' best answers


def encode(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, template: Template, max_prompt_tokens: int, max_answer_tokens: int
) -> list[Comparison]:
    """Pairs {question_id, prompt, chosen, rejected} grouped by question, in order of first appearance."""
    grouped: dict[int, tuple[str, dict[str, int], list[tuple[int, int]]]] = {}
    for row in rows:
        _, index, pairs = grouped.setdefault(row["question_id"], (row["prompt"], {}, []))
        chosen, rejected = (index.setdefault(row[side], len(index)) for side in ("chosen", "rejected"))
        pairs.append((chosen, rejected))
    return [
        Comparison(
            question_id,
            encode_prompt(tokenizer, prompt, template=template, max_tokens=max_prompt_tokens),
            [encode_answer(tokenizer, answer, template=template, max_tokens=max_answer_tokens) for answer in index],
            pairs,
        )
        for question_id, (prompt, index, pairs) in grouped.items()
    ]


def hold_out(comparisons: list[Comparison], *, share: float, seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out questions: about ``share`` of them by hash of the id, but at least one on each side."""
    held = [mix(seed, c.question_id) % 10_000 < share * 10_000 for c in comparisons]
    if len(comparisons) > 1 and all(x == held[0] for x in held):
        held[0] = not held[0]
    return [c for c, h in zip(comparisons, held, strict=True) if not h], [c for c, h in zip(comparisons, held, strict=True) if h]


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
    branches = join([(c.prompt, c.answers) for c in comparisons], pad_id=pad_id, device=device, hidden_size=hidden_size)
    return Batch(branches, *(torch.tensor(numbers, dtype=torch.long, device=device) for numbers in (chosen, rejected, best)))


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
    return parts
