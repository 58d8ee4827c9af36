"""Test sources other than dumps: rows of files, the questions made of them, and the data program on each
kind.
"""

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tasks.artifacts.artifact import Step, user_artifact
from tasks.artifacts.corpus import evaluation_sets, find_corpus
from tasks.config.jobs import DataJob
from tasks.config.pipeline import Pipeline
from tasks.config.sections.sources import OwnRows, Source
from tasks.dataset.question import comparison_levels, text_id
from tasks.dataset.readers import json_rows
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.row_files import Place, read_rows
from tasks.dataset.sources import hh_rlhf, own_rows, stack_exchange_sets
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.splits import normalise_words
from tasks.dataset.tables import COLUMNS
from tasks.system.errors import InputError
from tests.support.data_sets import (
    as_rows,
    chat_message,
    questions_of,
    read_all,
    read_table,
    run_data_program,
)
from tests.support.paths import SHARED
from tests.support.questions.question_rows import draw_pairs
from tests.support.split_assignments import assign_splits

DATA = SHARED / "data"
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real data of shared/data is not on this machine"
)


# ------------------------------------------------------------------------------------ rows of files

FIELDS = [{"prompt": f"p{n}", "n": n, "text": "ü\n\"'" * n} for n in range(300)]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", 64)  # elements end within, between and at the ends of chunks
    path = tmp_path / f"data.{form}"
    lines = "\n".join(map(json.dumps, FIELDS)) if "jsonl" in form else json.dumps(FIELDS, indent=1)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(FIELDS), path)
    else:
        path.write_bytes(
            gzip.compress(lines.encode()) if form.endswith("gz") else b"\xef\xbb\xbf" + lines.encode()
        )
    found, bad = read_all(path)
    assert [row.fields for row in found] == FIELDS
    assert [row.place for row in found] == [Place(path.name, number) for number in range(1, 301)]
    assert (bad.rows, bad.reasons) == (300, {})


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b/train.jsonl", "a/test.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"from": name}))
    (tmp_path / "README.md").write_text("not data")
    found, _ = read_all(tmp_path)
    assert [row.place.file for row in found] == ["a/test.jsonl", "b/train.jsonl"]


def test_bad_rows_are_told_with_their_place_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW", 100)
    path = tmp_path / "f.jsonl"
    good = b'{"a": 1}\n'
    deep = b"[" * 90 + b"\n"
    path.write_bytes(
        good
        + b"{broken\n"
        + good
        + b"\n"
        + b"[1]\n"
        + b'{"a": "\xff"}\n'
        + b'{"a": "'
        + b"x" * 500
        + b'"}\n'
        + deep
        + b"null\n"
        + good
    )
    with Quarantine(tmp_path / "q.jsonl") as bad:
        found = list(read_rows(path, bad))
    assert [row.place.row for row in found] == [1, 3, 9]
    assert bad.reasons == {
        "rows that are not JSON": 3,
        "rows that are no objects": 2,
        "rows that are too long": 1,
    }
    assert json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0]) == {
        "file": "f.jsonl",
        "row": 2,
        "reason": "rows that are not JSON",
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"<posts/>", "another format"),
        (b"prompt,chosen\n", "another format"),
        (b'[{"a": 1}, {"a"', "damaged or truncated JSON list"),
        (b'[{"a": 1}, oops]', "damaged or truncated JSON list"),
        (b'[{"a": "\xff"}]', "not a JSON list in UTF-8"),
        (b"[" * 100_000, "JSON list"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "damaged or truncated gzip"),
        (b"\x1f\x8b\x08garbage", "damaged or truncated gzip"),
        (b"PAR1garbagePAR1", "damaged or truncated"),
    ],
)
def test_what_is_no_set_of_rows_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        read_all(path)
    assert len(str(refused.value).splitlines()) == 1


def test_places_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_all(tmp_path / "none")
    with pytest.raises(InputError, match="holds no file"):
        read_all(tmp_path)


# ------------------------------------------------------------------------- comparisons to questions


@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda pair: pair[0] != pair[1])))
def test_the_better_answer_always_stands_higher_and_only_circles_are_given_back(
    pairs: set[tuple[int, int]],
) -> None:
    heights, contradicting = comparison_levels(pairs)
    assert contradicting <= pairs
    assert all(heights[better] > heights[worse] for better, worse in pairs - contradicting)
    assert comparison_levels(pairs - contradicting)[1] == set()

    def reaches(start: int, end: int) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            waiting += [worse for better, worse in pairs if better == node and worse not in seen]
            seen |= {worse for better, worse in pairs if better == node}
        return end in seen

    assert all(reaches(worse, better) for better, worse in contradicting), (
        "a pair that is in no circle was given back"
    )


def test_the_order_of_rows_changes_nothing() -> None:
    fields = [
        {"prompt": f"p{n % 5}", "chosen": f"a{n % 7}", "rejected": f"a{(n + 1) % 7}"} for n in range(35)
    ]
    fields += [{"prompt": f"q{n}", "responses": ["x", "y", "z"], "scores": [n, 2, 1.5]} for n in range(5)]
    shuffled = random.Random(1).sample(fields, len(fields))
    one, other = (
        questions_of(
            own_rows.group_rows(as_rows(*some), Quarantine(), own_rows.Columns(), site="s", licence="")
        )
        for some in (fields, shuffled)
    )
    assert one == other
    assert [q.id for q in one] == sorted(q.id for q in one)


def test_comparisons_are_kept_as_they_were_made() -> None:
    found = AnswerGroups("s", "MIT")
    for better, worse in (("a", "b"), ("b", "c"), ("a", "b"), ("d", "e"), ("e", "d")):
        found.add_comparison("p", better, worse)
    dropped: Counter[str] = Counter()
    (question,) = found.questions(dropped)
    texts = [answer.text for answer in question.answers]
    assert {(texts[i], texts[j]) for i, j in draw_pairs(question, max_pairs=10, seed=0)} == {
        ("a", "b"),
        ("b", "c"),
    }  # nobody compared a and c
    assert {answer.text: answer.score for answer in question.answers} == {
        "a": 2,
        "b": 1,
        "c": 0,
        "d": 0,
        "e": 0,
    }
    assert dropped == {"comparisons that contradict each other": 2}
    assert len(draw_pairs(question, max_pairs=1, seed=0)) == 1


def test_what_a_source_calls_a_test_set_is_evaluated_on_alone() -> None:
    prompts = [(n, f"question {n}") for n in range(1000)] + [(2000, "Question 5!")]
    shares = {"finetune": 0.4, "reward": 0.3, "rl": 0.2, "evaluation": 0.1}
    splits = assign_splits(prompts, shares, dict.fromkeys([7, 8, 2000], "evaluation"))
    assert [n for (n, _), split in zip(prompts, splits, strict=True) if split == "evaluation"] == [
        5,
        7,
        8,
        2000,
    ]  # 5 has the text of 2000
    counts = Counter(splits)
    assert counts["finetune"] == pytest.approx(444, abs=50)


# ------------------------------------------------------------------------------------ kinds of rows

DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {}\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("chosen", "rejected", "one_turn", "expected"),
    [
        ("\n\nHuman: q\n\nAssistant: good ", "\n\nHuman: q\n\nAssistant: bad", True, ("q", "good", "bad")),
        (
            DIALOGUE.format("q", "good"),
            DIALOGUE.format("q", "bad"),
            False,
            ("Human: hi\n\nAssistant: hello\n\nHuman: q", "good", "bad"),
        ),
        (DIALOGUE.format("q", "good"), DIALOGUE.format("q", "bad"), True, hh_rlhf.SEVERAL_TURNS),
        (DIALOGUE.format("q", "good"), DIALOGUE.format("r", "bad"), False, hh_rlhf.SIDES_DIFFER),
        (DIALOGUE.format("q", "good"), "\n\nHuman: hi\n\nAssistant: bad", False, hh_rlhf.SIDES_DIFFER),
        ("\n\nHuman: q\n\nAssistant: same", "\n\nHuman: q\n\nAssistant:  same", True, hh_rlhf.EQUAL_ANSWERS),
        ("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: bad", True, "rows with an empty side"),
        (
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: b",
            "\n\nHuman: q\n\nAssistant: bad",
            True,
            "rows that are no dialogue",
        ),
        ("q", "r", True, "rows that are no dialogue"),
        ("q", None, True, "rows without two dialogues"),
    ],
)
def test_dialogues_are_parted_before_the_last_answer(
    chosen: object, rejected: object, one_turn: bool, expected: object
) -> None:
    assert hh_rlhf.split_dialogues(chosen, rejected, one_turn=one_turn) == expected


@pytest.mark.parametrize(
    ("fields", "prompt", "pairs"),
    [
        ({"prompt": " p ", "chosen": "good", "rejected": "bad"}, "p", {("good", "bad")}),
        (
            {
                "prompt": [chat_message("user", "p")],
                "chosen": [chat_message("assistant", "good")],
                "rejected": [chat_message("assistant", "bad")],
            },
            "p",
            {("good", "bad")},
        ),
        (
            {
                "chosen": [chat_message("user", "p"), chat_message("assistant", "good")],
                "rejected": [chat_message("user", "p"), chat_message("assistant", "bad")],
            },
            "p",
            {("good", "bad")},
        ),
        (
            {
                "prompt": [chat_message("system", "s"), chat_message("user", "p")],
                "chosen": "good",
                "rejected": "bad",
            },
            "System: s\n\nHuman: p",
            {("good", "bad")},
        ),
        ({"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3.5, 1]}, "p", {("b", "a"), ("b", "c")}),
        ({"prompt": "p", "completion": "a"}, "p", set()),
    ],
)
def test_own_rows_of_every_form(fields: dict[str, Any], prompt: str, pairs: set[tuple[str, str]]) -> None:
    bad = Quarantine()
    (question,) = questions_of(
        own_rows.group_rows(as_rows(fields), bad, own_rows.Columns(), site="mine", licence="CC0")
    )
    assert bad.reasons == {}
    assert (question.prompt, question.id, question.site, question.licence) == (
        prompt,
        text_id(prompt),
        "mine",
        "CC0",
    )
    texts = [answer.text for answer in question.answers]
    assert {(texts[i], texts[j]) for i, j in draw_pairs(question, max_pairs=10, seed=0)} == pairs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "without a comparison"),
        ({"prompt": "p"}, "without a comparison"),
        ({"prompt": "p", "chosen": "x"}, "without a comparison"),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "without a comparison"),
        ({"chosen": "x", "rejected": "y"}, "without a prompt"),
        ({"prompt": "p", "chosen": "x", "rejected": " x"}, "answers are equal"),
        ({"prompt": "p", "chosen": " ", "rejected": "x"}, "an empty side"),
        ({"prompt": 3, "chosen": "y", "rejected": "x"}, "neither a text nor messages"),
        (
            {"prompt": "p", "chosen": [chat_message("user", "y")], "rejected": "x"},
            "does not end in an answer",
        ),
        ({"prompt": "p", "chosen": [chat_message("robot", "y")], "rejected": "x"}, "but 'robot'"),
        ({"prompt": "p", "chosen": [{"role": ["x"], "content": "y"}], "rejected": "x"}, "lacks its role"),
        ({"prompt": "p", "responses": ["a"], "scores": [1, 2]}, "not lists of one length"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "a score that is no number"),
        ({"prompt": "p", "responses": ["a", 5], "scores": [1, 2]}, "neither a text nor messages"),
    ],
)
def test_own_rows_that_cannot_be_used_leave_nothing_behind(fields: dict[str, Any], words: str) -> None:
    bad = Quarantine()
    assert (
        questions_of(own_rows.group_rows(as_rows(fields), bad, own_rows.Columns(), site="", licence="")) == []
    )
    ((reason, count),) = bad.reasons.items()
    assert words in reason
    assert count == 1


# ---------------------------------------------------------------------------------- the whole stage


@real_data
@pytest.mark.parametrize("turns", ["single", "all"])
def test_the_hh_sample_is_counted_to_the_last_row(tmp_path: Path, turns: str) -> None:
    path = DATA / "hh-rlhf" / "harmless-base-dev.jsonl.gz"
    _, card = run_data_program(path, tmp_path / "run", {"kind": "hh-rlhf", "turns": turns})
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    same = [
        row
        for row in raw
        if row["chosen"].rpartition("\n\nAssistant:")[0] == row["rejected"].rpartition("\n\nAssistant:")[0]
    ]
    assert card["read"] == {"rows": 1800}
    assert card["dropped"].get(hh_rlhf.SIDES_DIFFER, 0) == 1800 - len(same) > 0
    left_out = sum(count for reason, count in card["dropped"].items() if reason in hh_rlhf.RULES) + sum(
        card["quarantined"].values()
    )
    seen = card["kept"]["pairs"] + card["dropped"].get("comparisons that contradict each other", 0) + left_out
    assert 1800 - seen <= 20, "rows that repeat a comparison"
    if turns == "single":
        expected = [
            row
            for row in same
            if row["chosen"].count("\n\nHuman:") == 1 and row["chosen"].count("\n\nAssistant:") == 1
        ]
        assert card["kept"]["pairs"] == pytest.approx(len(expected), abs=10)
    assert card["sites"] == {"hh-rlhf": card["kept"]["questions"]}
    assert card["older_wins"] is None


@real_data
def test_the_articles_own_format_loads(tmp_path: Path) -> None:
    path = DATA / "stackexchange" / "stack_exchange_paired_tiny.json"
    shares = {"finetune_share": 0.3, "reward_share": 0.4, "rl_share": 0.1}
    bad = Quarantine()
    questions = questions_of(stack_exchange_sets.group_pairs(read_rows(path, bad), bad))
    assert bad.reasons == {}
    assert len(questions) == 8
    raw = json.loads(path.read_text())
    made = {(q.prompt, q.answers[i].text, q.answers[j].text) for q in questions for i, j in q.compared or ()}
    assert made == {
        tuple(row[name].strip() for name in ("question", "response_j", "response_k")) for row in raw
    }
    _, card = run_data_program(path, tmp_path / "run", {"kind": "stack-exchange-paired"}, **shares)
    assert (card["read"], card["kept"]["questions"], card["kept"]["pairs"]) == ({"rows": 25}, 8, 25)


@real_data
@pytest.mark.parametrize(
    ("name", "questions"), [("ai/Posts.xml", 421), ("stackoverflow-2008/Posts.xml", 173)]
)
def test_other_dumps_load(tmp_path: Path, name: str, questions: int) -> None:
    _, card = run_data_program(DATA / "stackexchange" / name, tmp_path / "run", {"kind": "stack-exchange"})
    assert card["read"]["questions"] == questions


def comparisons(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"question number {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(count)
    ]


def test_own_comparisons_fill_every_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"q": row["prompt"], "yes": row["chosen"], "no": row["rejected"]})
            for row in comparisons(200)
        )
    )
    source = {
        "kind": "own",
        "prompt": "q",
        "chosen": "yes",
        "rejected": "no",
        "site": "our help desk",
        "licence": "internal",
    }
    artifact, _ = run_data_program(path, tmp_path / "run", source)
    tables = {name: read_table(artifact, name) for name in COLUMNS}
    assert all(tables.values())
    assert all(row["answer"].startswith("good") for row in tables["finetune"])
    assert all(
        row["chosen"].startswith("good") and row["chosen_score"] > row["rejected_score"]
        for row in tables["reward"]
    )
    assert all(row["answers"][row["best"]].startswith("good") for row in tables["evaluation"])
    assert {row["site"] for row in tables["rl"]} == {"our help desk"}
    texts = [
        {normalise_words(row["prompt"]) for row in tables[name]}
        for name in ("finetune", "reward", "rl", "evaluation")
    ]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert (artifact / "quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("names", [["test.jsonl"], ["test.jsonl", "train.jsonl"]])
def test_a_test_file_is_evaluated_on_unless_it_is_all_there_is(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        lines = [
            {side: f"\n\nHuman: {name} {n}?\n\nAssistant: {side} {n}" for side in ("chosen", "rejected")}
            for n in range(100)
        ]
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
    artifact, card = run_data_program(
        folder if len(names) > 1 else folder / names[0], tmp_path / "run", {"kind": "hh-rlhf"}
    )
    assert all(card["split_questions"].values())
    if len(names) > 1:
        assert card["split_questions"]["evaluation"] == 100
        assert all(row["prompt"].startswith("test") for row in read_table(artifact, "evaluation"))


def test_too_many_bad_rows_are_refused_and_few_are_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([*map(json.dumps, comparisons(190)), *["{broken"] * 8]))
    artifact, card = run_data_program(path, tmp_path / "few", {"kind": "own"})
    assert card["quarantined"] == {"rows that are not JSON": 8}
    assert len((artifact / "quarantine.jsonl").read_text().splitlines()) == 8
    with pytest.raises(
        InputError,
        match=(
            r"8 of 198 rows of .* cannot be used \(8 rows that are not JSON; the first: mine.jsonl, row "
            r"191\)"
        ),
    ):
        run_data_program(path, tmp_path / "many", {"kind": "own"}, max_bad_share=0.01)
    path.write_text("\n".join(json.dumps({"question": "q", "a": 1}) for _ in range(20)))
    with pytest.raises(InputError, match="name its columns in source"):
        run_data_program(path, tmp_path / "all", {"kind": "own"})


def test_where_the_data_is_from_is_no_part_of_the_key_and_what_it_is_called_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")

    def key(**source: Any) -> str:
        config = Pipeline.model_validate({"source": {"kind": "own", "path": "nowhere", **source}})
        return Step("data", DataJob.of(config), {"source": user_artifact(tmp_path / "a.jsonl")}).recipe.key

    assert key() == key(path="elsewhere", revision="main", files="*.jsonl")
    assert key() != key(prompt="question")


def test_an_evaluation_set_is_part_of_the_key_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a question of the benchmark that nobody may learn\n")

    def key(*sets: str) -> str:
        config = Pipeline.model_validate(
            {"data": {"decontaminate_against": [str(tmp_path / f"{name}.txt") for name in sets]}}
        )
        return Step("data", DataJob.of(config), evaluation_sets(config)).recipe.key

    assert key("a") == key("b") != key()
    (tmp_path / "b.txt").write_text("another question of the benchmark that nobody may learn\n")
    assert key("a") != key("b")
    with pytest.raises(
        InputError, match=r"data\.decontaminate_against: there is no file or folder .*none\.txt"
    ):
        key("none")


def test_a_corpus_is_looked_for_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = TypeAdapter(Source).validate_python({"kind": "own", "path": str(tmp_path)})
    assert isinstance(source, OwnRows)
    assert find_corpus(source) == tmp_path
    with pytest.raises(InputError, match="there is no file or folder"):
        find_corpus(source.model_copy(update={"path": "./nothing"}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="nor a data set that could be fetched"):
        find_corpus(source.model_copy(update={"path": "nobody/nothing"}))


# -------------------------------------------------------- what damaged inputs have brought to light


def test_half_characters_become_replacements_and_whole_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "half \\ud800", "\\udc00": ["\\ud83d\\ude00 and 漢"]}')
    (row,) = read_all(path)[0]
    assert row.fields == {"prompt": "half \ufffd", "\ufffd": ["😀 and 漢"]}


def test_a_text_of_many_control_characters_is_text_all_the_same() -> None:
    assert to_markdown("<p>a</p>" + "\0" * 1000) == "a"
    assert to_markdown("<pre><code>x\x0cy</code></pre>") == "```\nx\x0cy\n```"
