"""Build examples of training texts: pieces of text with what they are to the model, and what was cut."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.config.sections.sft import LossOn
from tasks.dataset.conversation import Messages
from tasks.rlhf.batches import conversations
from tasks.rlhf.batches.control_tokens import control_tokens
from tasks.rlhf.batches.prompts import encode_answer
from tasks.rlhf.batches.truncation import NO_LIMIT, Encoder


class Piece(NamedTuple):
    """Neighbouring tokens of one kind as text."""

    text: str
    is_control: bool
    is_counted: bool  # by the loss of fine-tuning


class Reply(NamedTuple):
    """An answer as the model sees it."""

    pieces: list[Piece]
    num_tokens: int
    cut: str  # the end that is cut off


class Example(NamedTuple):
    """A prompt with its answers as the model sees them."""

    title: str
    dropped: Messages  # the oldest messages, which are left out
    prompt: list[Piece]
    num_tokens: int
    cut: str  # the end of the question, which is cut off
    answer: Reply
    worse: Reply | None  # an answer that lost to it


def build_example(
    encoder: Encoder,
    title: str,
    messages: Messages,
    answer: str,
    worse: str | None,
    *,
    loss_on: LossOn,
) -> Example:
    """Encode a prompt, its answer and one that lost to it as training does. Raises InputError."""
    tokenizer, template = encoder.tokenizer, encoder.template
    fitted = conversations.fit(tokenizer, messages, template=template, max_tokens=encoder.max_prompt_tokens)
    counted = [loss_on == "all"] * len(fitted.ids)
    if loss_on == "every":
        counted = conversations.find_answers(tokenizer, fitted.messages, template)
    left, question = fitted.messages[-1][1], messages[-1][1]
    return Example(
        title=title,
        dropped=tuple(fitted.dropped),
        prompt=split_pieces(tokenizer, fitted.ids, counted),
        num_tokens=len(fitted.ids),
        cut=question[len(left) :],
        answer=_reply(encoder, answer, is_counted=True),
        worse=None if worse is None else _reply(encoder, worse, is_counted=False),
    )


def _reply(encoder: Encoder, answer: str, *, is_counted: bool) -> Reply:
    tokenizer, limit = encoder.tokenizer, encoder.max_answer_tokens
    ids = encode_answer(tokenizer, answer, template=encoder.template, max_tokens=NO_LIMIT)
    pieces = split_pieces(tokenizer, ids, [is_counted] * len(ids))
    if len(ids) <= limit:
        return Reply(pieces, len(ids), "")
    shown = split_pieces(tokenizer, ids[:limit], [is_counted] * limit)
    rest = "".join(piece.text for piece in pieces)[len("".join(piece.text for piece in shown)) :]
    return Reply(shown, limit, rest)


def split_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], counted: Sequence[bool]) -> list[Piece]:
    """Return the text of the tokens, cut where their kind changes; joined it is the text of all of them."""
    controls = control_tokens(tokenizer).ids
    kinds = [(token in controls, is_counted) for token, is_counted in zip(ids, counted, strict=True)]
    pieces: list[Piece] = []
    place, before = 0, ""
    for kind, group in groupby(kinds):
        place += len(list(group))
        text = str(tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False))
        pieces.append(Piece(text[len(before) :], *kind))
        before = text
    return pieces
