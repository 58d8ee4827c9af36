"""Test how labels are read from files, and how they decide pairs."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.programs.rounds.choose_pairs import pair_id
from tasks.programs.rounds.decided_pairs import decide, last_of_each, most_common
from tasks.programs.rounds.label_rows import LabelRow, read_label_file
from tasks.programs.rounds.raters import code_labels, describe_raters, measure_agreement, warnings_of
from tasks.system.errors import InputError
from tests.programs.rounds.rows import asked


def label(pair: str, verdict: str, rater: str = "ann", **more: Any) -> LabelRow:
    return LabelRow(f"{pair} {rater} {more.get('time', '')}", pair, verdict, rater, "people", **more)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_name_pairs_by_id_or_by_their_texts_on_either_side(tmp_path: Path) -> None:
    texts = {"prompt": "question 1", "first": "x one", "second": "x two"}
    by_text = asked(pair_id(*texts.values())) | texts
    other = asked("b")
    turned = texts | {"first": texts["second"], "second": texts["first"]}
    rows = [
        {"pair_id": "b", "verdict": "tie", "rater": "ann", "seconds": 3, "shown_first": "second"},
        texts | {"verdict": "first", "rater": "ben"},
        turned | {"verdict": "first", "rater": "cleo"},
        turned | {"verdict": "both_bad", "rater": "dan"},
        {"pair_id": "elsewhere", "verdict": "first", "rater": "ann"},
    ]
    found, others = read_label_file(write(tmp_path / "l.jsonl", *rows), [by_text, other], source="file")
    assert [(one.rater, one.verdict) for one in found] == [
        ("ann", "tie"), ("ben", "first"), ("cleo", "second"), ("dan", "both_bad"),
    ]  # fmt: skip
    assert others == 1
    assert [one.shown_first for one in found[1:]] == ["first", "second", "second"]
    assert (found[0].seconds, found[0].shown_first, found[0].source) == (3.0, "second", "file")
    assert len({one.label_id for one in found}) == 4
    names = {name for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    assert read_label_file(tmp_path / "l.parquet", [by_text, other], source="file") == (found, 1)


def test_withdrawn_labels_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"label_id": "1", "pair_id": "a", "verdict": "first", "rater": "ann"},
        {"label_id": "2", "pair_id": "b", "verdict": "first", "rater": "ann"},
        {"label_id": "1", "withdrawn": True, "why": "slipped", "rater": "ann"},
    ]
    path = write(tmp_path / "l.jsonl", *rows)
    found, _ = read_label_file(path, [asked("a"), asked("b")], source="people")
    assert [one.label_id for one in found] == ["2"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"pair_id": "a", "verdict": "left", "rater": "ann"}, "Row 1 .* verdict 'left'"),
        ({"pair_id": "a", "verdict": "first"}, "Row 1 .* no rater"),
        ({"prompt": "q", "first": "a", "verdict": "first", "rater": "ann"}, "Row 1 .* names no pair"),
        ({"pair_id": "a", "verdict": "tie", "rater": "ann", "seconds": "fast"}, "Row 1 .* seconds"),
        ({"pair_id": "a", "verdict": "tie", "rater": "ann", "shown_first": "left"}, "Row 1 .* shown_first"),
        (["first"], "Line 1 .* no JSON object"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_by_its_number(tmp_path: Path, row: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_label_file(write(tmp_path / "l.jsonl", row), [asked("a")], source="file")
    (tmp_path / "torn").write_text('{"pair_id": ')
    with pytest.raises(InputError, match="Line 1"):
        read_label_file(tmp_path / "torn", [asked("a")], source="file")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("first", "first"),
        ("first second first", "first"),
        ("first second", "split"),
        ("second skip", "second"),
        ("skip skip", "skip"),
        ("first tie tie", "tie"),
        ("first tie", "split"),
        ("both_bad both_bad second", "both_bad"),
    ],
)
def test_the_most_common_verdict_counts(verdicts: str, expected: str) -> None:
    given = [label("a", verdict, f"rater {n}") for n, verdict in enumerate(verdicts.split())]
    assert most_common(given) == most_common(given[::-1]) == expected


def test_pairs_are_decided_and_others_counted_by_kind() -> None:
    pairs = [asked(name, question=number) for number, name in enumerate("abcdef")]
    labels = [
        label("a", "first"), label("b", "second"), label("c", "tie"), label("d", "both_bad"),
        label("e", "skip"), label("b", "second", "ben"),
    ]  # fmt: skip
    decided = decide(labels, pairs[::-1], 0.0)
    assert [(row["question_id"], row["chosen"], row["rejected"]) for row in decided.comparisons] == [
        (0, "a one", "a two"), (1, "b two", "b one"),
    ]  # fmt: skip
    assert decided.comparisons[1]["raters"] == ["ann", "ben"]
    assert decided.comparisons[1]["label_ids"] == ["b ann ", "b ben "]
    assert (decided.comparisons[0]["gap"], decided.comparisons[0]["origin"]) == (1.0, "people")
    assert decided.counts == {"first": 1, "second": 1, "tie": 1, "both_bad": 1, "skip": 1}


def test_a_rater_has_one_label_of_a_pair_the_last() -> None:
    labels = [label("a", "first", time="2026-01-02"), label("a", "second", time="2026-01-01")]
    assert [one.verdict for one in last_of_each(labels)] == ["first"]
    assert decide(labels, [asked("a")], 0.0).comparisons[0]["chosen"] == "a one"


def test_gold_questions_flag_a_rater_who_guesses_and_are_no_comparisons() -> None:
    gold = [asked(f"g{n}", known=("first", "second")[n % 2]) for n in range(20)]
    pairs = [asked(name) for name in "abc"]
    labels = [label(pair["pair_id"], pair["known"], "good") for pair in gold]
    labels += [label(pair["pair_id"], "first", "clicker") for pair in gold]  # right in half
    labels += [label("a", "first", "good"), label("a", "second", "clicker"), label("b", "first", "clicker")]
    decided = decide(labels, gold + pairs, 0.8)
    assert {one.name: one.flagged for one in decided.raters} == {"good": False, "clicker": True}
    assert [(row["pair_id"], row["chosen"]) for row in decided.comparisons] == [("a", "a one")]
    lenient = decide(labels, gold + pairs, 0.5)  # the interval of 10 of 20 reaches above one half
    assert not any(one.flagged for one in lenient.raters)
    assert [row["pair_id"] for row in lenient.comparisons] == ["b"]
    (warning,) = [text for text in warnings_of(decided.raters) if "left out" in text]
    assert warning == "The labels of clicker are left out: of 20 gold questions 50% were answered right."


def test_a_rater_is_not_flagged_by_a_few_mistakes() -> None:
    gold = [asked(f"g{n}", known="first") for n in range(3)]
    labels = [label(pair["pair_id"], "second", "unlucky") for pair in gold[:1]]
    assert not decide(labels, gold, 0.7).raters[0].flagged


def test_habits_are_warned_of() -> None:
    left = [label(f"p{n}", "second", "lefty", shown_first="second", seconds=2.0) for n in range(30)]
    fast = [
        label(f"p{n}", ("first", "second")[n % 2], "hasty", shown_first="first", seconds=0.4)
        for n in range(30)
    ]
    fair = [
        label(f"p{n}", ("first", "second")[n % 2], "fair", shown_first="first", seconds=4.0)
        for n in range(30)
    ]
    assert warnings_of(describe_raters([*left, *fast, *fair], {}, least_right=0.0)) == [
        "hasty takes 0.4 s for a label (median): too short to read.",
        "lefty prefers the answer on the left in 100% of 30 labels.",
    ]
    assert warnings_of(describe_raters(left[:10], {}, least_right=0.0)) == []


def test_agreement_is_of_raters_with_pairs_in_common() -> None:
    labels = [
        label(name, verdict, "ann") for name, verdict in zip("abcd", ["first", "second"] * 2, strict=True)
    ]
    alone = measure_agreement(labels)
    assert alone == {}
    labels += [label(one.pair_id, one.verdict, "ben") for one in labels[:3]]
    labels += [label("a", "skip", "cleo")]
    assert code_labels(labels).tolist() == [[0, 1, 0, 1], [0, 1, 0, -1], [-1, -1, -1, -1]]
    found = measure_agreement(labels)
    assert (found["alpha"].value, found["alpha"].n) == (1.0, 3)
    assert (found["kappa"].value, found["kappa"].n) == (1.0, 3)
