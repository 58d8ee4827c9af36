"""Read the two published sets that were made from Stack Exchange dumps.

- HuggingFaceH4/stack-exchange-preferences: {qid, question (HTML), answers: [{answer_id, author,
  author_profile, pm_score, selected, text (HTML)}], date, metadata: [question's page, site, author's page]};
  pm_score is s(a) of stack_exchange.py.
- lvwerra/stack-exchange-paired: {question, response_j, response_k} in Markdown, j the better one, one row
  per pair.

Rows of files that are named as a test set, such as data/evaluation of the latter, are for evaluation.
"""

from collections.abc import Iterable, Iterator
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

from tasks.dataset.question import Answer, Question, text_id
from tasks.dataset.readers.quarantine import RejectRow
from tasks.dataset.readers.row_files import Row
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.splits import is_test

SITE, LICENCE = "stackexchange.com", "CC BY-SA"


def read_preferences(rows: Iterable[Row], reject: RejectRow) -> Iterator[Question]:
    """Yield questions with scored answers, in the order of the rows.

    Ids are hashes of the page's address, because ids of two sites may be equal.
    """
    for place, fields in rows:
        question = _build_question(fields)
        if isinstance(question, str):
            reject(place, question)
        else:
            yield question._replace(split="evaluation" if is_test(place.file) else "")


def _build_question(fields: dict[str, Any]) -> Question | str:
    text, answers, links = fields.get("question"), fields.get("answers"), fields.get("metadata")
    if not isinstance(text, str) or not isinstance(answers, list):
        return "rows without a question and answers"
    links = [link if isinstance(link, str) else "" for link in links] if isinstance(links, list) else []
    page, site_address, author = [*links, "", "", ""][:3]
    site = _site_of(site_address or page)
    prompt = to_markdown(text)
    replies = [_build_answer(answer, site) for answer in answers]
    if None in replies:
        return "rows with an answer that cannot be read"
    distinct = {reply.id: reply for reply in replies if reply}
    date = fields.get("date")
    created = date.replace("/", "-") if isinstance(date, str) else ""
    url = page or f"https://{site}/q/{fields.get('qid')}"
    return Question(
        id=text_id(url),
        prompt=prompt,
        created=created,
        site=site,
        url=url,
        author=author,
        licence=LICENCE,
        answers=tuple(distinct[number] for number in sorted(distinct)),
    )


def _site_of(address: str) -> str:
    try:
        return urlsplit(address).netloc or SITE
    except ValueError:
        return SITE


def _build_answer(fields: object, site: str) -> Answer | None:
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
    author = fields.get("author_profile") or fields.get("author") or ""
    return Answer(
        id=number,
        score=float(points),
        votes=0,
        accepted=fields.get("selected") is True,
        created="",
        text=to_markdown(text),
        url=f"https://{site}/a/{number}",
        author=str(author),
        licence=LICENCE,
        author_name=str(fields.get("author") or ""),
    )


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
