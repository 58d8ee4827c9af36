"""All answers to a question as branches of one prompt: the prompt is computed once, and no answer sees another."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.rlhf import chunked
from tasks.rlhf.models import hidden_states, output_head
from tasks.rlhf.packing import first_fit

NONE = -1
# Widest row, times the longest prompt with one answer, and times the model's width: attention takes the square of a row.
MOST_LENGTHS = MOST_WIDTHS = 4


class Branches(NamedTuple):
    """Several questions side by side in rows, each its prompt and then its answers; every answer's positions go on from the prompt's.

    A question whose answers would make too wide a row is there several times, each time with some of them.

    Answers are numbered through the whole batch, S in all; their N tokens stand in the order of the answers.
    """

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64
    question: Tensor  # (R, T) int64 number of the question; NONE is padding
    answer: Tensor  # (R, T) int64 number of the answer; NONE is a prompt or padding
    targets: Tensor  # (N,) the answers' tokens, end tokens included
    before: Tensor  # (N,) place of the token that predicts each, counted through the rows
    owner: Tensor  # (N,) its answer
    ends: Tensor  # (S,) place of each answer's last token


def join(questions: list[tuple[list[int], list[list[int]]]], *, pad_id: int, device: torch.device, hidden_size: int) -> Branches:
    """Prompts with their answers as one batch, in rows as wide as the longest question with its answers; ``hidden_size`` is the model's."""
    longest = max(len(prompt) + len(answer) for prompt, answers in questions for answer in answers)
    most = min(MOST_LENGTHS * longest, max(longest, MOST_WIDTHS * hidden_size))
    questions = [(prompt, some) for prompt, answers in questions for some in _shares(answers, most - len(prompt))]
    lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in questions]
    width, rows = max(lengths), first_fit(lengths, max(lengths))
    places: dict[int, int] = {}  # where each question begins, counted through the rows
    for row, members in enumerate(rows):
        starts = accumulate((lengths[index] for index in members), initial=row * width)
        places |= dict(zip(members, starts, strict=False))
    table = torch.tensor([pad_id, 0, NONE, NONE]).repeat(len(rows) * width, 1)
    targets: list[int] = []
    before: list[int] = []
    owner: list[int] = []
    ends: list[int] = []
    for index, (prompt, answers) in enumerate(questions):
        place, stem = places[index], places[index] + len(prompt) - 1
        cells = [(token, position, index, NONE) for position, token in enumerate(prompt)]
        for answer in answers:
            cells += [(token, position, index, len(ends)) for position, token in enumerate(answer, start=len(prompt))]
            last = place + len(cells) - 1
            targets += answer
            before += [stem, *range(last - len(answer) + 1, last)]
            owner += [len(ends)] * len(answer)
            ends.append(last)
        table[place : place + len(cells)] = torch.tensor(cells)
    columns = table.T.reshape(4, len(rows), width)
    return Branches(*(x.to(device) for x in (*columns, *map(torch.tensor, (targets, before, owner, ends)))))


def _shares(answers: list[list[int]], most: int) -> list[list[list[int]]]:
    """The answers in order, in shares of at most ``most`` tokens."""
    shares: list[list[list[int]]] = [[]]
    for answer in answers:
        if sum(map(len, shares[-1])) + len(answer) > most:
            shares.append([])
        shares[-1].append(answer)
    return shares


def hidden(model: PreTrainedModel, batch: Branches) -> Tensor:
    """Last hidden states of all places, (R * T, D)."""
    return hidden_states(model, batch.input_ids, batch.position_ids, visible(batch)).flatten(0, 1)


def visible(batch: Branches) -> Tensor:
    """Which places each place sees, (R, T, T) bool: of its own question, the prompt and its own answer up to itself."""
    width = batch.input_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=batch.answer.device).tril()
    question, answer = ((x[:, :, None], x[:, None, :]) for x in (batch.question, batch.answer))
    return causal & (question[0] == question[1]) & ((answer[1] == NONE) | (answer[0] == answer[1]))


def scores(model: PreTrainedModel, head: nn.Linear, batch: Branches) -> Tensor:
    """Reward model: the head at each answer's last token, (S,) float32."""
    output: Tensor = head(hidden(model, batch)[batch.ends].float())[:, 0]
    return output


def log_probs(model: PreTrainedModel, batch: Branches) -> Tensor:
    """Log-probability of each whole answer given its prompt, (S,) float32."""
    tokens = chunked.log_probs(hidden(model, batch)[batch.before], output_head(model), batch.targets)
    return torch.zeros(len(batch.ends), device=tokens.device).index_add(0, batch.owner, tokens)


def num_tokens(batch: Branches) -> Tensor:
    """Tokens of each answer, (S,) int64."""
    return batch.owner.bincount(minlength=len(batch.ends))
