"""Read the two published sets that were made from Stack Exchange dumps.

- HuggingFaceH4/stack-exchange-preferences: {qid, question (HTML), answers: [{answer_id, author,
  author_profile, pm_score, selected, text (HTML)}], date, metadata: [question's page, site, author's page]};
  pm_score is s(a) of stack_exchange.py.
- lvwerra/stack-exchange-paired: {question, response_j, response_k} in Markdown, j the better one, one row
  per pair.

Rows of files that are named as a test set, such as data/evaluation of the latter, are for evaluation.
"""

from collections import Counter
from collections.abc import Iterable
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tasks.dataset import columns
from tasks.dataset.columns import (
    ANSWER,
    MESSAGES,
    QUESTION,
    TEXT,
    WORD,
    Indices,
    Questions,
    replace_column,
    to_starts,
)
from tasks.dataset.question import Question, text_id
from tasks.dataset.readers.quarantine import RejectRow
from tasks.dataset.readers.row_files import Row
from tasks.dataset.repeated_rows import drop_repeated
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.splits import is_test

SITE, LICENCE = "stackexchange.com", "CC BY-SA"
# what a row of stack-exchange-preferences must have, and what it may have
REPLY = {"answer_id": pa.int64(), "pm_score": pa.float64(), "text": TEXT}
ABOUT_REPLY = {"author": WORD, "author_profile": WORD, "selected": pa.bool_()}
REPLIES = pa.large_list(pa.struct([*(REPLY | ABOUT_REPLY).items()]))
ABOUT = {"question": TEXT, "qid": WORD, "date": WORD, "metadata": pa.list_(WORD)}
PREFERENCES = pa.schema((ABOUT | {"answers": REPLIES}).items())
PUBLISHED: dict[str, Any] = {
    "qid": "integer", "question": "text", "date": "text", "metadata": ["text"],
    "answers": [
        {"answer_id": "integer", "author": "text", "author_profile": "text", "selected": "bool",
         "pm_score": "integer", "text": "text"}
    ],
}  # fmt: skip


# ------------------------------------------------------------------------ stack-exchange-preferences


def read_preferences(rows: Iterable[Row], reject: RejectRow) -> pa.RecordBatch:
    """Return the rows that can be used in the columns of PREFERENCES."""
    read = []
    for place, fields in rows:
        row = _read_row(fields)
        if isinstance(row, str):
            reject(place, row)
        else:
            read.append(row)
    return pa.RecordBatch.from_pylist(read, PREFERENCES)


def _read_row(fields: dict[str, Any]) -> dict[str, Any] | str:
    text, answers, links = fields.get("question"), fields.get("answers"), fields.get("metadata")
    if not isinstance(text, str) or not isinstance(answers, list):
        return "rows without a question and answers"
    replies = [_read_reply(answer) for answer in answers]
    if None in replies:
        return "rows with an answer that cannot be read"
    date = fields.get("date")
    return {
        "question": text,
        "answers": replies,
        "qid": str(fields.get("qid")),
        "date": date if isinstance(date, str) else None,
        "metadata": [link if isinstance(link, str) else None for link in links]
        if isinstance(links, list)
        else None,
    }


def _read_reply(fields: object) -> dict[str, Any] | None:
    if not isinstance(fields, dict):
        return None
    number, points, text = fields.get("answer_id"), fields.get("pm_score"), fields.get("text")
    if not (
        isinstance(number, int)
        and 0 <= number < 2**63
        and isinstance(points, int | float)
        and isfinite(points)
        and isinstance(text, str)
    ):
        return None
    return {
        "answer_id": int(number),
        "pm_score": float(points),
        "text": text,
        "author": str(fields.get("author") or ""),
        "author_profile": str(fields.get("author_profile") or ""),
        "selected": fields.get("selected") is True,
    }


def as_preferences(batch: pa.RecordBatch) -> pa.RecordBatch | None:
    """Return the rows of a file in the columns of PREFERENCES, as ``read_preferences`` does.

    None if the columns have other types than the published ones, or if a value is missing or wrong: then the
    rows have to be read one by one.
    """
    if _kind(pa.struct(batch.schema)) != PUBLISHED:
        return None
    try:
        batch.validate(full=True)  # texts are UTF-8
        lists = batch.column("answers")
        replies = pa.RecordBatch.from_struct_array(lists.flatten())
        cast = {name: replies.column(name).cast(kind) for name, kind in (REPLY | ABOUT_REPLY).items()}
        about = {name: batch.column(name).cast(kind) for name, kind in ABOUT.items()}
    except pa.ArrowInvalid:
        return None
    needed = [lists, about["question"], about["qid"], *(cast[name] for name in REPLY)]
    if any(column.null_count for column in needed) or (pc.min(cast["answer_id"]).as_py() or 0) < 0:
        return None
    starts = to_starts(pc.list_value_length(lists).to_numpy())
    answers = pa.LargeListArray.from_arrays(
        starts, pa.StructArray.from_arrays(cast.values(), names=list(cast))
    )
    return pa.RecordBatch.from_pydict(about | {"answers": answers}, PREFERENCES)


def _kind(kind: pa.DataType) -> Any:
    if types.is_struct(kind):
        return {field.name: _kind(field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_kind(kind.value_type)]
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return "integer" if types.is_integer(kind) else str(kind)


def to_questions(rows: pa.RecordBatch, *, split: str) -> pa.RecordBatch:
    """Return rows of PREFERENCES as questions in the columns of ``columns.to_batch``; texts are still HTML.

    Ids are hashes of the page's address, because ids of two sites may be equal.
    """
    links = [_clean_links(row) for row in rows.column("metadata").to_pylist()]
    sites = [_site_of(address or page) for page, address, _ in links]
    numbers = rows.column("qid").to_pylist()
    urls = [
        page or f"https://{site}/q/{number}"
        for (page, _, _), site, number in zip(links, sites, numbers, strict=True)
    ]
    site = pa.array(sites, WORD)
    about = {
        "id": pa.array(map(text_id, urls), pa.int64()),
        "prompt": rows.column("question"),
        "created": pc.replace_substring(_fill(rows.column("date")), "/", "-"),
        "site": site,
        "url": pa.array(urls, WORD),
        "author": pa.array((author for _, _, author in links), WORD),
        "licence": _repeat(LICENCE, len(rows)),
        "split": _repeat(split, len(rows)),
        "author_name": _repeat("", len(rows)),
        "messages": pa.array([[]] * len(rows), MESSAGES),
    }
    lists = rows.column("answers")
    owners = np.repeat(np.arange(len(rows)), np.diff(lists.offsets.to_numpy()))
    replies, owners = _drop_repeated_replies(pa.RecordBatch.from_struct_array(lists.values), owners)
    questions = Questions(
        about=pa.RecordBatch.from_pydict({name: about[name] for name in QUESTION}),
        answers=_build_answers(replies, site.take(pa.array(owners))),
        starts=to_starts(np.bincount(owners, minlength=len(rows))),
        compared=np.zeros(len(rows), dtype=bool),
        pairs=np.empty((0, 2), dtype=np.int64),
    )
    return columns.to_batch(questions)


def _clean_links(row: list[str | None] | None) -> list[str]:
    """Return the addresses of the question, its site and its author."""
    return [*(link or "" for link in row or ()), "", "", ""][:3]


def _site_of(address: str) -> str:
    try:
        return urlsplit(address).netloc or SITE
    except ValueError:
        return SITE


def _fill(words: pa.Array) -> pa.Array:
    return words.fill_null("")


def _repeat(word: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(word, WORD), count)


def _drop_repeated_replies(replies: pa.RecordBatch, owners: Indices) -> tuple[pa.RecordBatch, Indices]:
    """Return the answers of each question by id, of those with the same id the last."""
    numbers = replies.column("answer_id").to_numpy()
    order = np.lexsort((numbers, owners))
    is_last = np.append((np.diff(numbers[order]) != 0) | (np.diff(owners[order]) != 0), True)[: len(order)]
    kept = order[is_last]
    return replies.take(pa.array(kept)), owners[kept]


def _build_answers(replies: pa.RecordBatch, site: pa.Array) -> pa.RecordBatch:
    """Return answers [m]; ``site`` [m] is that of the question of each."""
    count, number = len(replies), replies.column("answer_id")
    page, author = _fill(replies.column("author_profile")), _fill(replies.column("author"))
    answers = {
        "id": number,
        "score": replies.column("pm_score"),
        "votes": pa.repeat(pa.scalar(0, pa.int64()), count),
        "accepted": replies.column("selected").fill_null(False),
        "created": _repeat("", count),
        "text": replies.column("text"),
        "url": pc.binary_join_element_wise("https://", site, "/a/", number.cast(WORD), ""),
        "author": pc.if_else(pc.equal(page, ""), author, page),
        "licence": _repeat(LICENCE, count),
        "author_name": author,
    }
    return pa.RecordBatch.from_pydict({name: answers[name] for name in ANSWER})


def build_questions(records: pa.RecordBatch, dropped: Counter[str]) -> Questions:
    """Return the questions of the batches of ``to_questions``.

    Prompts are Markdown; answers are HTML still, because most rules look at the question alone.
    """
    ids, splits = records.column("id").to_numpy(), records.column("split")
    batch = drop_repeated(records, [ids], _as_converted)
    dropped["repeated questions"] += len(records) - len(batch)
    tests = ids[pc.not_equal(splits, "").to_numpy(zero_copy_only=False)]
    questions = columns.from_batch(batch)
    about = replace_column(questions.about, "prompt", _convert(questions.about.column("prompt")))
    # if one of the same questions is in a test set, the one that is kept is
    is_test_question = pa.array(np.isin(about.column("id").to_numpy(), tests))
    split = pc.if_else(is_test_question, "evaluation", "")
    return questions._replace(about=replace_column(about, "split", split))


def _convert(texts: pa.Array) -> pa.Array:
    return pa.array(map(to_markdown, texts.to_pylist()), TEXT)


def _as_converted(record: pa.RecordBatch) -> Question:
    """Return a question in Markdown: files of other HTML make the same choice by it."""
    questions = columns.from_batch(record.take(pa.array([0])))
    converted = questions._replace(
        about=replace_column(questions.about, "prompt", _convert(questions.about.column("prompt"))),
        answers=replace_column(questions.answers, "text", _convert(questions.answers.column("text"))),
    )
    (question,) = columns.to_rows(converted)
    return question


# ---------------------------------------------------------------------------- stack-exchange-paired


def group_pairs(rows: Iterable[Row], reject: RejectRow) -> AnswerGroups:
    """Return the comparisons of all rows."""
    groups = AnswerGroups(SITE, LICENCE)
    for place, fields in rows:
        texts = [fields.get(name) for name in ("question", "response_j", "response_k")]
        question, better, worse = [text.strip() if isinstance(text, str) else "" for text in texts]
        links = fields.get("metadata")
        if not (question and better and worse):
            reject(place, "rows without a question and two answers")
        elif better == worse:
            reject(place, "rows whose answers are equal")
        else:
            url = str(links[0]) if isinstance(links, list) and links else ""
            groups.add_comparison(
                question, better, worse, url=url, split="evaluation" if is_test(place.file) else ""
            )
    return groups
