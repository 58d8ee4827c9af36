"""Read dumps and build questions in tests by the functions that the data stage calls."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tasks.dataset.columns import to_rows
from tasks.dataset.question import Question
from tasks.dataset.readers import dump_tables
from tasks.dataset.readers.quarantine import Place, Quarantine
from tasks.dataset.sources import stack_exchange, stack_exchange_dump
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post, Unreadable


def iter_posts(
    path: Path, dropped: Counter[str] | None = None, quarantine: Quarantine | None = None
) -> Iterator[Post]:
    """Yield every post of a dump's blocks; count rows of other kinds and rows that cannot be read."""
    dropped = Counter() if dropped is None else dropped
    quarantine = quarantine or Quarantine()
    number = 0
    for block in dump_tables.iter_blocks(path):
        for post in stack_exchange_dump.read_posts(block):
            number += 1
            quarantine.rows += 1
            if isinstance(post, Post):
                yield post
            elif isinstance(post, Unreadable):
                quarantine(Place(block.file, number), post.reason)
            else:
                dropped[post] += 1


def build_questions(posts: Iterable[Post], dropped: Counter[str], *, site: str) -> Iterator[Question]:
    """Yield the questions of one site's posts, by number."""
    found = stack_exchange.build_questions(stack_exchange.to_columns(list(posts), site), dropped)
    for question in to_rows(found):
        answers = (answer._replace(text=to_markdown(answer.text)) for answer in question.answers)
        yield question._replace(answers=tuple(answers))
