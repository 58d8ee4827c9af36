"""From posts with votes to questions with scored answers (Askell et al. 2021, 2112.00861, section 2; StackLLaMA).

    s(a) = round(log2(1 + votes)) if votes >= 0, else -1 ;   s(a) += 1 if a is the accepted answer

Nothing here depends on the order of the posts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from tasks.rlhf.markdown import to_markdown
from tasks.rlhf.posts import Post
from tasks.rlhf.questions import Answer, Question

# Stack Exchange's own dates for contributions whose licence the dump does not name: https://stackoverflow.com/help/licensing
VERSION_3_FROM, VERSION_4_FROM = "2011-04-08", "2018-05-02"


def score(votes: int, accepted: bool = False) -> int:
    """s(a) of an answer."""
    return (round(math.log2(1 + votes)) if votes >= 0 else -1) + accepted


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


def assemble(posts: Iterable[Post], dropped: Counter[str], *, site: str) -> Iterator[Question]:
    """Questions by id, each with its answers; ``dropped`` counts what belongs to none."""
    questions, answers = _collect(posts, dropped)
    for question_id in sorted(questions):
        post = questions[question_id]
        written = answers.pop(question_id, {})
        replies = tuple(_answer(written[answer_id], post, site) for answer_id in sorted(written))
        about = (site, f"https://{site}/q/{post.id}", author_of(post, site), licence_of(post))
        yield Question(post.id, prompt_of(post.title, post.body), post.created, *about, replies)
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
    about = (f"https://{site}/a/{post.id}", author_of(post, site), licence_of(post))
    return Answer(post.id, points, post.votes, accepted, post.created, post.body, *about)
