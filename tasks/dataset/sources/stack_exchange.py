"""Build questions with scored answers from posts with votes, in columns.

Askell et al. 2021, 2112.00861, section 2; StackLLaMA:

    s(a) = round(log2(1 + votes)) if votes >= 0, else -1 ;   s(a) += 1 if a is the accepted answer

The order of the posts does not matter.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.dataset.columns import ANSWER, MESSAGES, QUESTION, TEXT, WORD, Indices, Questions, to_starts
from tasks.dataset.question import text_id
from tasks.dataset.repeated_rows import drop_repeated
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post

# Stack Exchange's own dates for contributions whose licence the dump does not name:
# https://stackoverflow.com/help/licensing
VERSION_3_FROM, VERSION_4_FROM = "2011-04-08", "2018-05-02"
# a post with its site and the number of its question
POST = {
    "question": pa.int64(), "site": WORD, "id": pa.int64(), "parent": pa.int64(), "accepted": pa.int64(),
    "votes": pa.int64(), "created": WORD, "title": WORD, "body": TEXT, "author_id": WORD,
    "author_name": WORD, "licence": WORD,
}  # fmt: skip


def score_answer(votes: int, accepted: bool = False) -> int:
    """Return s(a) of an answer."""
    return (round(math.log2(1 + votes)) if votes >= 0 else -1) + accepted


# the fewest votes for each score from 1 on: numpy's logarithm may round otherwise
FEWEST_VOTES = [bisect_left(range(2**31), score, key=score_answer) for score in range(1, 32)]


def score_answers(votes: Indices, accepted: NDArray[np.bool_]) -> Indices:
    """Return s(a) of many answers."""
    scores = np.where(votes < 0, -1, np.searchsorted(FEWEST_VOTES, votes, side="right"))
    return scores.astype(np.int64) + accepted


def choose_licences(posts: pa.RecordBatch) -> pa.Array:
    """Return the licence that the dump names, else the one by date; without a date, the family's name."""
    named, created = posts.column("licence"), posts.column("created")
    cases = {
        "2.5": pc.less(created, VERSION_3_FROM),
        "3.0": pc.less(created, VERSION_4_FROM),
    }
    by_date = pc.case_when(
        pc.make_struct(pc.equal(created, ""), *cases.values()),
        *("CC BY-SA", *(f"CC BY-SA {version}" for version in cases), "CC BY-SA 4.0"),
    )
    return pc.if_else(pc.equal(named, ""), by_date, named)


def author_urls(posts: pa.RecordBatch) -> pa.Array:
    """Return authors' pages on their site, else display names; "" for a deleted user without either."""
    pages = _join("https://", posts.column("site"), "/users/", posts.column("author_id"))
    return pc.if_else(pc.equal(posts.column("author_id"), ""), posts.column("author_name"), pages)


def _join(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def join_prompt(title: str, body: str) -> str:
    """Return title and body of a question; the title alone if the body adds nothing."""
    return title if title and body in ("", title) else f"{title}\n\n{body}".strip()


def to_columns(posts: Sequence[Post], site: str, *, several_sites: bool = False) -> pa.RecordBatch:
    """Return posts in columns, with the numbers of their questions.

    With ``several_sites`` a number is a hash of the question's address, because ids of two sites may be
    equal.
    """
    numbers = [post.parent or post.id for post in posts]
    if several_sites:
        numbers = [text_id(question_url(site, number)) for number in numbers]
    fields = zip(*posts, strict=True) if posts else ((),) * len(Post._fields)
    columns = [numbers, [site] * len(posts), *fields]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, POST.values(), strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=list(POST))


def question_url(site: str, question: int) -> str:
    """Return the address of a question's page."""
    return f"https://{site}/q/{question}"


def build_questions(posts: pa.RecordBatch, dropped: Counter[str]) -> Questions:
    """Return the questions that have answers.

    Prompts are Markdown; answers are HTML still, because most rules look at the question alone
    (`rules.apply_rules` converts the answers that are left).

    ``dropped`` counts answers without a question, and questions without answers: neither is converted.
    """
    posts = _drop_repeated(posts, dropped)
    is_answer = _numbers(posts, "parent") != 0
    asked, written = posts.filter(pa.array(~is_answer)), posts.filter(pa.array(is_answer))
    asked, written = (
        _keep_common(asked, written, "questions without answers", dropped),
        _keep_common(written, asked, "answers whose question is missing", dropped),
    )
    rows = np.searchsorted(_numbers(asked, "question"), _numbers(written, "question"))
    return Questions(
        about=_build_about(asked),
        answers=_build_answers(written, asked.take(pa.array(rows))),
        starts=to_starts(np.bincount(rows, minlength=len(asked))),
        compared=np.zeros(len(asked), dtype=bool),
        pairs=np.empty((0, 2), dtype=np.int64),
    )


def _keep_common(
    posts: pa.RecordBatch, others: pa.RecordBatch, reason: str, dropped: Counter[str]
) -> pa.RecordBatch:
    """Return the posts whose question the others have, too."""
    kept = np.isin(_numbers(posts, "question"), _numbers(others, "question"))
    dropped[reason] += int((~kept).sum())
    return posts.filter(pa.array(kept))


def _numbers(posts: pa.RecordBatch, column: str) -> Indices:
    numbers: Indices = posts.column(column).to_numpy()
    return numbers


def _drop_repeated(posts: pa.RecordBatch, dropped: Counter[str]) -> pa.RecordBatch:
    """Return the posts by question and id. Files overlap: of posts with the same id one is kept."""
    keys = [_numbers(posts, "id"), _numbers(posts, "question"), _numbers(posts, "parent") != 0]
    kept = drop_repeated(posts, keys, _as_converted)
    dropped["repeated post ids"] += len(posts) - len(kept)
    return kept


def _as_converted(post: pa.RecordBatch) -> tuple[object, ...]:
    """Return a post's values with its body in Markdown: files of other HTML make the same choice by it."""
    (values,) = post.to_pylist()
    return tuple((values | {"body": to_markdown(values["body"])}).values())


def _build_about(posts: pa.RecordBatch) -> pa.RecordBatch:
    bodies = map(to_markdown, posts.column("body").to_pylist())
    prompts = map(join_prompt, posts.column("title").to_pylist(), bodies)
    columns = {
        "id": posts.column("question"),
        "prompt": pa.array(prompts, TEXT),
        "url": _join("https://", posts.column("site"), "/q/", posts.column("id").cast(WORD)),
        "author": author_urls(posts),
        "licence": choose_licences(posts),
        "split": pa.array([""] * len(posts), WORD),
        "messages": pa.array([[]] * len(posts), MESSAGES),
    }
    columns |= {name: posts.column(name) for name in ("created", "site", "author_name")}
    return pa.RecordBatch.from_pydict({name: columns[name] for name in QUESTION})


def _build_answers(posts: pa.RecordBatch, questions: pa.RecordBatch) -> pa.RecordBatch:
    """Return the answers of posts [m]; ``questions`` [m] is the question of each."""
    site, accepted = posts.column("site"), _numbers(posts, "id") == _numbers(questions, "accepted")
    columns = {
        "score": pa.array(score_answers(_numbers(posts, "votes"), accepted)),
        "accepted": pa.array(accepted),
        "text": posts.column("body"),
        "url": _join("https://", site, "/a/", posts.column("id").cast(WORD)),
        "author": author_urls(posts),
        "licence": choose_licences(posts),
    }
    columns |= {name: posts.column(name) for name in ("id", "votes", "created", "author_name")}
    return pa.RecordBatch.from_pydict({name: columns[name] for name in ANSWER})
