"""Find the control tokens of a model (roles, ends of turns, padding), and encode text without them."""

import re
from functools import lru_cache
from itertools import islice, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

# Added tokens that no template names but that control a model: <|fim_prefix|>, <｜tool▁sep｜>, [TOOL_CALLS].
_SHAPED = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z][A-Z_]*\]", re.DOTALL)
_PRIVATE_USE = range(0xE000, 0xF900)
Markers = tuple[str, str]  # the characters that begin and end marked text


class ControlTokens(NamedTuple):
    """The control tokens of a tokenizer."""

    ids: frozenset[int]
    pattern: re.Pattern[str]  # their texts, the longest first
    unknown: (
        int | None
    )  # the unknown token, which plain text may contain: characters that the vocabulary lacks


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return the special tokens, and added ones that the chat template names or that look like controls.

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
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        unknown = None
    return ControlTokens(frozenset(found.values()), pattern, unknown)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, continues: bool = False) -> list[int]:
    """Return the ids of ``text`` without control tokens: a post that writes "</s>" means these characters.

    With ``continues`` the text continues another one, so a tokenizer that adds a space before every text adds
    none.
    """
    ids = _encode(tokenizer, text, continues=continues, split=True)
    controls = control_tokens(tokenizer)
    if not _holds_control(controls, ids, text):
        return ids
    # Not every tokenizer splits what it should (added tokens that are not special; Unigram vocabularies).
    cuts = [match.start() + 1 for match in controls.pattern.finditer(text)] or [len(text) // 2]
    parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    if len(text) < 2:  # a control token of one character cannot be split
        return []
    ids = []
    for i, part in enumerate(filter(None, parts)):
        ids += encode_text(tokenizer, part, continues=continues or i > 0)
    return ids


def mark(tokenizer: PreTrainedTokenizerBase, text: str, markers: Markers) -> str:
    """Put the parts of ``text`` that would become control tokens between ``markers``, for `encode_marked`."""
    controls = control_tokens(tokenizer)
    if not _holds_control(controls, _encode(tokenizer, text, split=False), text):
        return text
    start, end = markers
    pieces = []
    last_end = 0
    for match in controls.pattern.finditer(text):
        pieces += [text[last_end : match.start()], f"{start}{match.group()}{end}"]
        last_end = match.end()
    pieces.append(text[last_end:])
    for i in range(0, len(pieces), 2):  # normalisation may turn other text into a control token
        if _holds_control(controls, _encode(tokenizer, pieces[i], split=False), pieces[i]):
            pieces[i] = f"{start}{pieces[i]}{end}"
    return "".join(pieces)


def choose_markers(text: str) -> Markers:
    """Return two characters that ``text`` does not contain."""
    first, second = free_characters(text, 2)
    return first, second


def free_characters(text: str, count: int) -> list[str]:
    """Return ``count`` characters that ``text`` does not contain."""
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in text)
    return list(islice(free, count))


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, markers: Markers, *, continues: bool = False
) -> list[int]:
    """Return the ids of a rendered template; marked parts are plain text, without control tokens."""
    pieces = _marked_pattern(markers).split(text)
    ids = _encode(tokenizer, pieces[0], continues=continues, split=False)
    for i, piece in enumerate(pieces[1:], start=1):
        if piece and i % 2:
            ids += encode_text(tokenizer, piece, continues=True)
        elif piece:
            ids += _encode(tokenizer, piece, continues=True, split=False)
    return ids


def locate_tokens(tokenizer: PreTrainedTokenizerBase, text: str, markers: Markers) -> list[tuple[int, int]]:
    """Return the characters (start, end) of ``text`` that each id of `encode_marked` stands for.

    The ids of a marked part have all of its characters. The tokenizer must be a fast one.
    """
    found: list[tuple[int, int]] = []
    place = 0
    for match in _marked_pattern(markers).finditer(text):
        found += _locate_plain(tokenizer, text, (place, match.start()))
        if match[1]:
            found += [match.span(1)] * len(encode_text(tokenizer, match[1], continues=True))
        place = match.end()
    return found + _locate_plain(tokenizer, text, (place, len(text)))


def _locate_plain(
    tokenizer: PreTrainedTokenizerBase, text: str, span: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the characters of the tokens of a part of ``text`` without marks."""
    first, last = span
    part = text[first:last]
    options = {"add_special_tokens": False, "split_special_tokens": False, "return_offsets_mapping": True}
    if not part:
        return []
    shift = first
    encoded = tokenizer(part, **options)
    if first:  # as `_encode` does for a text that continues another one
        line, whole = tokenizer("\n", **options)["input_ids"], tokenizer("\n" + part, **options)
        if whole["input_ids"][: len(line)] == line:
            kept = whole["offset_mapping"][len(line) :]
            return [(start + shift - 1, end + shift - 1) for start, end in kept]
    return [(start + shift, end + shift) for start, end in encoded["offset_mapping"]]


def _marked_pattern(markers: Markers) -> re.Pattern[str]:
    start, end = markers
    return re.compile(f"{start}([^{start}{end}]*){end}|[{start}{end}]")


def _holds_control(controls: ControlTokens, ids: list[int], text: str) -> bool:
    found = controls.ids.intersection(ids)
    return bool(found - {controls.unknown}) or bool(found and controls.pattern.search(text))


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, split: bool, continues: bool = False
) -> list[int]:
    """Return the ids of ``text`` alone; with ``split`` special tokens are encoded as plain text."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])

    if continues:  # SentencePiece puts a space before the first word of a text
        line, ids = encode("\n"), encode("\n" + text)
        if ids[: len(line)] == line:
            return ids[len(line) :]
    return encode(text)
