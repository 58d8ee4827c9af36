"""Test the program winrate on answers of every policy, among them the champion of an earlier run."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import RewardJob, WinrateJob
from tasks.programs import reward, winrate
from tasks.programs.runtime.program import Run
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 12}
POLICIES = ["base", "sft", "champion", "dpo", "ppo"]
SOURCE = {"kind": "own", "path": "votes.jsonl"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return data, a model, its reward model, and answers: good ones, or of the champion and PPO bad ones."""
    root = tmp_path_factory.mktemp("winrate")
    data = tiny.data_folder(root / "data", 40)
    found = {"data": data, "model": tiny.trained_folder(root / "base", data)}
    settings = {
        "lora": {"rank": 2, "alpha": 4},
        "max_steps": 60,
        "epochs": 20,
        "learning_rate": 1e-2,
        "held_out_member": True,
    }
    job = {"seed": 0, "text": TEXT, "reward": settings}
    scored = Run(tiny.write_job(root / "reward", "reward", job, found))
    reward.train(RewardJob.model_validate(scored.record), scored)
    write_answers(root / "answers", data, tiny.tokenizer())
    return found | {"reward": scored.artifact, "answers": root / "answers"}


def write_answers(folder: Path, data: Path, tokenizer: Any) -> None:
    """Write the table of the stage answers; who is not the champion or PPO repeats the question."""
    rows = []
    for number, row in enumerate(pq.read_table(data / "evaluation.parquet").to_pylist()):
        good, bad = row["answers"][0], row["answers"][2]
        texts = {name: bad if name in ("champion", "ppo") else good for name in POLICIES}
        texts["dpo"] = bad if number == 0 else good
        answers = {f"{name}.answer": text for name, text in texts.items()}
        tokens = {
            f"{name}.tokens": [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], tiny.EOS]
            for name, text in texts.items()
        }
        rows.append({"question_id": row["question_id"], "question": row["prompt"], **answers, **tokens})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers.parquet")


@pytest.fixture(scope="module")
def judged(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artifact of the program."""
    job = {"seed": 0, "source": SOURCE, "text": TEXT, "winrate": {"num_questions": 20, "batch_size": 8}}
    run = Run(tiny.write_job(tmp_path_factory.mktemp("judged") / "run", "winrate", job, inputs))
    winrate.evaluate(WinrateJob.model_validate(run.record), run)
    return run.artifact


def test_every_policy_and_the_champion_meet_by_every_judge(judged: Path) -> None:
    metrics = json.loads((judged / "summary.json").read_text())["metrics"]
    pairs = {f"{ours}_vs_{theirs}" for theirs, ours in combinations(["chosen", *POLICIES], 2)}
    for judge in ("reward", "held_out"):
        found = {name.split(".")[1] for name in metrics if name.startswith(f"{judge}_win_rate.")}
        assert found == pairs
        assert metrics[f"{judge}_win_rate.ppo_vs_champion"]["value"] == 0.5, "the same answers"
    results = json.loads((judged / "results.json").read_text())
    assert results["policies"] == POLICIES
    assert [one["name"] for one in results["judges"]][-2:] == ["held_out", "reward"]
    assert {row["policy"] for row in results["leaderboard"]["held_out"]} == {"chosen", *POLICIES}
    assert results["tallies"]["reward.ppo_vs_champion"]["ties"] == 20


def test_the_champions_rate_is_that_of_its_scores(judged: Path) -> None:
    """The outcome of each battle follows from the two scores in the table, whoever the judge is."""
    metrics = json.loads((judged / "summary.json").read_text())["metrics"]
    columns = pq.read_table(judged / "samples.parquet").to_pydict()
    for judge in ("reward", "held_out"):
        ours, theirs = columns[f"dpo.{judge}"], columns[f"champion.{judge}"]
        outcomes = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]
        assert outcomes[0] == 0.5, "to one question both gave the same answer"
        assert metrics[f"{judge}_win_rate.dpo_vs_champion"]["value"] == pytest.approx(sum(outcomes) / 20)
    assert metrics["reward_win_rate.dpo_vs_champion"]["value"] > 0.8, (
        "the reward model has learnt what is good"
    )
