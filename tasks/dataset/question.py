"""Questions with their ranked answers, whatever they come from: what every source is read into, and the comparisons drawn from it.

Nothing here depends on the order of the input: answers stand in the order of their ids, and what is drawn is drawn per question.
"""

import hashlib
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

Pair = tuple[int, int]  # indices of the better and the worse answer


class Answer(NamedTuple):
    id: int
    score: float  # s(a) of a Stack Exchange answer, or what the source gives; higher is better
    votes: int
    accepted: bool
    created: str  # ISO 8601; "" if unknown
    text: str  # Markdown
    url: str
    author: str
    licence: str
    author_name: str = ""


class Question(NamedTuple):
    id: int
    prompt: str  # Markdown
    created: str
    site: str  # where it is from
    url: str
    author: str
    licence: str
    answers: tuple[Answer, ...]  # by id
    compared: tuple[Pair, ...] | None = None  # the comparisons that somebody made; None: a higher score wins
    split: str = ""  # the split that its source puts it in, if any
    author_name: str = ""


def text_id(text: str) -> int:
    """A positive 63-bit id for what comes without one: the same text, the same id, wherever it stands."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        >> 1
    ) or 1


def drop_unusable_answers(
    question: Question, dropped: Counter[str], *, min_chars: int = 1, max_chars: int = 2**31
) -> Question | None:
    """The question with the answers of fitting length, of equal texts only the best; None if none is left. ``dropped`` counts why."""
    if not question.prompt:
        dropped["questions without text"] += 1
        dropped["answers to questions without text"] += len(question.answers)
        return None
    kept = [
        i
        for i, reason in enumerate(_iter_faults(question.answers, min_chars, max_chars))
        if not _count(reason, dropped)
    ]
    if not kept:
        dropped["questions without usable answers" if question.answers else "questions without answers"] += 1
        return None
    return keep_answers(question, kept)


def keep_answers(question: Question, kept: Sequence[int]) -> Question:
    """The question with the answers at these places alone, and the comparisons between them."""
    place = {old: new for new, old in enumerate(kept)}
    pairs = question.compared
    if pairs is not None:
        pairs = tuple((place[i], place[j]) for i, j in pairs if i in place and j in place)
    return question._replace(answers=tuple(question.answers[i] for i in kept), compared=pairs)


def _iter_faults(answers: Sequence[Answer], min_chars: int, max_chars: int) -> Iterator[str]:
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


def _count(reason: str, dropped: Counter[str]) -> bool:
    if reason:
        dropped[reason] += 1
    return bool(reason)


def ranks(answers: Sequence[Answer]) -> list[int]:
    """Rank of each answer by its score, from 1; equal scores share one, and the next is one below."""
    order = {
        score: place
        for place, score in enumerate(sorted({answer.score for answer in answers}, reverse=True), 1)
    }
    return [order[answer.score] for answer in answers]


def count_pairs(question: Question) -> int:
    """How many comparisons the question has to draw from."""
    if question.compared is not None:
        return len(question.compared)
    if len(question.answers) < 2:
        return 0
    scores = Counter(answer.score for answer in question.answers)
    return (len(question.answers) ** 2 - sum(count**2 for count in scores.values())) // 2


def draw_pairs(question: Question, *, max_pairs: int, seed: int) -> list[Pair]:
    """The question's comparisons; at most ``max_pairs``, drawn without replacement by a generator seeded from (seed, question id) alone."""
    if question.compared is None:
        return draw_comparisons(
            [answer.score for answer in question.answers],
            max_pairs=max_pairs,
            seed=seed,
            question_id=question.id,
        )
    pairs = sorted(question.compared)
    return (
        pairs
        if len(pairs) <= max_pairs
        else [pairs[k] for k in _draw_numbers(len(pairs), max_pairs, seed, question.id)]
    )


def draw_comparisons(scores: Sequence[float], *, max_pairs: int, seed: int, question_id: int) -> list[Pair]:
    """Pairs (i, j) of indices with scores[i] > scores[j]; at most ``max_pairs``, drawn without replacement.

    No shard, order or worker count changes what is drawn. All n^2 pairs are never held: a pair is found from its number, for answers in falling
    order win against a tail of that order.
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
    """How high an answer stands among those compared, and the pairs that contradict each other.

    An answer stands one above the highest that it beats, at 0 if it beats none: so the better of a pair always stands higher. Answers that beat
    each other in a circle have no such order; their pairs among each other are given back, and do not count.
    """
    beats: dict[int, set[int]] = defaultdict(set)
    for better, worse in pairs:
        beats[better].add(worse)
        beats[worse] |= set()
    found: dict[int, int] = {}
    contradicting: set[Pair] = set()
    while len(found) < len(beats):
        ready = [answer for answer, worse in beats.items() if answer not in found and worse <= found.keys()]
        if not ready:
            circle = _find_cycle(beats, found)
            broken = {(better, worse) for better, worse in pairs if better in circle and worse in circle}
            contradicting |= broken
            for better, worse in broken:
                beats[better].discard(worse)
            continue
        for answer in ready:
            found[answer] = 1 + max((found[worse] for worse in beats[answer]), default=-1)
    return found, contradicting


def _find_cycle(beats: Mapping[int, set[int]], done: Collection[int]) -> set[int]:
    """The answers of one circle: followed from the smallest answer downwards until one comes again."""
    path = [min(answer for answer in beats if answer not in done)]
    while True:
        following = min(worse for worse in beats[path[-1]] if worse not in done)
        if following in path:
            return set(path[path.index(following) :])
        path.append(following)


def index_of_best(answers: Sequence[Answer]) -> int:
    """Index of the best answer: highest score; ties go to the accepted one, then to votes, then to the oldest."""
    return min(range(len(answers)), key=lambda i: _preference_key(answers[i]))


def is_older(first: Answer, second: Answer) -> bool | None:
    """Whether the first answer was written before the second (by id where the source has no dates); None where it says nothing about age."""
    if not (first.created or first.votes or second.votes):
        return None  # ids come from texts
    return (first.created, first.id) < (second.created, second.id)


def age_ranks(answers: Sequence[Answer]) -> list[int] | None:
    """Rank of each answer by age, the oldest 1; None where the source says nothing about age."""
    if not any(answer.created or answer.votes for answer in answers):
        return None
    order = sorted(range(len(answers)), key=lambda i: (answers[i].created, answers[i].id))
    return [order.index(i) + 1 for i in range(len(answers))]


def _preference_key(answer: Answer) -> tuple[float, bool, int, str, int]:
    return (-answer.score, not answer.accepted, -answer.votes, answer.created, answer.id)
