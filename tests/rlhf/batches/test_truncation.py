"""Test texts that are longer than a model's limits: they are cut, counted and reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import DpoJob, ReferenceJob, RewardJob, SftJob
from tasks.programs import dpo, reference, reward, sft
from tasks.programs.runtime.program import Run
from tasks.reporting import truncation_charts
from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.prompts import encode_answer, encode_prompt
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.thresholds import MUCH_TRUNCATED
from tasks.system.errors import InputError
from tests.support import tiny

TOKENIZER = tiny.tokenizer()
TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 12}
HEAD = (
    "list files users groups ports disks pages words lines "
    "logs list files users groups ports"
)  # more tokens than an answer may have


def encoder(prompt: int = 48, answer: int = 12) -> Encoder:
    return Encoder(TOKENIZER, template="question-answer", max_prompt_tokens=prompt, max_answer_tokens=answer)


def test_texts_are_cut_as_they_are_without_counting() -> None:
    made = encoder(30, 8)
    for text in ("list", HEAD, HEAD * 20, "", "naïve \u4e2d\u6587 \U0001f600 text"):
        assert made.encode_prompt(text) == encode_prompt(
            TOKENIZER, text, template="question-answer", max_tokens=30
        )
        assert made.encode_answer(text) == encode_answer(
            TOKENIZER, text, template="question-answer", max_tokens=8
        )


def test_a_text_of_just_the_limit_is_not_cut() -> None:
    ids = encode_answer(TOKENIZER, HEAD, template="question-answer", max_tokens=999)
    exact, shorter = encoder(answer=len(ids)), encoder(answer=len(ids) - 1)
    assert (exact.encode_answer(HEAD), exact.cut.answers_cut) == (ids, 0)
    assert (shorter.encode_answer(HEAD), shorter.cut.answers_cut) == (
        ids[:-1],
        1,
    )  # the end token alone is cut off, and that is a cut answer
    asked = encode_prompt(TOKENIZER, HEAD, template="question-answer", max_tokens=999)
    exact, shorter = encoder(prompt=len(asked)), encoder(prompt=len(asked) - 1)
    assert (exact.encode_prompt(HEAD), exact.cut.prompts_cut) == (asked, 0)
    assert (len(shorter.encode_prompt(HEAD)) < len(asked), shorter.cut.prompts_cut) == (True, 1)


@pytest.mark.parametrize(("cut", "warned"), [(0, False), (2, False), (3, True), (8, True)])
def test_more_than_a_quarter_is_warned_of_with_the_setting(cut: int, warned: bool) -> None:
    made = encoder()
    for number in range(8):
        made.encode_answer(HEAD if number < cut else "list")
        made.encode_prompt("list")
    assert MUCH_TRUNCATED == 0.25
    assert made.metrics("sft") == {"sft.prompts_cut": 0, "sft.answers_cut": cut / 8}
    assert [
        ("text.max_answer_tokens=12" in sentence and f"{cut} of 8 answers" in sentence)
        for sentence in made.warnings()
    ] == [True] * warned


def pair(id: int, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "question_id": id,
        "prompt": "list files",
        "chosen": chosen,
        "rejected": rejected,
        "gap": 1.0,
        "chosen_older": None,
    }


def test_pairs_that_are_equal_once_cut_are_left_out_with_the_answers_that_only_they_had() -> None:
    rows = [
        pair(1, HEAD + " copy", HEAD + " move"),  # equal
        pair(1, "show", HEAD + " copy"),
        pair(2, HEAD + " hide", HEAD + " sort"),  # equal: the question goes
        pair(3, "show", " show "),  # equal as the model reads them
        pair(4, "show", "sort"),
    ]
    made = encoder()
    first, last = comparisons.encode_with(made, comparisons.from_pairs(rows))
    assert (first.question_id, first.pairs, len(first.answers), first.gaps, first.older) == (
        1,
        [(1, 0)],
        2,
        [1.0],
        [None],
    )
    assert first.answers[1] == encode_answer(TOKENIZER, "show", template="question-answer", max_tokens=12)
    assert (last.question_id, last.pairs) == (4, [(0, 1)])
    assert (made.cut.pairs, made.cut.pairs_equal) == (5, 3)
    assert made.metrics("dpo")["dpo.pairs_equal_once_cut"] == 3
    assert any("3 of 5 pairs are left out" in sentence for sentence in made.warnings())
    assert [
        c.question_id
        for c in comparisons.encode_with(
            Encoder(TOKENIZER, template="question-answer", **TEXT), comparisons.from_pairs(rows)
        )
    ] == [1, 4]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write data in which the answers of a third of the pairs differ only behind the limit."""
    root = tmp_path_factory.mktemp("truncation")
    data = tiny.data_folder(root / "data", 30)
    for name in ("reward", "evaluation_pairs"):
        rows = pq.read_table(data / f"{name}.parquet").to_pylist()
        for row in rows:
            if row["question_id"] % 3 == 0:
                row["chosen"], row["rejected"] = f"{HEAD} {row['chosen']}", f"{HEAD} {row['rejected']}"
        pq.write_table(pa.Table.from_pylist(rows), data / f"{name}.parquet")
    return {"data": data, "model": tiny.base_folder(root / "base"), "base": root / "base"}


def started(stage: str, folder: Path, inputs: dict[str, Path], settings: dict[str, Any]) -> Run:
    job = {"text": TEXT} | ({} if stage == "reference" else {"seed": 0, stage: settings})
    run = Run(tiny.write_job(folder / stage, stage, job, inputs))
    programs = {
        "sft": (sft.train, SftJob), "reference": (reference.compute, ReferenceJob),
        "reward": (reward.train, RewardJob), "dpo": (dpo.train, DpoJob),
    }  # fmt: skip
    train, kind = programs[stage]
    train(kind.model_validate(run.record), run)  # type: ignore[operator]
    return run


def test_every_stage_says_what_it_cut_and_measures_on_the_rest(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    small = {"lora": {"rank": 2, "alpha": 4.0}, "max_steps": 1, "batch_size": 4, "held_out_share": 0.2}
    known = dict(inputs)
    for stage in ("sft", "reference", "reward", "dpo"):
        run = started(stage, tmp_path, known, small)
        known[stage] = run.artifact
        found[stage] = json.loads((run.artifact / "summary.json").read_text())
    for stage in ("reward", "dpo"):
        metrics = found[stage]["metrics"]
        assert metrics[f"{stage}.pairs_equal_once_cut"] == 2 * (
            10 + 7
        )  # of questions 0, 3, ... and 30, 33, ... 48
        assert 0.3 < metrics[f"{stage}.answers_cut"] < 0.9
        assert (
            found[stage]["measured"]["pairs"] == 2 * 13
            if found[stage]["measured"]["split"] == "evaluation"
            else True
        )
        assert any("text.max_answer_tokens=12" in sentence for sentence in found[stage]["warnings"])
    assert found["sft"]["metrics"]["sft.answers_cut"] > 0
    rows = truncation_charts.build_rows({stage: told["metrics"] for stage, told in found.items()})
    assert [row.stage for row in rows] == ["SFT", "reward", "DPO"]
    assert [row.pairs for row in rows] == ["–", "34", "34"]


def test_dropped_messages_stand_in_the_table() -> None:
    known = {"prompts_cut": 0.0, "messages_dropped": 0.3, "answers_cut": 0.0}
    (row,) = truncation_charts.build_rows({"ppo": {f"ppo.{name}": value for name, value in known.items()}})
    assert (row.prompts, row.messages, row.much) == (
        "0.0\N{NO-BREAK SPACE}%",
        "30.0\N{NO-BREAK SPACE}%",
        True,
    )
    (row,) = truncation_charts.build_rows({"ppo": {"ppo.prompts_cut": 0.0}})
    assert (row.messages, row.much) == ("–", False)


@pytest.mark.parametrize("stage", ["reward", "reference"])
def test_nothing_but_pairs_that_are_equal_once_cut_is_refused(
    inputs: dict[str, Path], tmp_path: Path, stage: str
) -> None:
    data = shutil.copytree(inputs["data"], tmp_path / "data")
    rows = [row for row in pq.read_table(data / "reward.parquet").to_pylist() if row["question_id"] % 3 == 0]
    pq.write_table(pa.Table.from_pylist(rows), data / "reward.parquet")
    with pytest.raises(InputError, match=r"All 20 pairs.*text\.max_answer_tokens=12"):
        started(stage, tmp_path, inputs | {"data": data}, {"max_steps": 1})
