"""From posts with votes to questions with scored answers and comparisons (Askell et al. 2021, 2112.00861, section 2; StackLLaMA).

    s(a) = round(log2(1 + votes)) if votes >= 0, else -1 ;   s(a) += 1 if a is the accepted answer

Nothing here depends on the order of the input: answers stand in the order of their ids, and what is drawn is drawn per question.
"""

import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from tasks.rlhf.markdown import to_markdown
from tasks.rlhf.posts import Post

# Stack Exchange's own dates for contributions whose licence the dump does not name: https://stackoverflow.com/help/licensing
VERSION_3_FROM, VERSION_4_FROM = "2011-04-08", "2018-05-02"


class Answer(NamedTuple):
    id: int
    score: int  # s(a)
    votes: int
    accepted: bool
    created: str  # ISO 8601
    text: str  # Markdown
    author: str
    licence: str


class Question(NamedTuple):
    id: int
    prompt: str  # title and body, Markdown
    created: str
    author: str
    licence: str
    answers: tuple[Answer, ...]  # by id


def score(votes: int, accepted: bool = False) -> int:
    """s(a) of an answer."""
    return (round(math.log2(1 + votes)) if votes >= 0 else -1) + accepted


def comparisons(scores: Sequence[int], *, max_pairs: int, seed: int, question_id: int) -> list[tuple[int, int]]:
    """Pairs (i, j) of indices with scores[i] > scores[j]; at most ``max_pairs``, drawn without replacement.

    The generator is seeded from (seed, question id) alone, so no shard, order or worker count changes what is drawn. All n^2 pairs are never
    held: a pair is found from its number, for answers in falling order win against a tail of that order.
    """
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    losses = [-scores[i] for i in ranking]
    tails = [bisect_right(losses, loss) for loss in losses]  # first place that loses against this place
    ends = list(accumulate(len(scores) - tail for tail in tails))
    total = ends[-1] if ends else 0
    numbers: Sequence[int] = range(total)
    if total > max_pairs:
        numbers = sorted(random.Random(f"{seed}/{question_id}").sample(numbers, max_pairs))
    places = ((bisect_right(ends, number), number) for number in numbers)
    return [(ranking[place], ranking[len(scores) - (ends[place] - number)]) for place, number in places]


def best(answers: Sequence[Answer]) -> int:
    """Index of the best answer: highest score; ties go to the accepted one, then to votes, then to the oldest."""
    return min(range(len(answers)), key=lambda i: _standing(answers[i]))


def older(first: Answer, second: Answer) -> bool:
    """Whether the first answer was written before the second (by id where the dump has no dates)."""
    return (first.created, first.id) < (second.created, second.id)


def licence_of(post: Post) -> str:
    """Licence of a post: the dump's own word, else by date; without either, the family's name."""
    if post.licence or not post.created:
        return post.licence or "CC BY-SA"
    if post.created < VERSION_3_FROM:
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if post.created < VERSION_4_FROM else "CC BY-SA 4.0"


def author_of(post: Post, site: str) -> str:
    """The author's page on the site, else the display name; "" for a deleted user without either."""
    return f"https://{site}/users/{post.author_id}" if post.author_id else post.author_name


def prompt_of(title: str, body: str) -> str:
    """Title and body of a question; the title alone where the body adds nothing."""
    return title if title and body in ("", title) else f"{title}\n\n{body}".strip()


def assemble(
    posts: Iterable[Post], dropped: Counter[str], *, site: str, min_answer_chars: int = 1, max_answer_chars: int = 2**31
) -> Iterator[Question]:
    """Questions by id, each with the answers that can be used; ``dropped`` counts by reason what is left out. Lengths are of Markdown."""
    questions, answers = _collect(posts, dropped)
    for question_id in sorted(questions):
        post = questions[question_id]
        written = answers.pop(question_id, {})
        prompt = prompt_of(post.title, post.body)
        if not prompt:
            dropped["questions without text"] += 1
            dropped["answers to questions without text"] += len(written)
            continue
        candidates = [_answer(written[answer_id], post, site) for answer_id in sorted(written)]
        kept = tuple(_usable(candidates, dropped, min_answer_chars, max_answer_chars))
        if kept:
            yield Question(post.id, prompt, post.created, author_of(post, site), licence_of(post), kept)
        else:
            dropped["questions without usable answers" if written else "questions without answers"] += 1
    dropped["answers whose question is missing"] += sum(map(len, answers.values()))


def _collect(posts: Iterable[Post], dropped: Counter[str]) -> tuple[dict[int, Post], dict[int, dict[int, Post]]]:
    """Questions by id and answers by question and id, their bodies in Markdown."""
    questions: dict[int, Post] = {}
    answers: dict[int, dict[int, Post]] = {}
    for post in posts:
        shelf = answers.setdefault(post.parent, {}) if post.parent else questions
        text = post._replace(body=to_markdown(post.body))
        if post.id in shelf:  # shards that overlap; the smaller tuple, so that order does not matter
            dropped["repeated post ids"] += 1
            text = min(text, shelf[post.id])
        shelf[post.id] = text
    return questions, answers


def _answer(post: Post, question: Post, site: str) -> Answer:
    accepted = post.id == question.accepted
    points = score(post.votes, accepted)
    return Answer(post.id, points, post.votes, accepted, post.created, post.body, author_of(post, site), licence_of(post))


def _usable(answers: Sequence[Answer], dropped: Counter[str], min_chars: int, max_chars: int) -> Iterator[Answer]:
    """Answers of fitting length, of equal texts only the best."""
    first: dict[str, Answer] = {}
    for answer in sorted(answers, key=_standing):
        first.setdefault(answer.text, answer)
    for answer in answers:
        if not answer.text:
            dropped["answers without text"] += 1
        elif len(answer.text) < min_chars:
            dropped["answers too short"] += 1
        elif len(answer.text) > max_chars:
            dropped["answers too long"] += 1
        elif first[answer.text] is not answer:
            dropped["answers equal to another of the question"] += 1
        else:
            yield answer


def _standing(answer: Answer) -> tuple[int, bool, int, str, int]:
    return (-answer.score, not answer.accepted, -answer.votes, answer.created, answer.id)
