"""From posts with votes to questions with scored answers (Askell et al. 2021, 2112.00861, section 2; StackLLaMA).

    s(a) = round(log2(1 + votes)) if votes >= 0, else -1 ;   s(a) += 1 if a is the accepted answer

Nothing here depends on the order of the posts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tasks.dataset.question import Answer, Question, text_id
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post

# Stack Exchange's own dates for contributions whose licence the dump does not name: https://stackoverflow.com/help/licensing
VERSION_3_FROM, VERSION_4_FROM = "2011-04-08", "2018-05-02"


def score_answer(votes: int, accepted: bool = False) -> int:
    """s(a) of an answer."""
    return (round(math.log2(1 + votes)) if votes >= 0 else -1) + accepted


def choose_licence(post: Post) -> str:
    """Licence of a post: the dump's own word, else by date; without either, the family's name."""
    if post.licence or not post.created:
        return post.licence or "CC BY-SA"
    if post.created < VERSION_3_FROM:
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if post.created < VERSION_4_FROM else "CC BY-SA 4.0"


def author_url(post: Post, site: str) -> str:
    """The author's page on the site, else the display name; "" for a deleted user without either."""
    return f"https://{site}/users/{post.author_id}" if post.author_id else post.author_name


def join_prompt(title: str, body: str) -> str:
    """Title and body of a question; the title alone where the body adds nothing."""
    return title if title and body in ("", title) else f"{title}\n\n{body}".strip()


class NumberedPost(NamedTuple):
    """A post, its body in Markdown, under the number of its question."""

    question: int
    site: str
    post: Post


def number_post(post: Post, site: str, *, several: bool = False) -> NumberedPost:
    """``several``: the question's number is made of its page's address, for those of two sites may be equal."""
    number = post.parent or post.id
    return NumberedPost(
        text_id(question_url(site, number)) if several else number,
        site,
        post._replace(body=to_markdown(post.body)),
    )


def question_url(site: str, question: int) -> str:
    return f"https://{site}/q/{question}"


def assemble(posts: Iterable[Post], dropped: Counter[str], *, site: str) -> Iterator[Question]:
    """Questions by id, each with its answers; ``dropped`` counts what belongs to none."""
    return build_questions((number_post(post, site) for post in posts), dropped)


def build_questions(posts: Iterable[NumberedPost], dropped: Counter[str]) -> Iterator[Question]:
    """Questions by number, each with its answers; ``dropped`` counts what belongs to none."""
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
        shelf = (answers if post.post.parent else questions)[post.question]
        if (
            known := shelf.get(post.post.id)
        ) is not None:  # files that overlap; the smaller tuple, so that order does not matter
            dropped["repeated post ids"] += 1
            post = min(post, known)
        shelf[post.post.id] = post
    return questions, answers


def _build_question(number: int, site: str, post: Post, replies: tuple[Answer, ...]) -> Question:
    about = (site, question_url(site, post.id), author_url(post, site), choose_licence(post))
    return Question(
        number,
        join_prompt(post.title, post.body),
        post.created,
        *about,
        replies,
        author_name=post.author_name,
    )


def _build_answer(post: Post, question: Post, site: str) -> Answer:
    accepted = post.id == question.accepted
    points = score_answer(post.votes, accepted)
    about = (f"https://{site}/a/{post.id}", author_url(post, site), choose_licence(post))
    return Answer(post.id, points, post.votes, accepted, post.created, post.body, *about, post.author_name)
