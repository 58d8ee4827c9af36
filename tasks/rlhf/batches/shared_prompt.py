"""All answers to a question as branches of one prompt: the prompt is computed once, and no answer sees another."""

from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tasks.rlhf.batches import attention_masks, chunked_log_probs
from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.batches.packing import first_fit
from tasks.rlhf.batches.sequences import apply_head
from tasks.rlhf.compute import fsdp

NONE = -1
# Widest row, times the longest prompt with one answer, and times the model's width: attention takes the square of a row.
MAX_LENGTHS = MAX_WIDTHS = 4
MAX_GROUPS, CALL_COST = 4, 64  # a call of the model costs about as much as so many tokens


class AnswerRows(NamedTuple):
    """Questions side by side in rows of one width, each its prompt and then its answers; every answer's positions go on from the prompt's."""

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64
    question: Tensor  # (R, T) int64 number of the question; NONE is padding
    answer: Tensor  # (R, T) int64 number of the answer; NONE is a prompt or padding


class SharedPromptBatch(NamedTuple):
    """Several questions in groups of like length, so that little padding is computed. Places are counted through the rows of all groups.

    A question whose answers would make too wide a row is there several times, each time with some of them.

    Answers are numbered through the whole batch, S in all; their N tokens stand in the order of the answers.
    """

    groups: tuple[AnswerRows, ...]
    targets: Tensor  # (N,) the answers' tokens, end tokens included
    before: Tensor  # (N,) place of the token that predicts each
    owner: Tensor  # (N,) its answer
    ends: Tensor  # (S,) place of each answer's last token


def join(
    questions: list[tuple[list[int], list[list[int]]]], *, pad_id: int, device: torch.device, hidden_size: int
) -> SharedPromptBatch:
    """Prompts with their answers as one batch, in rows as wide as a group's longest question with its answers; ``hidden_size`` is the model's."""
    most = max_row_tokens(questions, hidden_size=hidden_size)
    questions = [
        (prompt, some)
        for prompt, answers in questions
        for some in _split_answers(answers, most - len(prompt))
    ]
    layout = _choose_layout([len(prompt) + sum(map(len, answers)) for prompt, answers in questions])
    table = torch.tensor([pad_id, 0, NONE, NONE]).repeat(layout.places, 1)
    targets: list[int] = []
    before: list[int] = []
    owner: list[int] = []
    ends: list[int] = []
    for index, (prompt, answers) in enumerate(questions):
        place, stem = layout.starts[index], layout.starts[index] + len(prompt) - 1
        cells = [(token, position, index, NONE) for position, token in enumerate(prompt)]
        for answer in answers:
            cells += [
                (token, position, index, len(ends))
                for position, token in enumerate(answer, start=len(prompt))
            ]
            last = place + len(cells) - 1
            targets += answer
            before += [stem, *range(last - len(answer) + 1, last)]
            owner += [len(ends)] * len(answer)
            ends.append(last)
        table[place : place + len(cells)] = torch.tensor(cells)
    parts = zip(
        table.to(device).split([rows * width for rows, width in layout.shapes]), layout.shapes, strict=True
    )
    groups = tuple(AnswerRows(*part.T.reshape(4, *shape)) for part, shape in parts)
    return SharedPromptBatch(
        groups, *(torch.tensor(numbers, device=device) for numbers in (targets, before, owner, ends))
    )


def max_row_tokens(questions: list[tuple[list[int], list[list[int]]]], *, hidden_size: int) -> int:
    """Most tokens of a row."""
    longest = max(len(prompt) + len(answer) for prompt, answers in questions for answer in answers)
    return min(MAX_LENGTHS * longest, max(longest, MAX_WIDTHS * hidden_size))


class _Layout(NamedTuple):
    shapes: list[tuple[int, int]]  # rows and width of each group
    starts: dict[int, int]  # where each question begins, counted through the rows

    @property
    def places(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


def _choose_layout(lengths: list[int]) -> _Layout:
    """Questions of these lengths in as many groups as pay: each is a call of the model."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    layouts = [
        _lay_out(lengths, [order[len(order) * k // n : len(order) * (k + 1) // n] for k in range(n)])
        for n in range(1, MAX_GROUPS + 1)
    ]
    return min(layouts, key=lambda layout: layout.places + CALL_COST * len(layout.shapes))


def _lay_out(lengths: list[int], groups: list[list[int]]) -> _Layout:
    """Each group's questions in rows as wide as its longest, first fit in the order of the batch."""
    shapes: list[tuple[int, int]] = []
    starts: dict[int, int] = {}
    place = 0
    for members in filter(None, (sorted(group) for group in groups)):
        width = max(lengths[index] for index in members)
        rows = first_fit([lengths[index] for index in members], width)
        for row, some in enumerate(rows):
            chosen = [members[i] for i in some]
            begins = accumulate((lengths[index] for index in chosen), initial=place + row * width)
            starts |= dict(zip(chosen, begins, strict=False))
        shapes.append((len(rows), width))
        place += len(rows) * width
    return _Layout(shapes, starts)


def _split_answers(answers: list[list[int]], most: int) -> list[list[list[int]]]:
    """The answers in order, in shares of at most ``most`` tokens."""
    shares: list[list[list[int]]] = [[]]
    for answer in answers:
        if sum(map(len, shares[-1])) + len(answer) > most:
            shares.append([])
        shares[-1].append(answer)
    return shares


def all_hidden_states(model: PreTrainedModel, batch: SharedPromptBatch) -> Tensor:
    """Last hidden states of all places, (places, D); behind them may be more, of calls that other ranks need."""
    missing = fsdp.num_calls(model, len(batch.groups)) - len(
        batch.groups
    )  # asked before the first call: the ranks wait for each other in both
    found = [_hidden_of_rows(model, rows) for rows in batch.groups]
    return torch.cat(
        [*found, *(hidden_states(model, batch.groups[0].input_ids[:1, :1])[0] for _ in range(missing))]
    )


def _hidden_of_rows(model: PreTrainedModel, rows: AnswerRows) -> Tensor:
    """Last hidden states of the places of one group, (R * T, D)."""
    if attention_masks.has_one_text_per_row(model):
        plain, together = partial(hidden_states, model), isinstance(model, FSDPModule)  # see `hidden`
        return attention_masks.forward_one_text_per_row(
            plain, rows.input_ids, _text_indices(rows), in_one_call=together
        )
    return hidden_states(model, rows.input_ids, rows.position_ids, visible(rows)).flatten(0, 1)


def _text_indices(rows: AnswerRows) -> list[list[int]]:
    """Places of each prompt with one answer, counted through the rows."""
    prompts: dict[int, list[int]] = {}
    answers: dict[tuple[int, int], list[int]] = {}
    owners = zip(rows.question.flatten().tolist(), rows.answer.flatten().tolist(), strict=True)
    for place, (question, answer) in enumerate(owners):
        if question != NONE and answer == NONE:
            prompts.setdefault(question, []).append(place)
        elif question != NONE:
            answers.setdefault((question, answer), []).append(place)
    return [prompts[question] + places for (question, _), places in answers.items()]


def visible(rows: AnswerRows) -> Tensor:
    """Which places each place sees, (R, T, T) bool: of its own question, the prompt and its own answer up to itself."""
    width = rows.input_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=rows.answer.device).tril()
    question, answer = ((x[:, :, None], x[:, None, :]) for x in (rows.question, rows.answer))
    return causal & (question[0] == question[1]) & ((answer[1] == NONE) | (answer[0] == answer[1]))


def scores(model: PreTrainedModel, head: nn.Linear, batch: SharedPromptBatch) -> Tensor:
    """Reward model: the head at each answer's last token, (S,) float32."""
    return apply_head(head, features(model, batch))


def features(model: PreTrainedModel, batch: SharedPromptBatch) -> Tensor:
    """What a head sees of each answer: the hidden state of its last token, (S, D)."""
    return all_hidden_states(model, batch)[batch.ends]


def log_probs(model: PreTrainedModel, batch: SharedPromptBatch) -> Tensor:
    """Log-probability of each whole answer given its prompt, (S,) float32."""
    tokens = chunked_log_probs.log_probs(
        all_hidden_states(model, batch)[batch.before], output_head(model), batch.targets
    )
    return torch.zeros(len(batch.ends), device=tokens.device).index_add(0, batch.owner, tokens)


def num_tokens(batch: SharedPromptBatch) -> Tensor:
    """Tokens of each answer, (S,) int64."""
    return batch.owner.bincount(minlength=len(batch.ends))
