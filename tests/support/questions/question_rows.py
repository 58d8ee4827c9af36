"""Call the data stage's functions of columns with one question, for tests of a rule."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.dataset import columns, ranking, tables
from tasks.dataset.columns import Questions, from_rows, to_rows
from tasks.dataset.curation import rules
from tasks.dataset.curation.rules import Rules
from tasks.dataset.question import Answer, Pair, Question
from tasks.dataset.sources import stack_exchange
from tasks.dataset.sources.stack_exchange_dump import Post


def draw_pairs(question: Question, *, max_pairs: int, seed: int) -> list[Pair]:
    """Return a question's comparisons as indices of its answers."""
    pairs, _ = ranking.draw_pairs(from_rows([question]), max_pairs=max_pairs, seed=seed)
    return [(better, worse) for better, worse in pairs.tolist()]


def draw_comparisons(scores: Sequence[float], *, max_pairs: int, seed: int, question_id: int) -> list[Pair]:
    """Return the comparisons between answers with these scores."""
    answers = tuple(Answer(n, score, 0, False, "", "", "", "", "") for n, score in enumerate(scores))
    question = Question(question_id, "", "", "", "", "", "", answers)
    return draw_pairs(question, max_pairs=max_pairs, seed=seed)


def count_pairs(question: Question) -> int:
    return int(ranking.count_pairs(from_rows([question]))[0])


def ranks(answers: Sequence[Answer]) -> list[int]:
    found: list[int] = ranking.rank_scores(_holding(answers)).tolist()
    return found


def index_of_best(answers: Sequence[Answer]) -> int:
    return int(ranking.order_by_preference(_holding(answers))[0])


def _holding(answers: Sequence[Answer]) -> Questions:
    return from_rows([Question(1, "", "", "", "", "", "", tuple(answers))])


def drop_unusable_answers(question: Question, dropped: Counter[str], **chars: int) -> Question | None:
    """Return the question as it is kept, or None; reasons that are counted 0 times are left out."""
    kept = _first(rules.drop_unusable_answers(from_rows([question]), dropped, **chars))
    dropped += Counter()
    return kept


def apply_rules(
    question: Question, active: Rules, dropped: Counter[str], masked: Counter[str]
) -> Question | None:
    """Return the question as it is kept, or None."""
    return _first(rules.apply_rules(from_rows([question]), active, dropped, masked))


def _first(questions: Questions) -> Question | None:
    return next(iter(to_rows(questions)), None)


def build_rows(
    question: Question, split: str, pairs: Sequence[Pair], sampled_of: int
) -> list[tuple[str, dict[str, Any]]]:
    """Return (table, row) for every row that a question of this split adds to a table."""
    drawn = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    found = tables.build_tables(columns.from_rows([question]), split, drawn, np.array([sampled_of]))
    return [(name, row) for name, table in found.items() for row in pa.table(table).to_pylist()]


def author_url(post: Post, site: str) -> str:
    return str(stack_exchange.author_urls(stack_exchange.to_columns([post], site))[0])


def choose_licence(post: Post) -> str:
    return str(stack_exchange.choose_licences(stack_exchange.to_columns([post], "a.example"))[0])
