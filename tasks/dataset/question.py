"""Define one question with scored answers, as sources of rows are read; columns.py holds many of them."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from tasks.dataset.conversation import Messages

Pair = tuple[int, int]  # indices of the better and the worse answer


class Answer(NamedTuple):
    """An answer with its score."""

    id: int
    score: float  # s(a) of a Stack Exchange answer, or the source's own score; higher is better
    votes: int
    accepted: bool
    created: str  # ISO 8601; "" if unknown
    text: str  # Markdown
    url: str
    author: str
    licence: str
    author_name: str = ""


class Question(NamedTuple):
    """A question with its answers and the comparisons between them."""

    id: int
    prompt: str  # Markdown; a conversation is written out
    created: str
    site: str  # that the question is from
    url: str
    author: str
    licence: str
    answers: tuple[Answer, ...]  # by id
    compared: tuple[Pair, ...] | None = None  # the source's own comparisons; None: the higher score wins
    split: str = ""  # the split that the source assigns, if any
    author_name: str = ""
    messages: Messages = ()  # of a conversation; (): one user's message, the prompt


def text_id(text: str) -> int:
    """Return a positive 63-bit id of a text, for questions and answers without one.

    Equal texts have equal ids.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def comparison_levels(pairs: Collection[Pair]) -> tuple[dict[int, int], set[Pair]]:
    """Return the level of each compared answer, and the pairs that contradict each other.

    The level of an answer is one above the highest level that it beats, 0 if it beats none: so the better
    answer of a pair always has the higher level. Answers that beat each other in a cycle have no such order;
    their pairs among each other are returned as contradicting, and do not count.
    """
    beats: dict[int, set[int]] = defaultdict(set)
    for better, worse in pairs:
        beats[better].add(worse)
        beats[worse] |= set()
    levels: dict[int, int] = {}
    contradicting: set[Pair] = set()
    while len(levels) < len(beats):
        ready = [answer for answer, worse in beats.items() if answer not in levels and worse <= levels.keys()]
        if not ready:
            cycle = _find_cycle(beats, levels)
            broken = {(better, worse) for better, worse in pairs if better in cycle and worse in cycle}
            contradicting |= broken
            for better, worse in broken:
                beats[better].discard(worse)
            continue
        for answer in ready:
            levels[answer] = 1 + max((levels[worse] for worse in beats[answer]), default=-1)
    return levels, contradicting


def _find_cycle(beats: Mapping[int, set[int]], done: Collection[int]) -> set[int]:
    """Return the answers of one cycle: follow the smallest answer's wins until an answer repeats."""
    path = [min(answer for answer in beats if answer not in done)]
    while True:
        following = min(worse for worse in beats[path[-1]] if worse not in done)
        if following in path:
            return set(path[path.index(following) :])
        path.append(following)
