"""The data program on real dumps and on made ones: tables, determinism, card, refusals."""

import csv
import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import DataJob
from tasks.dataset.splits import choose_split
from tasks.dataset.tables import COLUMNS
from tasks.programs.data import prepare
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.support.paths import ROOT, SHARED

DUMPS = SHARED / "data" / "stackexchange"
real_data = pytest.mark.skipif(
    not DUMPS.is_dir(), reason="the real dumps of shared/data are not on this machine"
)


def prepared(
    posts: Path, folder: Path, *, seed: int = 0, site: str = "travel.stackexchange.com", **data: Any
) -> Path:
    folder.mkdir()
    source = {"kind": "stack-exchange", "path": str(posts), "site": site}
    job = {"seed": seed, "source": source, "data": data}
    (folder / "job.json").write_text(
        json.dumps({"stage": "data", "job": job, "inputs": {"source": str(posts)}})
    )
    run = Run(folder)
    prepare(DataJob.model_validate(run.record), run)
    return run.artifact


def rows(artifact: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(artifact / f"{name}.parquet").to_pylist()


def digests(artifact: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in artifact.iterdir()
        if path.suffix == ".parquet"
    }


def write_posts(
    path: Path, num_questions: int, num_answers: int = 4, votes: tuple[int, ...] = (9, 3, 0, -2)
) -> Path:
    """Posts.xml of questions with answers that differ in votes."""
    lines, id = ["<posts>"], 0
    for number in range(num_questions):
        id += 1
        question = id
        lines.append(
            f'<row Id="{id}" PostTypeId="1" Score="1" Title="How to do {number}?" Body="&lt;p&gt;How to do {number}?&lt;/p&gt;" />'
        )
        for k in range(num_answers):
            id += 1
            lines.append(
                f'<row Id="{id}" PostTypeId="2" ParentId="{question}" Score="{votes[k % len(votes)]}" Body="&lt;p&gt;Way {k}.&lt;/p&gt;" />'
            )
    path.write_text("\n".join([*lines, "</posts>"]))
    return path


@pytest.fixture(scope="module")
def travel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(DUMPS / "travel/Posts.csv.gz", tmp_path_factory.mktemp("data") / "travel")


@real_data
def test_tables_of_a_real_dump(travel: Path) -> None:
    tables = {name: rows(travel, name) for name in COLUMNS}
    for name, columns in COLUMNS.items():
        assert list(tables[name][0]) == list(columns)
        ids = [row["question_id"] for row in tables[name]]
        assert ids == sorted(ids)
        assert all(row["prompt"] == row["prompt"].strip() != "" for row in tables[name])
    for name in ("reward", "evaluation_pairs"):
        assert all(
            row["chosen_score"] > row["rejected_score"] and row["chosen"] != row["rejected"]
            for row in tables[name]
        )
    for row in tables["evaluation"]:
        assert len(row["answers"]) == len(row["scores"]) == len(row["answer_url"])
        assert row["scores"][row["best"]] == max(row["scores"])
    assert len({row["question_id"] for row in tables["finetune"]}) == len(tables["finetune"])
    assert {row["question_id"] for row in tables["corpus"]} == {
        row["question_id"] for row in tables["finetune"]
    }
    best = {(row["question_id"], row["answer"]) for row in tables["finetune"]}
    assert best < {(row["question_id"], row["answer"]) for row in tables["corpus"]}


@real_data
def test_no_question_and_no_prompt_is_in_two_splits(travel: Path) -> None:
    for key in ("question_id", "prompt"):
        members = [
            {row[key] for row in rows(travel, name)} for name in ("finetune", "reward", "rl", "evaluation")
        ]
        assert sum(map(len, members)) == len(set().union(*members))


@real_data
def test_attribution_travels_with_every_row(travel: Path) -> None:
    row = next(row for row in rows(travel, "reward"))
    id = row["question_id"]
    assert row["site"] == "travel.stackexchange.com"
    assert row["question_url"] == f"https://travel.stackexchange.com/q/{id}"
    assert row["chosen_url"].startswith("https://travel.stackexchange.com/a/")
    assert row["chosen_url"] != row["rejected_url"]
    assert row["chosen_author"].startswith("https://travel.stackexchange.com/users/")
    for name in COLUMNS:
        assert {row["question_licence"] for row in rows(travel, name)} == {"CC BY-SA 3.0", "CC BY-SA 4.0"}


@real_data
def test_card_adds_up(travel: Path) -> None:
    card = json.loads((travel / "card.json").read_text())
    summary = json.loads((travel / "summary.json").read_text())["metrics"]
    assert card["read"] == {"questions": 2725, "answers": 5798}
    assert card["kept"] == {"questions": 2642, "answers": 5796, "pairs": 4032}
    assert sum(card["split_questions"].values()) == 2642
    for histogram in ("scores", "answer_chars", "prompt_chars"):
        assert sum(entry["count"] for entry in card[histogram]) == (
            2642 if histogram == "prompt_chars" else 5796
        )
    assert card["rows"] == {name: len(rows(travel, name)) for name in COLUMNS}
    assert 0.6 < card["longer_wins"] < 0.75
    assert 0.6 < card["older_wins"] < 0.75
    assert len({example["question_id"] for example in card["examples"]}) == 20
    assert all(
        example["gap"] > 0 and example["chosen_rank"] < example["rejected_rank"]
        for example in card["examples"]
    )
    assert summary["data.pairs"] == 4032
    assert summary["data.reward_pairs"] == card["rows"]["reward"]


@real_data
def test_shuffled_input_gives_the_same_bytes(travel: Path, tmp_path: Path) -> None:
    with gzip.open(DUMPS / "travel/Posts.csv.gz", "rt", encoding="utf-8", newline="") as file:
        header, *posts = list(csv.reader(file))
    random.Random(3).shuffle(posts)
    order = random.Random(4).sample(range(len(header)), len(header))  # columns too
    with (tmp_path / "Posts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([row[k] for k in order] for row in [header, *posts])
    assert digests(prepared(tmp_path / "Posts.csv", tmp_path / "shuffled")) == digests(travel)


@real_data
def test_another_seed_draws_other_pairs_and_keeps_the_splits(travel: Path, tmp_path: Path) -> None:
    other = prepared(DUMPS / "travel/Posts.csv.gz", tmp_path / "other", seed=1)
    changed = {name for name, digest in digests(other).items() if digest != digests(travel)[name]}
    assert changed == {"reward.parquet", "evaluation_pairs.parquet"}
    assert len(rows(other, "reward")) == len(rows(travel, "reward"))


def test_the_program_by_hand_never_loads_torch(tmp_path: Path) -> None:
    posts = write_posts(tmp_path / "Posts.xml", 200)
    (tmp_path / "job.json").write_text(
        json.dumps(
            {
                "stage": "data",
                "job": {"seed": 0, "source": {"kind": "shell-site"}, "data": {}},
                "inputs": {"source": str(posts)},
            }
        )
    )
    check = "import runpy, sys; sys.argv[1:] = sys.argv[1:]; runpy.run_module('tasks.programs.data', run_name='__main__'); "
    check += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'prefect', 'mlflow')))"
    done = subprocess.run(
        [sys.executable, "-c", check, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    assert rows(tmp_path / "artifact", "rl")[0]["prompt"].startswith(
        "How to do "
    )  # body equals title: the title once
    assert "\n" not in rows(tmp_path / "artifact", "rl")[0]["prompt"]
    assert rows(tmp_path / "artifact", "rl")[0]["site"] == "shell.example"


def test_lines_of_progress_count_bytes_and_restart_with_the_program(tmp_path: Path) -> None:
    posts = write_posts(tmp_path / "Posts.xml", 1000)
    artifact = prepared(posts, tmp_path / "run")
    once = (artifact / "metrics.jsonl").read_text()
    run = Run(tmp_path / "run")
    prepare(DataJob.model_validate(run.record), run)
    assert (artifact / "metrics.jsonl").read_text() == once
    lines = [json.loads(line) for line in once.splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    whole = posts.stat().st_size
    assert lines[0] == {
        "step": whole // 3,
        "total": whole,
        "unit": "bytes",
        "questions": 1000,
        "answers": 4000,
    }  # reading is a third of the way
    assert lines[-1] == {
        "step": whole,
        "total": whole,
        "unit": "bytes",
        "questions": 1000,
        "answers": 4000,
        "pairs": 6000,
    }


@pytest.mark.parametrize(
    ("num_questions", "votes", "data", "message"),
    [
        (
            50,
            (1, 1, 1, 1),
            {},
            "no question with two differently scored answers .found 50 questions and 200 answers",
        ),
        (50, (5, 1, 1, 1), {"min_answer_chars": 100}, "0 questions with a usable answer"),
        (
            50,
            (5, 1, 1, 1),
            {"reward_share": 0},
            "The reward split has no questions .* raise data.reward_share",
        ),
        (50, (5, 1, 1, 1), {"finetune_share": 0}, "The finetune split .* raise data.finetune_share"),
        (
            3,
            (5, 1, 1, 1),
            {"rl_share": 0.001, "reward_share": 0.9, "finetune_share": 0.05},
            "split has no .*of 3 usable questions",
        ),
        (
            50,
            (5, 1, 1, 1),
            {"finetune_share": 0.7, "rl_share": 0, "reward_share": 0.2999},
            "The evaluation split .* lower data.finetune_share",
        ),
    ],
)
def test_sets_that_cannot_be_used_are_refused(
    num_questions: int, votes: tuple[int, ...], data: dict, message: str, tmp_path: Path
) -> None:
    posts = write_posts(tmp_path / "Posts.xml", num_questions, votes=votes)
    with pytest.raises(InputError, match=message) as refusal:
        prepared(posts, tmp_path / "run", **data)
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "run/artifact").iterdir())


def test_a_reward_split_without_comparisons_is_refused(tmp_path: Path) -> None:
    alike = write_posts(tmp_path / "Posts.xml", 50, votes=(1,)).read_text()
    elsewhere = next(
        id for id in range(1, 250, 5) if choose_split(id, {"finetune": 0.4, "rest": 0.6}) == "finetune"
    )
    (tmp_path / "Posts.xml").write_text(
        alike.replace(f'ParentId="{elsewhere}" Score="1"', f'ParentId="{elsewhere}" Score="9"', 1)
    )
    with pytest.raises(InputError, match="The reward split has no questions with differently scored answers"):
        prepared(tmp_path / "Posts.xml", tmp_path / "run")


def test_the_best_answer_is_fine_tuned_on_and_all_are_pretrained_on(tmp_path: Path) -> None:
    artifact = prepared(write_posts(tmp_path / "Posts.xml", 100, votes=(0, 9, 3)), tmp_path / "run")
    best, corpus = rows(artifact, "finetune"), rows(artifact, "corpus")
    assert {(row["answer"], row["score"]) for row in best} == {("Way 1.", 3)}
    assert len(corpus) == 4 * len(best)


def test_no_prompts_are_wanted_where_the_rl_share_is_zero(tmp_path: Path) -> None:
    artifact = prepared(write_posts(tmp_path / "Posts.xml", 100), tmp_path / "run", rl_share=0)
    assert rows(artifact, "rl") == []
    assert pq.read_schema(artifact / "rl.parquet").names == list(COLUMNS["rl"])
