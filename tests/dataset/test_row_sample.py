"""Test that rows are drawn by the hash of an id, so that no part of a table in the order of ids is
favoured.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import AnswersJob, RewardJob, WinrateJob
from tasks.config.sections.models import Text
from tasks.config.sections.reward import Reward
from tasks.dataset.row_sample import draw_sample
from tasks.programs import answers, reward, winrate
from tasks.programs.runtime import reward_tests
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.truncation import Encoder
from tests.support import tiny


def test_a_draw_is_spread_over_the_ids_and_never_its_first_rows() -> None:
    taken = draw_sample(range(10_000), 1_000)
    assert len(set(taken)) == 1_000
    halves = sum(place < 5_000 for place in taken)
    assert 430 < halves < 570  # 500, and four standard deviations of 15
    assert abs(sum(taken) / 1_000 - 5_000) < 400


def test_a_small_draw_is_a_part_of_a_larger_one_whatever_else_is_there() -> None:
    ids = [7 * place + 3 for place in range(400)]
    large = [ids[place] for place in draw_sample(ids, 100)]
    assert [ids[place] for place in draw_sample(ids, 10)] == large[:10]
    fewer = ids[::2]
    assert [fewer[place] for place in draw_sample(fewer, 400)] == [
        id for id in (ids[place] for place in draw_sample(ids, 400)) if id in set(fewer)
    ]


def test_a_table_that_is_short_enough_is_taken_whole_and_any_id_is_one() -> None:
    assert sorted(draw_sample([5, 4, 3], 9)) == [0, 1, 2]
    assert draw_sample([], 3) == []
    assert len(draw_sample([-1, 2**62, 0], 2)) == 2
    assert len(draw_sample([8, 8, 8], 2)) == 2


def test_policies_answer_drawn_questions_and_the_first_of_the_table_have_no_advantage(tmp_path: Path) -> None:
    data = tiny.data_folder(tmp_path / "data", 24)
    inputs = {"data": data, "model": tiny.base_folder(tmp_path / "base")}
    text = {"max_prompt_tokens": 48, "max_answer_tokens": 8}
    job: dict[str, Any] = {
        "seed": 0,
        "text": text,
        "reward": {"lora": {"rank": 2, "alpha": 4.0}, "max_steps": 1, "red_team_answers": 5},
    }
    judge = Run(tiny.write_job(tmp_path / "reward", "reward", job, inputs))
    reward.train(RewardJob.model_validate(judge.record), judge)
    job = {"seed": 0, "text": text, "source": {"kind": "own", "path": "x"}, "winrate": {"num_questions": 6}}
    sampled = Run(
        tiny.write_job(
            tmp_path / "answers",
            "answers",
            {name: job[name] for name in ("seed", "text", "winrate")},
            inputs | {"base": inputs["model"]},
        )
    )
    answers.answer(AnswersJob.model_validate(sampled.record), sampled)
    inputs |= {"reward": judge.artifact, "answers": sampled.artifact}
    run = Run(tiny.write_job(tmp_path / "winrate", "winrate", job, inputs))
    winrate.evaluate(WinrateJob.model_validate(run.record), run)
    asked = pq.read_table(data / "evaluation.parquet").to_pylist()
    rows = pq.read_table(run.artifact / "samples.parquet").to_pylist()
    ids = [row["question_id"] for row in asked]
    assert (
        [row["question_id"] for row in rows] == sorted(ids[place] for place in draw_sample(ids, 6)) != ids[:6]
    )
    assert [row["question"] for row in rows] == [
        row["prompt"] for row in asked if row["question_id"] in {r["question_id"] for r in rows}
    ]
    told = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    assert told["winrate.answers_cut"] > 0.9  # nearly every voted answer has more than 8 tokens


def test_answers_that_normalise_and_are_attacked_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_tests, "REFERENCE_ANSWERS", 6)
    data = tiny.data_folder(tmp_path / "data", 40)
    run = Run(tiny.write_job(tmp_path / "reward", "reward", {}, {"data": data}))
    rows = pq.read_table(data / "finetune.parquet").to_pylist()
    encoder = Encoder(
        tiny.tokenizer(), template="question-answer", max_prompt_tokens=48, max_answer_tokens=40
    )
    job = RewardJob(seed=0, text=Text(), reward=Reward(red_team_answers=9))
    reference, attacked = reward_tests.read_answers(job, run, encoder)
    wanted = [rows[place] for place in draw_sample([row["question_id"] for row in rows], 9)]
    expected = [
        (encoder.encode_prompt(row["prompt"]), encoder.encode_answer(row["answer"])) for row in wanted
    ]
    assert (reference, attacked) == (expected[:6], expected)
