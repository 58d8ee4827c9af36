"""Compare the data stage's columns with the same rules row by row (tests/support/questions/row_oracle.py)."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dataset import columns, ranking, sorted_files, tables
from tasks.dataset.columns import Questions, from_rows, select, to_rows
from tasks.dataset.curation import contamination, rules
from tasks.dataset.curation.question_files import SPLITS
from tasks.dataset.curation.rules import Rules
from tasks.dataset.question import Answer, Question
from tasks.dataset.sources import stack_exchange
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.dataset.statistics import Statistics
from tests.support.questions import row_oracle

SITES = ("a.example", "b.example")
DATES = ("", "2009-01-01", "2011-04-08", "2015-06-01T10:00:00.000", "2018-05-02", "2020-02-02")
BODIES = (
    "", "<p>x</p>", "<p>Mail jane.roe@gmail.com</p>", "<p>A longer text, é\u2009with a thin space.</p>",
    "<p>one two three four five six seven eight nine ten eleven twelve thirteen</p>", "<pre>  code\n</pre>",
    "plain", "<p></p>", "<p>Wie kann ich das Hinterrad meines Fahrrads reparieren?</p>",
)  # fmt: skip
TITLES = ("", "x", "How?", "An em\u2003space", "jane.roe@gmail.com")
NGRAMS = contamination.collect_ngrams(
    ["one two three four five six seven eight nine ten eleven twelve thirteen"]
)
ids = st.integers(1, 12) | st.sampled_from([2**62, 2**63 - 1])
posts = st.builds(
    Post,
    id=ids,
    parent=st.just(0) | ids,
    accepted=st.just(0) | ids,
    votes=st.integers(-3, 12) | st.sampled_from([2**31 - 1, -(2**31), 1023, 1024, 46340, 46341]),
    created=st.sampled_from(DATES),
    title=st.sampled_from(TITLES),
    body=st.sampled_from(BODIES),
    author_id=st.sampled_from(["", "7", "-1"]),
    author_name=st.sampled_from(["", "Zoë"]),
    licence=st.sampled_from(["", "CC BY-SA 2.5"]),
)
answers = st.builds(
    Answer,
    id=st.integers(0, 2**63 - 1),
    score=st.sampled_from([-1.0, 0.0, 0.5, 2.0, 1e300]),
    votes=st.sampled_from([0, 0, 3, -2]),
    accepted=st.booleans(),
    created=st.sampled_from(DATES),
    text=st.sampled_from(BODIES),
    url=st.just(""),
    author=st.sampled_from(["", "ann"]),
    licence=st.sampled_from(["", "MIT"]),
    author_name=st.just("Ann"),
)
all_rules = st.builds(
    Rules,
    min_answer_chars=st.sampled_from([1, 5]),
    max_answer_chars=st.sampled_from([20, 2**31]),
    max_prompt_chars=st.sampled_from([10, 2**31]),
    personal=st.sampled_from(["keep", "mask", "drop"]),
    languages=st.sampled_from([(), ("en",)]),
    evaluation_ngrams=st.sampled_from([None, NGRAMS]),
)


@st.composite
def questions_of_rows(draw: st.DrawFn) -> list[Question]:
    """Draw questions by id with answers by id, some of which the source compares itself."""
    found = []
    for number in sorted(draw(st.sets(st.integers(1, 30) | st.just(2**63 - 1), max_size=6))):
        written = sorted(draw(st.lists(answers, max_size=7, unique_by=lambda answer: answer.id)))
        every = [(i, j) for i in range(len(written)) for j in range(len(written)) if i != j]
        compared = draw(st.none() | st.lists(st.sampled_from(every), unique=True)) if every else None
        found.append(
            Question(
                id=number,
                prompt=draw(st.sampled_from(BODIES)),
                created="",
                site=draw(st.sampled_from(SITES)),
                url="",
                author="",
                licence=draw(st.sampled_from(["MIT", "CC0"])),
                answers=tuple(written),
                compared=None if compared is None else tuple(sorted(compared)),
                split=draw(st.sampled_from(["", "evaluation"])),
                messages=draw(st.sampled_from([(), (("system", "Be kind."), ("user", "Ask ann@mail.de"))])),
            )
        )
    return found


def without_zeros(counts: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


def check_tables(kept: Questions, rows: Sequence[Question], max_pairs: int, seed: int) -> None:
    """Compare every table and the statistics of questions in columns with those of the same rows."""
    statistics = Statistics()
    expected: dict[str, list[dict[str, Any]]] = {name: [] for name in tables.COLUMNS}
    splits = [1 + question.id % 4 for question in rows]
    for question, split in zip(rows, splits, strict=True):
        pairs = row_oracle.draw_pairs(question, max_pairs=max_pairs, seed=seed)
        num_pairs = row_oracle.count_pairs(question)
        row_oracle.count(statistics, question, pairs, num_pairs)
        for name, row in row_oracle.build_rows(question, SPLITS[split], pairs, num_pairs):
            expected[name].append(row)
    drawn = ranking.draw_pairs(kept, max_pairs=max_pairs, seed=seed)
    found = Statistics.of(kept, *drawn)
    assert without_zeros(found.counts) == without_zeros(statistics.counts)
    found.counts = statistics.counts
    assert found == statistics
    for number, split in enumerate(SPLITS[1:], 1):
        chosen = select(kept, np.array(splits, dtype=int) == number)
        pairs_of_split = ranking.draw_pairs(chosen, max_pairs=max_pairs, seed=seed)
        for name, table in tables.build_tables(chosen, split, *pairs_of_split).items():
            assert pa.table(table).to_pylist() == expected[name], name


@pytest.mark.slow
@given(
    st.lists(st.lists(st.tuples(posts, st.sampled_from(SITES)), max_size=30), max_size=4),
    st.booleans(),
    all_rules,
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_posts_in_columns_become_the_rows_that_they_become_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    blocks: list[list[tuple[Post, str]]],
    several_sites: bool,
    active: Rules,
    max_pairs: int,
    size: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("posts")
    sites = SITES if several_sites else SITES[:1]
    paths, numbered = [], []
    for number, block in enumerate(blocks):
        for site in sites:
            of_site = [post for post, post_site in block if post_site == site or not several_sites]
            paths.append(folder / f"{number}{site}.arrow")
            batch = stack_exchange.to_columns(of_site, site, several_sites=several_sites)
            sorted_files.write(batch, paths[-1])
            numbered += [row_oracle.number_post(post, site, several_sites=several_sites) for post in of_site]
    dropped, masked, expected_dropped, expected_masked = Counter(), Counter(), Counter(), Counter()
    every = list(row_oracle.build_questions(numbered, expected_dropped))
    expected_dropped["questions without answers"] = sum(not question.answers for question in every)
    expected = [
        kept
        for question in every
        if question.answers
        and (kept := row_oracle.apply_rules(question, active, expected_dropped, expected_masked))
    ]
    rows: list[Question] = []
    for slices in sorted_files.partition(paths, size, 1000):
        questions = stack_exchange.build_questions(sorted_files.read(slices), dropped)
        kept = rules.apply_rules(questions, active, dropped, masked, to_text=to_markdown)
        columns.write(kept, folder / "questions.arrow")
        kept = columns.read(folder / "questions.arrow")
        of_range = to_rows(kept)
        check_tables(kept, of_range, max_pairs, seed)
        rows += of_range
    assert rows == expected
    assert without_zeros(dropped) == without_zeros(expected_dropped)
    assert masked == expected_masked


@pytest.mark.slow
@given(questions_of_rows(), all_rules, st.integers(1, 12), st.integers(0, 3))
def test_rows_in_columns_become_the_rows_that_they_become_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Question],
    active: Rules,
    max_pairs: int,
    seed: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.arrow"
    assert to_rows(from_rows(rows)) == rows
    dropped, masked, expected_dropped, expected_masked = Counter(), Counter(), Counter(), Counter()
    kept = rules.apply_rules(from_rows(rows), active, dropped, masked)
    every = [row_oracle.apply_rules(question, active, expected_dropped, expected_masked) for question in rows]
    expected = [question for question in every if question]
    columns.write(kept, path)
    assert to_rows(columns.read(path)) == to_rows(kept) == expected
    assert without_zeros(dropped) == without_zeros(expected_dropped)
    assert masked == expected_masked
    check_tables(columns.read(path), expected, max_pairs, seed)


def test_scores_are_those_of_the_formula_for_every_number_of_votes() -> None:
    rng = random.Random(0)
    borders = [round(2 ** (k + 0.5)) + step for k in range(31) for step in range(-3, 4)]
    votes = [*range(-5, 3000), *borders, *(rng.randrange(2**31) for _ in range(2000)), 2**31 - 1, -(2**31)]
    votes = [number for number in votes if number < 2**31]
    accepted = [bool(number % 2) for number in votes]
    found = stack_exchange.score_answers(np.array(votes), np.array(accepted)).tolist()
    assert found == [row_oracle.score_answer(*one) for one in zip(votes, accepted, strict=True)]


@pytest.mark.parametrize("is_nested", [False, True])
def test_ranges_are_cut_by_bytes_as_well_as_by_records(tmp_path: Path, is_nested: bool) -> None:
    texts = pa.array(["x" * 500] * 8192, pa.large_string())
    answers = pa.StructArray.from_arrays([texts], names=["text"])
    lists = pa.LargeListArray.from_arrays(np.arange(0, 8193, 2), answers)
    plain = pa.array(["x" * 1000] * 4096, pa.large_string())
    records = pa.RecordBatch.from_pydict({"key": range(4096), "text": lists if is_nested else plain})
    sorted_files.write(records, tmp_path / "a.arrow")
    by_bytes = sorted_files.partition([tmp_path / "a.arrow"], 2**20, 512_000)
    by_records = sorted_files.partition([tmp_path / "a.arrow"], 512, 2**30)
    for ranges in (by_bytes, by_records):
        assert 7 <= len(ranges) <= 9
        assert sum(one.end - one.start for (one,) in ranges) == 4096
