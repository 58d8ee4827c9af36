"""Tokens that steer a model (roles, ends of turns, padding), and text as ids that hold none of them, whatever the text says."""

import re
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

# Added tokens that no template names may steer a model all the same: <|fim_prefix|>, <｜tool▁sep｜>, [TOOL_CALLS].
_SHAPED = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z][A-Z_]*\]", re.DOTALL)
_PRIVATE_USE = range(0xE000, 0xF900)
Markers = tuple[str, str]  # the characters that begin and end what is marked


class ControlTokens(NamedTuple):
    ids: frozenset[int]
    pattern: re.Pattern[str]  # their texts, the longest first
    unknown: int | None  # stands for characters that the vocabulary lacks, so plain text may hold it


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return the special tokens, and the added ones that the chat template names or that are shaped like control tokens.

    Added tokens of other kinds (white space, words of a field) are vocabulary.
    """
    return _control_tokens(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokens:
    found: dict[str, int] = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        named = text in template and not text.isalnum()
        if text.strip() and (token.special or named or _SHAPED.fullmatch(text)):
            found[text] = number
    longest_first = sorted(found, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    unknown = (
        tokenizer.unk_token_id
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
        else None
    )
    return ControlTokens(frozenset(found.values()), pattern, unknown)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, behind: bool = False) -> list[int]:
    """Return ids of ``text`` without control tokens: a post that writes "</s>" means these characters.

    With ``behind`` the text stands behind other text, so a tokenizer that begins with a space of its own adds none.
    """
    ids = _encode(tokenizer, text, behind=behind, split=True)
    controls = control_tokens(tokenizer)
    if not _holds_control(controls, ids, text):
        return ids
    # Not every tokenizer splits what it is asked to split (added tokens that are not special; Unigram vocabularies).
    cuts = [match.start() + 1 for match in controls.pattern.finditer(text)] or [len(text) // 2]
    parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    if len(text) < 2:  # a control token of one character cannot be written apart
        return []
    return [
        id
        for i, part in enumerate(filter(None, parts))
        for id in encode_text(tokenizer, part, behind=behind or i > 0)
    ]


def mark(tokenizer: PreTrainedTokenizerBase, text: str, markers: Markers) -> str:
    """Return ``text`` with what would become control tokens between the two ``markers``, for `encode_marked`."""
    controls = control_tokens(tokenizer)
    if not _holds_control(controls, _encode(tokenizer, text, split=False), text):
        return text
    start, end = markers
    pieces = []
    place = 0
    for match in controls.pattern.finditer(text):
        pieces += [text[place : match.start()], f"{start}{match.group()}{end}"]
        place = match.end()
    pieces.append(text[place:])
    for i in range(
        0, len(pieces), 2
    ):  # a normalisation may make a control token of what is written otherwise
        if _holds_control(controls, _encode(tokenizer, pieces[i], split=False), pieces[i]):
            pieces[i] = f"{start}{pieces[i]}{end}"
    return "".join(pieces)


def choose_markers(text: str) -> Markers:
    """Return two characters that ``text`` does not have."""
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in text)
    return next(free), next(free)


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, markers: Markers, *, behind: bool = False
) -> list[int]:
    """Return ids of a rendered template: what is marked is plain text, the rest as the tokenizer has it."""
    start, end = markers
    pieces = re.split(f"{start}([^{start}{end}]*){end}|[{start}{end}]", text)
    ids = _encode(tokenizer, pieces[0], behind=behind, split=False)
    for i, piece in enumerate(pieces[1:], start=1):
        if piece and i % 2:
            ids += encode_text(tokenizer, piece, behind=True)
        elif piece:
            ids += _encode(tokenizer, piece, behind=True, split=False)
    return ids


def _holds_control(controls: ControlTokens, ids: list[int], text: str) -> bool:
    found = controls.ids.intersection(ids)
    return bool(found - {controls.unknown}) or bool(found and controls.pattern.search(text))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, split: bool, behind: bool = False) -> list[int]:
    """Return ids without what the tokenizer puts around a text; ``split`` special tokens or take them as such."""

    def encode(some: str) -> list[int]:
        return list(tokenizer(some, add_special_tokens=False, split_special_tokens=split)["input_ids"])

    if behind:  # SentencePiece puts a space before the first word of a text
        line, ids = encode("\n"), encode("\n" + text)
        if ids[: len(line)] == line:
            return ids[len(line) :]
    return encode(text)
