"""Test the small inputs of shared/cases: files like public ones that alignflow once read wrongly."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import DataJob
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.dataset.tables import COLUMNS
from tasks.programs.data import prepare
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import attention_masks, layout_checks
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.packing import Document, pack
from tasks.system.errors import InputError
from tests.support import attention_models, tiny
from tests.support.dumps import iter_posts
from tests.support.paths import SHARED
from tests.support.questions.question_rows import author_url

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason="the small inputs of shared/cases are not on this machine"
)


def test_every_folder_of_cases_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [
        folder.name
        for folder in sorted(CASES.iterdir())
        if folder.is_dir() and f'CASES / "{folder.name}"' not in text
    ] == []


# --------------------------------------------------------------------------- rows of the user's own

QUESTION = re.compile(r"How should one \w+ a \w+ before the rainy season begins in the hills\?")
GOOD, BAD = re.compile(r"To \w+ the \w+, take a dry cloth first.*"), re.compile(r"No idea, sorry\. \(\w+\)")
SOME = {"finetune_share": 0.3, "reward_share": 0.3, "rl_share": 0.1}


def read_rows_of(
    path: Path, folder: Path, **source: Any
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Run the data program on a file or folder; return its tables, and its card with the warnings."""
    folder.mkdir(parents=True)
    job = {"seed": 0, "source": {"kind": "own", "path": str(path)} | source, "data": SOME}
    (folder / "job.json").write_text(
        json.dumps({"stage": "data", "job": job, "inputs": {"source": str(path)}})
    )
    run = Run(folder)
    prepare(DataJob.model_validate(run.record), run)
    tables = {name: pq.read_table(run.artifact / f"{name}.parquet").to_pylist() for name in COLUMNS}
    card = json.loads((run.artifact / "card.json").read_text())
    return tables, card | {"warnings": json.loads((run.artifact / "summary.json").read_text())["warnings"]}


def prompts_of(tables: dict[str, list[dict[str, Any]]]) -> set[str]:
    return {row["prompt"] for rows in tables.values() for row in rows}


def check_comparisons(tables: dict[str, list[dict[str, Any]]]) -> None:
    pairs = tables["reward"] + tables["evaluation_pairs"]
    assert pairs
    assert all(GOOD.fullmatch(pair["chosen"]) for pair in pairs)
    assert all(BAD.fullmatch(pair["rejected"]) for pair in pairs)
    assert all(GOOD.fullmatch(row["answer"]) for row in tables["finetune"])


def test_ultrafeedback_prompts_are_taken_once(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "ultrafeedback", tmp_path / "run")
    assert card["kept"] == {"questions": 100, "answers": 200, "pairs": 100}
    assert all(QUESTION.fullmatch(prompt) for prompt in prompts_of(tables))
    check_comparisons(tables)
    assert card["unread_columns"] == {"messages": 100, "prompt_id": 100}
    assert card["warnings"] == []


def test_answers_labelled_false_are_not_imitated(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "kto", tmp_path / "run")
    rows = [json.loads(line) for line in (CASES / "kto" / "rows.jsonl").read_text().splitlines()]
    only_bad = sum(row.get("label") is False for row in rows)
    assert only_bad == card["dropped"]["questions whose every answer is labelled bad"] > 10
    assert card["kept"]["questions"] == 100 - only_bad
    assert all(GOOD.fullmatch(row["answer"]) for row in tables["finetune"])
    check_comparisons(tables)


def test_hh_rlhf_takes_the_files_that_are_its_dialogues(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "hh-layout", tmp_path / "run", kind="hh-rlhf")
    assert card["other_files"] == ["red-team-attempts/red_team_attempts.jsonl.gz"]
    assert (card["quarantined"], card["read"]["rows"]) == ({}, card["rows_seen"])
    held = {}
    for file in sorted((CASES / "hh-layout").glob("*-base/test.jsonl.gz")):
        held[file.relative_to(CASES / "hh-layout").as_posix()] = len(
            gzip.decompress(file.read_bytes()).splitlines()
        )
    assert card["test_files"] == held
    assert card["split_questions"]["evaluation"] == sum(held.values())
    check_comparisons(tables)


@pytest.mark.parametrize("column", ["completion", "responses"])
def test_one_rated_answer_a_row_is_grouped_by_prompt(tmp_path: Path, column: str) -> None:
    tables, card = read_rows_of(
        CASES / "helpsteer2", tmp_path / "run", **{column: "response", "scores": "helpfulness"}
    )
    assert card["kept"] == {"questions": 100, "answers": 300, "pairs": 300}
    assert card["scores"] == [
        {"score": 0, "count": 100},
        {"score": 2, "count": 100},
        {"score": 4, "count": 100},
    ]
    assert all(GOOD.fullmatch(row["answer"]) for row in tables["finetune"])
    assert card["unread_columns"] == dict.fromkeys(
        ("coherence", "complexity", "correctness", "verbosity"), 300
    )


def test_rated_answers_whose_ratings_are_not_named_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'helpfulness'.*source\.scores.*source\.ignored"):
        read_rows_of(CASES / "helpsteer2", tmp_path / "run", completion="response")


def test_the_system_column_is_part_of_the_prompt(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "orca", tmp_path / "run", prompt="question")
    told = [
        prompt
        for prompt in prompts_of(tables)
        if prompt.startswith("System: You are a careful gardener. Answer in one line.\n\nHuman: How")
    ]
    assert len(told) == 50 == len([prompt for prompt in prompts_of(tables) if QUESTION.fullmatch(prompt)])
    check_comparisons(tables)
    assert card["unread_columns"] == {}


def test_messages_as_json_text_are_messages(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "stringified", tmp_path / "run")
    assert card["kept"]["pairs"] == 100
    assert all(QUESTION.fullmatch(prompt) for prompt in prompts_of(tables))
    check_comparisons(tables)


def test_published_test_files_are_evaluated_on_only(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "own-splits", tmp_path / "run")
    held = {
        json.loads(line)["prompt"]
        for line in (CASES / "own-splits" / "data" / "test_prefs-00000-of-00001.jsonl")
        .read_text()
        .splitlines()
    }
    assert card["test_files"] == {"data/test_prefs-00000-of-00001.jsonl": 20}
    assert {row["prompt"] for row in tables["evaluation"]} == held
    assert not held & {
        row["prompt"]
        for name in ("finetune", "corpus", "reward", "reward_groups", "rl")
        for row in tables[name]
    }


def test_decimal_scores_are_numbers(tmp_path: Path) -> None:
    _, card = read_rows_of(CASES / "parquet-odd", tmp_path / "run")
    assert (card["quarantined"], card["kept"]) == ({}, {"questions": 100, "answers": 300, "pairs": 300})
    assert [entry["score"] for entry in card["scores"]] == [0.5, 2, 3.5]


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    tables, card = read_rows_of(CASES / "saved", tmp_path / "run")
    assert (card["quarantined"], card["rows_seen"], card["kept"]["pairs"]) == ({}, 100, 100)
    check_comparisons(tables)


# -------------------------------------------------------------------------------------------- dumps


def test_formulas_stay_byte_for_byte() -> None:
    posts, _ = read_dump(CASES / "mathjax" / "Posts.xml")
    texts = [to_markdown(post.body) for post in posts.values() if not post.parent]
    assert len(texts) > 20
    for text in texts:
        assert r"$\{x : x \le n\}$ when $A=\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}$ for" in text


def read_dump(path: Path) -> tuple[dict[int, Post], Counter[str]]:
    """Return the posts of a dump by id, and why how many rows cannot be read."""
    bad = Quarantine()
    posts = {post.id: post for post in iter_posts(path, Counter(), bad)}
    return posts, bad.reasons


def test_of_a_join_by_data_explorer_the_posts_columns_are_read() -> None:
    posts, reasons = read_dump(CASES / "sede-join" / "QueryResults.csv")
    assert reasons == {}
    assert min(posts) == 1000
    assert {post.created for post in posts.values()} == {"2015-10-01 21:06:37"}
    for post in posts.values():  # question, then the three answers to it
        assert post.parent == (post.id - post.id % 4 if post.id % 4 else 0)


def test_a_forbidden_character_costs_only_itself() -> None:
    posts, reasons = read_dump(CASES / "xmlchars" / "Posts.xml")
    assert reasons == {}
    assert sorted(posts) == list(range(1, len(posts) + 1))
    assert posts[2].body.startswith("<p>To clean the kettle, take a dry cloth first")


@pytest.mark.parametrize("name", ["NULL", "NA"])
def test_a_word_for_nothing_is_nothing(name: str) -> None:
    posts, reasons = read_dump(CASES / "csv-null" / f"{name}.csv")
    assert reasons == {}
    assert {(post.parent > 0, post.title == "") for post in posts.values()} == {(False, False), (True, True)}
    assert sum(post.accepted > 0 for post in posts.values()) > 0
    assert {author_url(post, "a.example") for post in posts.values() if not post.author_id} == {""}
    assert not any(name in field for post in posts.values() for field in post if isinstance(field, str))


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_window_packed_and_shared_texts_keep_a_window_of_96(kind: str) -> None:
    lines = (CASES / "window" / "own.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: len(row["prompt"]))[
        ::12
    ]  # from the shortest to the longest
    tokenizer, model = tiny.tokenizer(), attention_models.model(kind, window=96, context=1024)
    texts = [[tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")] for row in rows]
    documents = [Document(prompt + chosen, [True] * len(prompt + chosen)) for prompt, chosen, _ in texts]
    assert min(len(d.ids) for d in documents) < 96 < max(len(d.ids) for d in documents)
    blocks = pack(documents, block_tokens=1024, pad_id=tiny.PAD)
    questions = [Comparison(i, p, [c, r], [(0, 1)], [1.0], [None]) for i, (p, c, r) in enumerate(texts)]
    for gap in (
        layout_checks.packing_gap(model, blocks),
        layout_checks.sharing_gap(model, questions, pad_id=tiny.PAD),
    ):
        assert gap.nats < 1e-5  # 0.04 to 0.13 without the window
    assert not attention_masks.has_one_text_per_row(model)
