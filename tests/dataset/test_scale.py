"""Test that blocks, partitions and processes do not change the result of the data stage."""

import functools
import json
import os
import random
import shutil
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import py7zr
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.config.jobs import DataJob
from tasks.dataset import columns, sorted_files, tables
from tasks.dataset.curation import question_files, rules, split_assignment
from tasks.dataset.curation.near_duplicates import find_leader
from tasks.dataset.readers import blocks
from tasks.dataset.readers.user_names import UserNames
from tasks.dataset.splits import choose_split, normalise_words
from tasks.programs import data as program
from tasks.programs.data_stage import read_source
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.support.data_sets import table_digests, write_noisy_posts, write_posts
from tests.support.questions.question_rows import apply_rules, build_rows, count_pairs, draw_pairs, ranks
from tests.support.split_assignments import (
    connected_components,
    find_similar_pairs,
    question,
    write_questions,
)

SHARES = {"finetune": 0.34, "reward": 0.43, "rl": 0.1, "evaluation": 0.13}


def prepared(
    source: Path, folder: Path, *, threads: int = 1, data: dict[str, Any] | None = None, **settings: Any
) -> Path:
    folder.mkdir()
    job = {
        "seed": 0,
        "source": {"kind": "stack-exchange", "path": str(source)} | settings,
        "data": data or {},
    }
    record = {"stage": "data", "job": job, "inputs": {"source": str(source)}, "machine": {"threads": threads}}
    (folder / "job.json").write_text(json.dumps(record))
    run = Run(folder)
    program.prepare(DataJob.model_validate(run.record), run)
    return run.artifact


@pytest.mark.parametrize("change", ["blocks", "ranges", "row groups", "all and processes"])
def test_how_the_work_is_cut_cannot_be_seen_in_the_result(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posts = write_noisy_posts(tmp_path / "Posts.xml", 300)
    monkeypatch.setattr(tables, "ROW_GROUP", 100)  # several row groups
    whole = prepared(posts, tmp_path / "whole")
    assert pq.ParquetFile(whole / "reward.parquet").metadata.num_row_groups > 1
    if change in ("blocks", "all and processes"):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 5_000)
    if change in ("ranges", "all and processes"):
        monkeypatch.setattr(program, "PARTITION_RECORDS", 64)
    if change == "row groups":  # seen to matter: what else is written differs
        monkeypatch.setattr(tables, "ROW_GROUP", 50)
    other = prepared(posts, tmp_path / "other", threads=2 if change == "all and processes" else 1)
    assert (table_digests(other) == table_digests(whole)) == (change != "row groups")
    cards = [json.loads((artifact / "card.json").read_text()) for artifact in (whole, other)]
    assert cards[0] == cards[1]


def test_bad_rows_keep_their_place_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        json.dumps({"prompt": f"Question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"})
        for n in range(400)
    ]
    lines[7], lines[399] = "{", '"text"'
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows" / "b.jsonl").write_text("\n".join(lines[:10]))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1_000)
    artifact = prepared(tmp_path / "rows", tmp_path / "run", kind="own")
    told = [json.loads(line) for line in (artifact / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"]) for line in told] == [
        ("a.jsonl", 8),
        ("a.jsonl", 400),
        ("b.jsonl", 8),
    ]
    assert json.loads((artifact / "card.json").read_text())["rows_seen"] == 410


def test_several_sites_whose_numbers_collide(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    for site in ("cooking.stackexchange.com", "travel.stackexchange.com"):
        (folder / site).mkdir(parents=True)
        write_posts(folder / site / "Posts.xml", 120)
        text = (folder / site / "Posts.xml").read_text().replace("How to do", f"At {site}: how to do")
        (folder / site / "Posts.xml").write_text(text)
    artifact = prepared(folder, tmp_path / "run", data={"alike": 1})
    card = json.loads((artifact / "card.json").read_text())
    assert card["sites"] == {"cooking.stackexchange.com": 120, "travel.stackexchange.com": 120}
    asked = pq.read_table(artifact / "evaluation.parquet").to_pylist()
    assert {row["site"] for row in asked} == set(card["sites"])
    assert all(
        row["site"] in row["prompt"] and row["question_url"].startswith(f"https://{row['site']}/q/")
        for row in asked
    )
    assert sum(card["split_questions"].values()) == 240
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError,
        match=r"holds no file whose name ends in .*7z, Posts.xml, Posts.xml.gz, Posts.csv or Posts.csv.gz",
    ):
        prepared(tmp_path / "empty", tmp_path / "run2")


# ----------------------------------------------------------------------------- killed in the middle


def killed(posts: Path, folder: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the program in a process that is killed when it is about to finish the checkpoint file ``at``."""
    child = os.fork()
    if not child:
        real = os.replace, tables.write_part

        def replace(source: Any, target: Any) -> None:
            if Path(target).name == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real[0](source, target)

        def write_part(name: str, columns: Any, path: Path) -> None:
            if f"{path.parent.name}/{name}" == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real[1](name, columns, path)

        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(tables, "write_part", write_part)
        prepared(posts, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def again(folder: Path, **settings: Any) -> Path:
    """Run the program once more in its folder."""
    record = json.loads((folder / "job.json").read_text())
    record["job"]["data"] |= settings
    (folder / "job.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "artifact")  # as the flow does
    run = Run(folder)
    program.prepare(DataJob.model_validate(run.record), run)
    return run.artifact


@pytest.mark.parametrize(
    ("at", "blocks_read", "partitions_filtered"),
    [
        ("records000000.arrow.json", 0, 0),
        ("records000004.arrow.json", 4, 0),
        ("records.done", None, 0),  # None: all of them
        ("questions000003.arrow.json", None, 3),
        ("questions.done", None, None),
        ("tables000002/rl", None, None),
    ],
)
def test_a_killed_program_makes_no_part_again(
    at: str,
    blocks_read: int | None,
    partitions_filtered: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posts = write_noisy_posts(tmp_path / "Posts.xml", 300)
    posts.write_text(posts.read_text().replace("PostTypeId", "Rank", 5))  # rows for the quarantine
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(program, "PARTITION_RECORDS", 64)
    killed(posts, tmp_path / "run", at, monkeypatch)
    calls: Counter[str] = Counter()

    def counted(function: Any) -> Any:
        def wrapper(task: Any) -> Any:
            calls[function.__name__] += 1
            return function(task)

        return functools.wraps(function)(wrapper)

    monkeypatch.setattr(read_source, "read_block", counted(read_source.read_block))
    monkeypatch.setattr(program, "filter_partition", counted(program.filter_partition))
    whole = prepared(posts, tmp_path / "whole")
    total = calls.copy()
    calls.clear()
    artifact = again(tmp_path / "run")
    assert calls["read_block"] == total["read_block"] - (
        total["read_block"] if blocks_read is None else blocks_read
    )
    assert calls["filter_partition"] == total["filter_partition"] - (
        total["filter_partition"] if partitions_filtered is None else partitions_filtered
    )
    assert min(total.values()) > 5
    files = sorted(path.name for path in whole.iterdir())
    assert "quarantine.jsonl" in files
    for name in files:
        text = (artifact / name).read_bytes()
        assert text.replace(str(tmp_path / "run").encode(), b"") == (whole / name).read_bytes().replace(
            str(tmp_path / "whole").encode(), b""
        ), name
    assert not (tmp_path / "run" / "checkpoints" / "work").exists()


def test_parts_of_another_job_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = write_noisy_posts(tmp_path / "Posts.xml", 120)
    killed(posts, tmp_path / "run", "tables000000/rl", monkeypatch)
    settings = {"min_answer_chars": 30}
    assert table_digests(again(tmp_path / "run", **settings)) == table_digests(
        prepared(posts, tmp_path / "other", data=settings)
    )
    killed(posts, tmp_path / "run2", "tables000000/rl", monkeypatch)
    with pytest.raises(InputError, match="The rl split has no questions"):
        again(tmp_path / "run2", finetune_share=0.5, reward_share=0.49, rl_share=1e-9)
    assert not (tmp_path / "run2" / "checkpoints" / "work").exists()  # other work is wanted next


# ------------------------------------------------------------------------------------ sorted files


@given(
    st.lists(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 50), max_size=80), max_size=6),
    st.integers(1, 200),
    st.sampled_from([1, 100, 2**26]),
    st.sampled_from([1, 4, 32]),
)
def test_ranges_hold_every_record_once_in_rising_keys(
    tmp_path_factory: pytest.TempPathFactory, keys: Any, size: int, num_bytes: int, every: int
) -> None:
    folder = tmp_path_factory.mktemp("records")
    paths = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_files, "SAMPLE_EVERY", every)
        for number, of_one in enumerate(keys):
            paths.append(folder / f"{number}.arrow")
            fields = {"file": [number] * len(of_one), "place": list(range(len(of_one)))}
            texts = pa.array(["x" * (key % 50) for key in of_one], pa.large_string())
            batch = {"key": pa.array(of_one, pa.int64()), **fields, "text": texts}
            sorted_files.write(pa.RecordBatch.from_pydict(batch), paths[-1])
        ranges = sorted_files.partition(paths, size, num_bytes)
        found = [sorted_files.read(slices).to_pylist() for slices in ranges]
    every = [record for records in found for record in records]
    assert sorted((record["file"], record["place"]) for record in every) == [
        (n, p) for n, of_one in enumerate(keys) for p in range(len(of_one))
    ]
    for record in every:
        assert record["key"] == keys[record["file"]][record["place"]]
        assert len(record["text"]) == record["key"] % 50
    for before, after in pairwise(found):
        assert max(record["key"] for record in before) < min(record["key"] for record in after)
    shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------- fates


def test_a_file_of_questions_returns_what_was_written(tmp_path: Path) -> None:
    questions = [question(k, f"Why {k}?\u2028\n", author="a", split="evaluation") for k in range(3)]
    questions[1] = questions[1]._replace(compared=((0, 1),))
    (path,) = write_questions(questions, tmp_path, 10)
    assert columns.to_rows(columns.read(path)) == questions


@pytest.mark.parametrize("size", [7, 1000])
def test_fates_are_the_splits_of_all_questions_at_once(size: int, tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choice("abcdefgh") * 3 for _ in range(12)) for _ in range(150)]
    texts += [f"{text} and thanks a lot" for text in texts[:40]] + texts[:20]
    questions = [
        question(3 * k, text, split="evaluation" if k % 50 == 7 else "") for k, text in enumerate(texts)
    ]
    fates = split_assignment.assign_splits(
        write_questions(questions, tmp_path, size),
        SHARES,
        Counter(),
        alike=0.6,
        distinct=False,
        per_author=None,
    )
    first = connected_components(
        len(texts), find_similar_pairs([normalise_words(text) for text in texts], 0.6)
    )
    given = {first[k] for k, asked in enumerate(questions) if asked.split}
    left = {
        name: share / (1 - SHARES["evaluation"]) for name, share in SHARES.items() if name != "evaluation"
    }
    expected = [
        "evaluation" if leader in given else choose_split(questions[leader].id, left) for leader in first
    ]
    assert [question_files.SPLITS[split] for split in fates.splits] == expected
    assert len(set(first)) == 150
    assert fates.comparable.all()


def test_of_those_that_say_the_same_only_the_first_is_kept(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    texts = [long, "something else", f"{long} thanks", "Something, else!", "a third thing"]
    dropped: Counter[str] = Counter()
    paths = write_questions([question(k, text) for k, text in enumerate(texts)], tmp_path, 2)
    fates = split_assignment.assign_splits(paths, SHARES, dropped, alike=0.8, distinct=True, per_author=None)
    assert (fates.splits > 0).tolist() == [True, True, False, False, True]
    assert dropped == {"questions that say the same as another": 2}


def test_an_author_has_no_more_than_their_share_whatever_the_partitions(tmp_path: Path) -> None:
    authors = ["ann", "", "bob", "ann", "ann", "", "bob", "ann", "eve"] * 5
    questions = [
        question(k, f"question number {k} of its own", author=author) for k, author in enumerate(authors)
    ]
    found = []
    for size in (4, 100):
        dropped: Counter[str] = Counter()
        (tmp_path / str(size)).mkdir()
        fates = split_assignment.assign_splits(
            write_questions(questions, tmp_path / str(size), size),
            SHARES,
            dropped,
            alike=1,
            distinct=False,
            per_author=3,
        )
        kept = [author for author, split in zip(authors, fates.splits, strict=True) if split]
        assert Counter(kept) == {"ann": 3, "bob": 3, "eve": 3, "": 10}
        assert dropped == {"questions of authors with more than their share": 45 - 19}
        found.append(fates.splits.tolist())
    assert found[0] == found[1]
    assert [k for k, split in enumerate(found[0]) if split and authors[k] == "ann"] != [
        0,
        3,
        4,
    ]  # drawn, not the first


def test_a_leader_is_found_through_others() -> None:
    leaders = np.array([0, 0, 1, 2, 4])
    assert find_leader(leaders, 3) == 0
    assert leaders[3] < 2


# ------------------------------------------------------------------------------------ proof columns


@given(st.lists(st.integers(-1, 4), min_size=2, max_size=9), st.integers(1, 12))
def test_pairs_carry_their_proof(scores: list[int], most: int) -> None:
    asked = question(1, "Why?", scores=tuple(map(float, scores)))
    every = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    pairs = draw_pairs(asked, max_pairs=most, seed=0)
    assert count_pairs(asked) == len(every)
    assert len(pairs) == min(most, len(every))
    standing = ranks(asked.answers)
    assert all(
        standing[k] == 1 + len({score for score in scores if score > scores[k]}) for k in range(len(scores))
    )
    rows = [row for name, row in build_rows(asked, "reward", pairs, len(every)) if name == "reward"]
    for row, (i, j) in zip(rows, pairs, strict=True):
        assert (row["gap"], row["sampled_of"]) == (scores[i] - scores[j], len(every))
        assert (row["chosen_rank"], row["rejected_rank"]) == (standing[i], standing[j])
    groups = [row for name, row in build_rows(asked, "reward", pairs, len(every)) if name == "reward_groups"]
    assert [row["ranks"] for row in groups] == ([standing] if pairs else [])


# ------------------------------------------------------------------------------------------- people

USERS = (
    '<?xml version="1.0" encoding="utf-8"?>\n<users>\n  <row Id="3" DisplayName="Zoë  O&#39;Hara" '
    'AboutMe="&lt;p&gt;hi&lt;/p&gt;" />\n'
)
USERS += (
    '  <row Id="-1" DisplayName="Community" />\n  <row Id="99999999999" DisplayName="nobody" />\n  <row '
    'Id="5" />\n'
)


@pytest.mark.parametrize("where", ["in the archive", "beside the posts", "in an archive of its own"])
def test_users_give_authors_their_names(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3_000)  # many blocks of posts and of users
    posts = write_noisy_posts(tmp_path / "Posts.xml", 120).read_text()
    users = (
        USERS
        + "".join(f'  <row Id="{1000 + k}" DisplayName="user {k}" />\n' for k in range(100))
        + "</users>"
    )
    folder = tmp_path / "dumps"
    folder.mkdir()
    if where == "beside the posts":
        (folder / "site.example").mkdir()
        (folder / "site.example" / "Posts.xml").write_text(posts)
        (folder / "site.example" / "Users.xml").write_text(users)
    else:
        tables = {"Posts.xml": posts, "Users.xml": users}
        archives = (
            {"": list(tables)}
            if where == "in the archive"
            else {"-Posts": ["Posts.xml"], "-Users": ["Users.xml"]}
        )
        for name, members in archives.items():
            with py7zr.SevenZipFile(folder / f"site.example{name}.7z", "w") as archive:
                for member in members:
                    archive.writestr(tables[member], member)
    artifact = prepared(folder, tmp_path / "run")
    assert json.loads((artifact / "card.json").read_text())["sites"] == {"site.example": 120}
    asked = (
        pq.read_table(artifact / "evaluation.parquet").to_pylist()
        + pq.read_table(artifact / "rl.parquet").to_pylist()
    )
    names = {row["question_author"].rpartition("/")[2]: row["question_author_name"] for row in asked}
    assert names["3"] == "Zoë O'Hara"
    assert {name for number, name in names.items() if number != "3"} == {""}


def test_names_are_found_by_number_alone(tmp_path: Path) -> None:
    names = UserNames(tmp_path / "names")
    names.write([[(7, "seven"), (2, "zwei")], [(7, "Sieben ü")]])
    with names:
        assert [
            names.get(number) for number in ("7", "2", "0", "1", "8", "999999", "", "x", "-7", str(2**40))
        ] == ["Sieben ü", "zwei"] + [""] * 8


# -------------------------------------------------------------------------------------------- rules


def test_every_rule_counts_what_it_leaves_out(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"How do I repair the {n}th wheel of my bicycle?",
            "chosen": f"Well, {n}",
            "rejected": f"No {n}",
        }
        for n in range(60)
    ]
    rows[0]["prompt"] = (
        "Wie kann ich das Hinterrad meines Fahrrads reparieren, wenn die Speichen gebrochen sind?"
    )
    rows[1]["chosen"] = "Write to jane.roe@gmail.com please"
    rows[2]["prompt"] = "Is jane.roe@gmail.com still the address for spare parts?"
    rows[3]["prompt"] = "x" * 300
    rows[4]["prompt"] = (
        "Tell me: one two three four five six seven eight nine ten eleven twelve thirteen fourteen!"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "benchmark.txt").write_text(
        "one two three four, five six seven eight nine ten eleven twelve thirteen\n"
    )

    def run(name: str, **settings: Any) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        job = {
            "seed": 0,
            "source": {"kind": "own", "path": "rows.jsonl"},
            "data": {"alike": 1, "personal": "keep"} | settings,
        }
        inputs = {"source": str(tmp_path / "rows.jsonl"), "against0": str(tmp_path / "benchmark.txt")}
        (folder / "job.json").write_text(json.dumps({"stage": "data", "job": job, "inputs": inputs}))
        program.prepare(DataJob.model_validate(job), Run(folder))
        card: dict[str, Any] = json.loads((folder / "artifact" / "card.json").read_text())
        return card

    plain = run("plain")
    assert plain["dropped"].pop("questions of evaluation sets") == 1
    assert plain["dropped"].pop("answers to questions of evaluation sets") == 2
    assert "masked" not in plain or not plain["masked"]
    assert plain["kept"]["questions"] == 59
    assert run("mask", personal="mask")["masked"] == {"email": 2}
    without = run("drop", personal="drop")
    assert without["dropped"]["questions with personal data"] == 1
    assert without["dropped"]["answers with personal data"] == 1
    assert "answers without text" not in without["dropped"]
    assert run("language", languages=["en"])["dropped"]["questions in other languages"] == 1
    assert run("length", max_prompt_chars=250)["dropped"]["questions too long"] == 1


def test_what_is_left_out_is_never_counted_below_nothing() -> None:
    dropped: Counter[str] = Counter()
    asked = question(1, "", scores=(2, 1))._replace(compared=((0, 1),))
    asked = asked._replace(
        answers=(asked.answers[0]._replace(text="ask jane.roe@gmail.com"), asked.answers[1])
    )
    assert apply_rules(asked, rules.Rules(personal="drop"), dropped, Counter()) is None
    assert min(dropped.values()) >= 0
    kept = apply_rules(asked._replace(prompt="Who?"), rules.Rules(personal="drop"), dropped, Counter())
    assert kept is not None
    assert (kept.compared, [answer.text for answer in kept.answers]) == ((), ["answer 1"])
