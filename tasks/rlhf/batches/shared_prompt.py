"""Compute a question's answers in one row with their prompt, computed once; answers do not see each other."""

from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tasks.rlhf.batches import attention_masks, chunked_log_probs
from tasks.rlhf.batches.attention_masks import NONE, Segments
from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.batches.packing import first_fit
from tasks.rlhf.batches.sequences import apply_head

# Longest row, as a multiple of the longest prompt with one answer, and of the hidden size: attention takes
# the square of a row.
MAX_LENGTHS = MAX_WIDTHS = 4
MAX_GROUPS = 4
CALL_COST = 64  # tokens that take about as long as a call of the model
Questions = list[tuple[list[int], list[list[int]]]]  # prompt and answers of each, as token ids


class AnswerRows(NamedTuple):
    """Questions in R rows of T tokens, each its prompt and then its answers."""

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64; those of every answer continue from the prompt's
    question: Tensor  # (R, T) int64 index of the question; NONE is padding
    answer: Tensor  # (R, T) int64 index of the answer; NONE is a prompt or padding


class SharedPromptBatch(NamedTuple):
    """Several questions in groups of similar length, with little padding.

    A question whose answers would make too long a row is repeated, each time with some of them. Answers are
    numbered through the whole batch, S in all, and their N tokens are in the order of the answers. Flat
    indices count the tokens of all groups, row by row.
    """

    groups: tuple[AnswerRows, ...]
    targets: Tensor  # (N,) the answers' token ids, end tokens included
    before: Tensor  # (N,) flat index of the token before each target, which predicts it
    owner: Tensor  # (N,) answer of each target
    ends: Tensor  # (S,) flat index of each answer's last token


def join(questions: Questions, *, pad_id: int, device: torch.device, hidden_size: int) -> SharedPromptBatch:
    """Return prompts with their answers as one batch for a model of width ``hidden_size``.

    The rows of a group are as long as its longest question with its answers.
    """
    most = max_row_tokens(questions, hidden_size=hidden_size)
    questions = [
        (prompt, part)
        for prompt, answers in questions
        for part in _split_answers(answers, most - len(prompt))
    ]
    layout = _choose_layout([len(prompt) + sum(map(len, answers)) for prompt, answers in questions])
    table = torch.tensor([pad_id, 0, NONE, NONE]).repeat(layout.num_tokens, 1)
    targets: list[int] = []
    before: list[int] = []
    owner: list[int] = []
    ends: list[int] = []
    for index, (prompt, answers) in enumerate(questions):
        start, prompt_end = layout.starts[index], layout.starts[index] + len(prompt) - 1
        cells = [(token, position, index, NONE) for position, token in enumerate(prompt)]
        for answer in answers:
            cells += [
                (token, position, index, len(ends))
                for position, token in enumerate(answer, start=len(prompt))
            ]
            last = start + len(cells) - 1
            targets += answer
            before += [prompt_end, *range(last - len(answer) + 1, last)]
            owner += [len(ends)] * len(answer)
            ends.append(last)
        table[start : start + len(cells)] = torch.tensor(cells)
    sizes = [rows * width for rows, width in layout.shapes]
    parts = zip(table.to(device).split(sizes), layout.shapes, strict=True)
    return SharedPromptBatch(
        groups=tuple(AnswerRows(*part.T.reshape(4, *shape)) for part, shape in parts),
        targets=torch.tensor(targets, device=device),
        before=torch.tensor(before, device=device),
        owner=torch.tensor(owner, device=device),
        ends=torch.tensor(ends, device=device),
    )


def max_row_tokens(questions: Iterable[tuple[list[int], list[list[int]]]], *, hidden_size: int) -> int:
    """Return the greatest length of a row."""
    longest = max(len(prompt) + len(answer) for prompt, answers in questions for answer in answers)
    return min(MAX_LENGTHS * longest, max(longest, MAX_WIDTHS * hidden_size))


class _Layout(NamedTuple):
    """Where the questions of a batch are placed."""

    shapes: list[tuple[int, int]]  # rows and width of each group
    starts: dict[int, int]  # flat index of each question's first token

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, padding included."""
        return sum(rows * width for rows, width in self.shapes)


def _choose_layout(lengths: list[int]) -> _Layout:
    """Return the layout with the number of groups that costs least: each group is a call of the model."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    layouts = []
    for n in range(1, MAX_GROUPS + 1):
        groups = [order[len(order) * k // n : len(order) * (k + 1) // n] for k in range(n)]
        layouts.append(_lay_out(lengths, groups))
    return min(layouts, key=lambda layout: layout.num_tokens + CALL_COST * len(layout.shapes))


def _lay_out(lengths: list[int], groups: list[list[int]]) -> _Layout:
    """Place each group's questions in rows as wide as its longest, first fit in the order of the batch."""
    shapes: list[tuple[int, int]] = []
    starts: dict[int, int] = {}
    first = 0  # flat index of the group's first token
    for members in filter(None, (sorted(group) for group in groups)):
        width = max(lengths[index] for index in members)
        rows = first_fit([lengths[index] for index in members], width)
        for number, row in enumerate(rows):
            chosen = [members[i] for i in row]
            begins = accumulate((lengths[index] for index in chosen), initial=first + number * width)
            starts |= dict(zip(chosen, begins, strict=False))
        shapes.append((len(rows), width))
        first += len(rows) * width
    return _Layout(shapes, starts)


def _split_answers(answers: list[list[int]], most: int) -> list[list[list[int]]]:
    """Split the answers, in order, into parts of at most ``most`` tokens."""
    parts: list[list[list[int]]] = [[]]
    for answer in answers:
        if sum(map(len, parts[-1])) + len(answer) > most:
            parts.append([])
        parts[-1].append(answer)
    return parts


def all_hidden_states(model: PreTrainedModel, batch: SharedPromptBatch) -> Tensor:
    """Return the last hidden states by flat index, (tokens, D)."""
    return torch.cat([_group_hidden_states(model, rows) for rows in batch.groups])


def _group_hidden_states(model: PreTrainedModel, rows: AnswerRows) -> Tensor:
    """Return the last hidden states of one group's tokens, (R * T, D)."""
    if attention_masks.has_one_text_per_row(model):
        plain, is_sharded = partial(hidden_states, model), isinstance(model, FSDPModule)
        return attention_masks.forward_one_text_per_row(
            plain, rows.input_ids, _text_indices(rows), in_one_call=is_sharded
        )
    segments = Segments(rows.question, rows.answer)
    return hidden_states(model, rows.input_ids, rows.position_ids, segments).flatten(0, 1)


def _text_indices(rows: AnswerRows) -> list[list[int]]:
    """Return the flat indices of each prompt with one answer."""
    prompts: dict[int, list[int]] = {}
    answers: dict[tuple[int, int], list[int]] = {}
    owners = zip(rows.question.flatten().tolist(), rows.answer.flatten().tolist(), strict=True)
    for index, (question, answer) in enumerate(owners):
        if question != NONE and answer == NONE:
            prompts.setdefault(question, []).append(index)
        elif question != NONE:
            answers.setdefault((question, answer), []).append(index)
    return [prompts[question] + indices for (question, _), indices in answers.items()]


def scores(model: PreTrainedModel, head: nn.Linear, batch: SharedPromptBatch) -> Tensor:
    """Return the reward model's head at each answer's last token, (S,) float32."""
    return apply_head(head, features(model, batch))


def features(model: PreTrainedModel, batch: SharedPromptBatch) -> Tensor:
    """Return the features of each answer: the hidden state of its last token, (S, D)."""
    return all_hidden_states(model, batch)[batch.ends]


def log_probs(model: PreTrainedModel, batch: SharedPromptBatch) -> Tensor:
    """Return the log-probability of each whole answer given its prompt, (S,) float32."""
    tokens = chunked_log_probs.log_probs(
        all_hidden_states(model, batch)[batch.before], output_head(model), batch.targets
    )
    return torch.zeros(len(batch.ends), device=tokens.device).index_add(0, batch.owner, tokens)


def num_tokens(batch: SharedPromptBatch) -> Tensor:
    """Return the number of tokens of each answer, (S,) int64."""
    return batch.owner.bincount(minlength=len(batch.ends))
