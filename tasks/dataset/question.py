"""Define questions with scored answers, into which every source is read, and draw comparisons from them.

The order of the input does not matter: answers are ordered by their ids, and pairs are drawn per question.
"""

import hashlib
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
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


def drop_unusable_answers(
    question: Question, dropped: Counter[str], *, min_chars: int = 1, max_chars: int = 2**31
) -> Question | None:
    """Return the question without answers of unfitting length and, of equal texts, all but the best.

    None if no answer is left. ``dropped`` counts the reasons.
    """
    if not question.prompt:
        dropped["questions without text"] += 1
        dropped["answers to questions without text"] += len(question.answers)
        return None
    kept = []
    for i, reason in enumerate(_iter_faults(question.answers, min_chars, max_chars)):
        if reason:
            dropped[reason] += 1
        else:
            kept.append(i)
    if not kept:
        dropped["questions without usable answers" if question.answers else "questions without answers"] += 1
        return None
    return keep_answers(question, kept)


def keep_answers(question: Question, kept: Sequence[int]) -> Question:
    """Return the question with only the answers at these indices, and the comparisons between them."""
    place = {old: new for new, old in enumerate(kept)}
    pairs = question.compared
    if pairs is not None:
        pairs = tuple((place[i], place[j]) for i, j in pairs if i in place and j in place)
    return question._replace(answers=tuple(question.answers[i] for i in kept), compared=pairs)


def _iter_faults(answers: Sequence[Answer], min_chars: int, max_chars: int) -> Iterator[str]:
    """Yield for each answer the reason why it is dropped, "" if it is kept."""
    first: dict[str, Answer] = {}
    for answer in sorted(answers, key=_preference_key):
        first.setdefault(answer.text, answer)
    for answer in answers:
        if not answer.text:
            yield "answers without text"
        elif len(answer.text) < min_chars:
            yield "answers too short"
        elif len(answer.text) > max_chars:
            yield "answers too long"
        else:
            yield "" if first[answer.text] is answer else "answers equal to another of the question"


def ranks(answers: Sequence[Answer]) -> list[int]:
    """Return the rank of each answer by its score, from 1.

    Equal scores share a rank; the next rank is one below.
    """
    scores = sorted({answer.score for answer in answers}, reverse=True)
    rank_of = {score: rank for rank, score in enumerate(scores, 1)}
    return [rank_of[answer.score] for answer in answers]


def count_pairs(question: Question) -> int:
    """Return the number of comparisons that can be drawn from the question."""
    if question.compared is not None:
        return len(question.compared)
    if len(question.answers) < 2:
        return 0
    scores = Counter(answer.score for answer in question.answers)
    return (len(question.answers) ** 2 - sum(count**2 for count in scores.values())) // 2


def draw_pairs(question: Question, *, max_pairs: int, seed: int) -> list[Pair]:
    """Draw the question's comparisons, at most ``max_pairs``.

    Without replacement, by a generator seeded from (seed, question id) alone.
    """
    if question.compared is None:
        return draw_comparisons(
            [answer.score for answer in question.answers],
            max_pairs=max_pairs,
            seed=seed,
            question_id=question.id,
        )
    pairs = sorted(question.compared)
    if len(pairs) <= max_pairs:
        return pairs
    return [pairs[k] for k in _draw_numbers(len(pairs), max_pairs, seed, question.id)]


def draw_comparisons(scores: Sequence[float], *, max_pairs: int, seed: int, question_id: int) -> list[Pair]:
    """Draw pairs (i, j) of indices with scores[i] > scores[j], at most ``max_pairs``, without replacement.

    The draw does not depend on partitions, order or the number of workers. The n^2 pairs are never held in
    memory: sorted by falling score, each answer wins against a tail of the list, so that a pair is computed
    from its number.
    """
    if len(scores) < 2:
        return []
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    losses = [-scores[i] for i in ranking]
    tails = [bisect_right(losses, loss) for loss in losses]  # first place that loses against this place
    ends = list(accumulate(len(scores) - tail for tail in tails))
    total = ends[-1]
    numbers = range(total) if total <= max_pairs else _draw_numbers(total, max_pairs, seed, question_id)
    places = ((bisect_right(ends, number), number) for number in numbers)
    return [(ranking[place], ranking[len(scores) - (ends[place] - number)]) for place, number in places]


def _draw_numbers(total: int, count: int, seed: int, question_id: int) -> list[int]:
    return sorted(random.Random(f"{seed}/{question_id}").sample(range(total), count))


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


def index_of_best(answers: Sequence[Answer]) -> int:
    """Return the index of the best answer: highest score, then accepted, then most votes, then oldest."""
    return min(range(len(answers)), key=lambda i: _preference_key(answers[i]))


def is_older(first: Answer, second: Answer) -> bool | None:
    """Return whether the first answer is older than the second; None if their age is unknown.

    Ids decide if the source has votes but no dates.
    """
    if not (first.created or first.votes or second.votes):
        return None  # then ids are hashes of the texts
    return (first.created, first.id) < (second.created, second.id)


def age_ranks(answers: Sequence[Answer]) -> list[int] | None:
    """Return the rank of each answer by age, the oldest 1; None if the source says nothing about age."""
    if not any(answer.created or answer.votes for answer in answers):
        return None
    order = sorted(range(len(answers)), key=lambda i: (answers[i].created, answers[i].id))
    return [order.index(i) + 1 for i in range(len(answers))]


def _preference_key(answer: Answer) -> tuple[float, bool, int, str, int]:
    return (-answer.score, not answer.accepted, -answer.votes, answer.created, answer.id)
