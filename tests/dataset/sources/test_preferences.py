"""Tests of the rows of stack-exchange-preferences: in columns as one by one, and repeated questions."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dataset import columns
from tasks.dataset.curation.rules import Rules, apply_rules
from tasks.dataset.question import Question
from tasks.dataset.readers import columnar_files
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.sources import stack_exchange_sets
from tasks.dataset.sources.markdown import to_markdown
from tests.support.data_sets import as_rows, run_data_program

REPLY = pa.struct(
    {
        "answer_id": pa.int64(), "author": pa.string(), "author_profile": pa.string(), "selected": pa.bool_(),
        "pm_score": pa.int64(), "text": pa.string(),
    }.items()
)  # fmt: skip
PUBLISHED = pa.schema(
    {
        "qid": pa.int64(), "question": pa.string(), "answers": pa.list_(REPLY), "date": pa.string(),
        "metadata": pa.list_(pa.string()),
    }.items()
)  # fmt: skip
SITE = "https://unix.stackexchange.com"
words = st.sampled_from(["", "A", "<p>é</p>", "<p>Use <code>ls</code></p>"])
replies = st.fixed_dictionaries(
    {
        "answer_id": st.integers(0, 3), "author": words | st.none(), "author_profile": words | st.none(),
        "selected": st.booleans() | st.none(), "pm_score": st.integers(-1, 9), "text": words,
    }
)  # fmt: skip
links = st.lists(st.sampled_from([f"{SITE}/q/1", SITE, "http://[", "", None]), max_size=4)
good_rows = st.fixed_dictionaries(
    {
        "qid": st.integers(-5, 5), "question": words, "answers": st.lists(replies, max_size=4),
        "date": st.sampled_from(["2011/06/21", "", None]), "metadata": links | st.none(),
    }
)  # fmt: skip


def questions_of(*records: pa.RecordBatch, dropped: Counter[str] | None = None) -> list[Question]:
    """Return the questions of batches of records, with their answers in Markdown, as a partition has them."""
    counts = Counter[str]() if dropped is None else dropped
    questions = stack_exchange_sets.build_questions(pa.concat_batches(records), counts)
    return columns.to_rows(apply_rules(questions, Rules(), counts, Counter(), to_text=to_markdown))


def read(*fields: dict[str, Any], bad: Quarantine | None = None, split: str = "") -> pa.RecordBatch:
    """Return the records of rows that are read one by one."""
    rows = stack_exchange_sets.read_preferences(as_rows(*fields), bad or Quarantine())
    return stack_exchange_sets.to_questions(rows, split=split)


def build_row(page: int, *texts: str, **others: Any) -> dict[str, Any]:
    answers = [{"answer_id": n, "pm_score": n, "text": text} for n, text in enumerate(texts)]
    return {
        "qid": page,
        "question": f"q{page}",
        "answers": answers,
        "metadata": [f"{SITE}/q/{page}"],
    } | others


@given(st.lists(good_rows, max_size=5))
def test_columns_and_rows_give_the_same_questions(rows: list[dict[str, Any]]) -> None:
    in_columns = stack_exchange_sets.as_preferences(pa.RecordBatch.from_pylist(rows, PUBLISHED))
    assert in_columns is not None
    bad = Quarantine()
    assert stack_exchange_sets.to_questions(in_columns, split="").equals(read(*rows, bad=bad))
    assert not bad.reasons


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["question"], None),
        (["answers"], None),
        (["qid"], None),
        (["answers", 0], None),
        (["answers", 0, "answer_id"], None),
        (["answers", 0, "answer_id"], -1),
        (["answers", 0, "pm_score"], None),
        (["answers", 0, "pm_score"], 2**60 + 1),
        (["answers", 0, "text"], None),
    ],
    ids=str,
)
def test_rows_with_a_missing_value_are_read_one_by_one(path: list[Any], value: object) -> None:
    row: Any = build_row(1, "a", "b")
    *before, last = path
    inner = row
    for name in before:
        inner = inner[name]
    inner[last] = value
    batch = pa.RecordBatch.from_pylist([build_row(2, "c"), row], PUBLISHED)
    assert stack_exchange_sets.as_preferences(batch) is None
    assert stack_exchange_sets.as_preferences(batch.slice(0, 1)) is not None


def change(name: str, kind: pa.DataType) -> pa.Schema:
    """Return the published columns with another type for one of them, or of the answers' fields."""
    if name in PUBLISHED.names:
        return PUBLISHED.set(PUBLISHED.get_field_index(name), pa.field(name, kind))
    reply = pa.struct([(one.name, kind if one.name == name else one.type) for one in REPLY])
    return PUBLISHED.set(PUBLISHED.get_field_index("answers"), pa.field("answers", pa.list_(reply)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("answer_id", pa.float64()), ("answer_id", pa.string()), ("pm_score", pa.string()),
     ("selected", pa.int64()), ("question", pa.binary()), ("metadata", pa.string())],
)  # fmt: skip
def test_columns_of_other_types_are_not_cast(name: str, kind: pa.DataType) -> None:
    empty = pa.RecordBatch.from_pylist([], change(name, kind))
    assert stack_exchange_sets.as_preferences(empty) is None


def test_a_text_that_is_not_utf8_puts_its_row_aside(tmp_path: Path) -> None:
    rows = [build_row(n, f"first {n}", f"second {n}") for n in range(150)]
    batch = pa.RecordBatch.from_pylist(rows, PUBLISHED)
    texts = pa.array([row["question"].encode() for row in rows[:-1]] + [b"\xff"], pa.binary())
    view = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    pq.write_table(pa.table(batch).set_column(1, "question", view), tmp_path / "rows.parquet")
    _, card = run_data_program(
        tmp_path / "rows.parquet", tmp_path / "run", {"kind": "stack-exchange-preferences"}
    )
    assert (card["quarantined"], card["kept"]["questions"]) == (
        {"rows with a value that cannot be read": 1},
        149,
    )


def test_a_file_of_columns_gives_the_tables_of_its_rows_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar_files, "LARGE_BATCH", 50)
    rows = [build_row(n, f"first {n}", f"<b>second</b> {n}", date="2011/06/21") for n in range(300)]
    rows[120]["answers"] = None
    tables = []
    pq.write_table(pa.Table.from_pylist(rows, PUBLISHED), tmp_path / "rows.parquet", row_group_size=50)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("rows.parquet", "rows.jsonl"):
        artifact, card = run_data_program(
            tmp_path / name, tmp_path / f"run-{name}", {"kind": "stack-exchange-preferences"}
        )
        assert (card["read"], card["quarantined"]) == (
            {"rows": 300},
            {"rows without a question and answers": 1},
        )
        assert json.loads((artifact / "quarantine.jsonl").read_text())["row"] == 121
        tables.append([path.read_bytes() for path in sorted(artifact.glob("*.parquet"))])
    assert tables[0] == tables[1]


def test_a_published_preference_row_is_a_question_with_scored_answers() -> None:
    answers = [
        {
            "answer_id": 9,
            "pm_score": 3,
            "selected": True,
            "text": "<p>Use <code>ls</code></p>",
            "author": "A",
            "author_profile": "https://x/users/1",
        },
        {
            "answer_id": 7,
            "pm_score": -1,
            "selected": False,
            "text": "no",
            "author": "B",
            "author_profile": None,
        },
    ]
    page = "https://unix.stackexchange.com/questions/5"
    good = {
        "qid": 5,
        "question": "<p>How?</p>",
        "date": "2011/06/21",
        "metadata": [page, "https://unix.stackexchange.com", "u"],
        "answers": answers,
    }
    bad = Quarantine()
    broken = [good | {"answers": None}, good | {"question": 1}, good | {"answers": [{"answer_id": "x"}]}]
    (question,) = questions_of(read(good, *broken, bad=bad))
    assert (question.prompt, question.site, question.url, question.created) == (
        "How?",
        "unix.stackexchange.com",
        page,
        "2011-06-21",
    )
    assert [(a.id, a.score, a.accepted, a.text, a.author) for a in question.answers] == [
        (7, -1, False, "no", "B"),
        (9, 3, True, "Use `ls`", "https://x/users/1"),
    ]
    assert bad.reasons == {
        "rows without a question and answers": 2,
        "rows with an answer that cannot be read": 1,
    }


def test_an_address_that_is_none_is_no_reason_to_stop() -> None:
    answers = [{"answer_id": k, "pm_score": k, "text": "x"} for k in (1, 2)]
    fields = {"qid": 1, "question": "q", "answers": answers, "metadata": ["http://[", None, 5]}
    (question,) = questions_of(read(fields))
    assert (question.site, question.url) == ("stackexchange.com", "http://[")


@pytest.mark.parametrize("reverse", [False, True])
def test_of_a_question_in_two_files_one_is_kept_whatever_their_order(reverse: bool) -> None:
    html = read(build_row(1, "<p>b</p>", "c"), build_row(2, "x"))  # the smaller as HTML, not as Markdown
    plain = read(build_row(1, "a", "c"), split="evaluation")
    records: Sequence[pa.RecordBatch] = [html, plain] if reverse else [plain, html]
    dropped = Counter[str]()
    first, second = sorted(questions_of(*records, dropped=dropped), key=lambda question: question.url)
    assert [answer.text for answer in first.answers] == ["a", "c"]
    assert (first.split, second.split) == ("evaluation", "")
    assert dropped["repeated questions"] == 1


def test_a_test_sets_question_stays_one_if_the_other_copy_is_kept() -> None:
    records = read(build_row(1, "a")), read(build_row(1, "b"), split="evaluation")
    (question,) = questions_of(*records)
    assert ([answer.text for answer in question.answers], question.split) == (["a"], "evaluation")


def test_the_questions_of_a_test_file_are_for_evaluation(tmp_path: Path) -> None:
    files = {"reward": range(200), "evaluation": range(200, 260)}
    for name, pages in files.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        rows = [build_row(page, f"first {page}", f"second {page}") for page in pages]
        pq.write_table(pa.Table.from_pylist(rows, PUBLISHED), tmp_path / "in" / name / "0.parquet")
    artifact, _ = run_data_program(tmp_path / "in", tmp_path / "run", {"kind": "stack-exchange-preferences"})
    prompts = pq.read_table(artifact / "evaluation.parquet")["prompt"].to_pylist()
    assert sorted(prompts) == [f"q{page}" for page in files["evaluation"]]


def test_a_file_without_rows_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [build_row(n, f"first {n}", f"second {n}") for n in range(150)]
    for name, some in (("a", rows), ("b", [])):
        with pq.ParquetWriter(tmp_path / "in" / f"{name}.parquet", PUBLISHED) as writer:
            writer.write_table(pa.Table.from_pylist(some, PUBLISHED))
    _, card = run_data_program(tmp_path / "in", tmp_path / "run", {"kind": "stack-exchange-preferences"})
    assert card["kept"]["questions"] == 150
