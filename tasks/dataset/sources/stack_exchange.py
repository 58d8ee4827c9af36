"""Build questions with scored answers from posts with votes.

Askell et al. 2021, 2112.00861, section 2; StackLLaMA:

    s(a) = round(log2(1 + votes)) if votes >= 0, else -1 ;   s(a) += 1 if a is the accepted answer

The order of the posts does not matter.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tasks.dataset.question import Answer, Question, text_id
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post

# Stack Exchange's own dates for contributions whose licence the dump does not name:
# https://stackoverflow.com/help/licensing
VERSION_3_FROM, VERSION_4_FROM = "2011-04-08", "2018-05-02"


def score_answer(votes: int, accepted: bool = False) -> int:
    """Return s(a) of an answer."""
    return (round(math.log2(1 + votes)) if votes >= 0 else -1) + accepted


def choose_licence(post: Post) -> str:
    """Return the licence that the dump names, else the one by date; without a date, the family's name."""
    if post.licence or not post.created:
        return post.licence or "CC BY-SA"
    if post.created < VERSION_3_FROM:
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if post.created < VERSION_4_FROM else "CC BY-SA 4.0"


def author_url(post: Post, site: str) -> str:
    """Return the author's page on the site, else the display name; "" for a deleted user without either."""
    return f"https://{site}/users/{post.author_id}" if post.author_id else post.author_name


def join_prompt(title: str, body: str) -> str:
    """Return title and body of a question; the title alone if the body adds nothing."""
    return title if title and body in ("", title) else f"{title}\n\n{body}".strip()


class NumberedPost(NamedTuple):
    """A post with its body in Markdown, and the number of its question."""

    question: int
    site: str
    post: Post


def number_post(post: Post, site: str, *, several_sites: bool = False) -> NumberedPost:
    """Return the post with the number of its question.

    With ``several_sites`` the number is a hash of the question's address, because ids of two sites may be
    equal.
    """
    number = post.parent or post.id
    return NumberedPost(
        text_id(question_url(site, number)) if several_sites else number,
        site,
        post._replace(body=to_markdown(post.body)),
    )


def question_url(site: str, question: int) -> str:
    """Return the address of a question's page."""
    return f"https://{site}/q/{question}"


def build_questions(posts: Iterable[NumberedPost], dropped: Counter[str]) -> Iterator[Question]:
    """Yield questions by number, each with its answers; ``dropped`` counts answers without a question."""
    questions, answers = _group_posts(posts, dropped)
    for number in sorted(questions):
        (post,) = questions[number].values()
        site, written = post.site, answers.pop(number, {})
        replies = tuple(
            _build_answer(written[answer_id].post, post.post, site) for answer_id in sorted(written)
        )
        yield _build_question(number, site, post.post, replies)
    dropped["answers whose question is missing"] += sum(map(len, answers.values()))


PostsByQuestion = dict[int, dict[int, NumberedPost]]  # by the question's number and the post's id


def _group_posts(
    posts: Iterable[NumberedPost], dropped: Counter[str]
) -> tuple[PostsByQuestion, PostsByQuestion]:
    questions: PostsByQuestion = defaultdict(dict)
    answers: PostsByQuestion = defaultdict(dict)
    for post in posts:
        group = (answers if post.post.parent else questions)[post.question]
        known = group.get(post.post.id)
        if known is not None:  # files overlap; the smaller tuple is kept, so that order does not matter
            dropped["repeated post ids"] += 1
            post = min(post, known)
        group[post.post.id] = post
    return questions, answers


def _build_question(number: int, site: str, post: Post, answers: tuple[Answer, ...]) -> Question:
    return Question(
        id=number,
        prompt=join_prompt(post.title, post.body),
        created=post.created,
        site=site,
        url=question_url(site, post.id),
        author=author_url(post, site),
        licence=choose_licence(post),
        answers=answers,
        author_name=post.author_name,
    )


def _build_answer(post: Post, question: Post, site: str) -> Answer:
    accepted = post.id == question.accepted
    return Answer(
        id=post.id,
        score=score_answer(post.votes, accepted),
        votes=post.votes,
        accepted=accepted,
        created=post.created,
        text=post.body,
        url=f"https://{site}/a/{post.id}",
        author=author_url(post, site),
        licence=choose_licence(post),
        author_name=post.author_name,
    )
