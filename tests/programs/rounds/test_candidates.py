"""Test the program candidates: what an answer depends on, rewards, and which prompts are asked."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tasks.config.jobs import CandidatesJob, RewardJob
from tasks.dataset import row_sample
from tasks.programs import reward
from tasks.programs.rounds import candidates
from tasks.programs.rounds.choose_pairs import pair_up
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import sequences
from tasks.rlhf.models import fingerprint, loading, lora, reward_model
from tasks.system.errors import InputError
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 12}
SAMPLE = {"answers": 2, "batch_size": 7}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return data, a model, an ensemble of two reward models, and two policies."""
    root = tmp_path_factory.mktemp("candidates")
    found = {"data": tiny.data_folder(root / "data", 24), "model": tiny.base_folder(root / "base")}
    settings = {"lora": {"rank": 2, "alpha": 4}, "max_steps": 4, "epochs": 10, "members": 2}
    job = {"seed": 0, "text": TEXT, "reward": settings | {"learning_rate": 1e-2}}
    scored = Run(tiny.write_job(root / "reward", "reward", job, found))
    reward.train(RewardJob.model_validate(scored.record), scored)
    return found | {
        "reward": scored.artifact,
        "policy": write_policy(root / "policy", found["model"], seed=1),
        "policy2": write_policy(root / "policy2", found["model"], seed=2),
    }


def write_policy(folder: Path, model: Path, *, seed: int) -> Path:
    """Write an adapter that changes the model."""
    base = loading.load(model, device=tiny.CPU)
    actual = fingerprint.compute_fingerprint(model, base)
    torch.manual_seed(seed)
    config = lora.build_config(rank=2, alpha=4.0, dropout=0.0, targets="all-linear")
    adapted = lora.attach(base, "policy", config)
    with torch.no_grad():
        for weight in lora.parameters(adapted, "policy").values():
            weight.normal_(std=0.3)
    lora.save(adapted, "policy", folder / "adapter", base=actual, score=None)
    return folder


def run_program(folder: Path, inputs: dict[str, Path], **job: Any) -> Run:
    settings = {"seed": 0, "text": TEXT, "sample": SAMPLE} | job
    run = Run(tiny.write_job(folder, "candidates", settings, inputs))
    candidates.sample_candidates(CandidatesJob.model_validate(run.record), run)
    return run


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run.artifact / "candidates.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def sampled(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_program(tmp_path_factory.mktemp("sampled") / "run", inputs)


def test_every_policy_answers_every_prompt_as_often_as_asked(sampled: Run) -> None:
    rows = rows_of(sampled)
    assert [(row["question_id"], row["policy"], row["draw"]) for row in rows] == [
        (id, policy, draw) for id in range(24) for policy in ("policy", "policy2") for draw in range(2)
    ]
    assert all(row["ended"] == (row["tokens"][-1] == tiny.EOS) for row in rows)
    assert max(len(row["tokens"]) for row in rows) <= 12
    draws = [[row["tokens"] for row in rows if row["draw"] == draw] for draw in range(2)]
    assert sum(one != other for one, other in zip(*draws, strict=True)) > 40, "of 48 answers"
    assert pair_up(rows, alike=0.9), "answers of a prompt differ"
    metrics = json.loads((sampled.artifact / "summary.json").read_text())["metrics"]
    assert (metrics["candidates.answers"], metrics["candidates.prompts"]) == (96, 24)
    lines = [json.loads(line) for line in (sampled.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["total"]) for line in lines if "phase" not in line]
    assert steps == [(n, 16) for n in range(1, 17)], "four batches of two draws of two policies"


def test_the_sft_model_answers_beside_the_policies_if_it_is_to(
    inputs: dict[str, Path], sampled: Run, tmp_path: Path
) -> None:
    alone = {name: inputs[name] for name in ("data", "model")}
    only_sft = rows_of(run_program(tmp_path / "alone", alone))
    few = {name: inputs[name] for name in ("data", "model", "policy", "policy2")}
    found = rows_of(run_program(tmp_path / "beside", few, sample=SAMPLE | {"sft": True}))
    answers = {(row["question_id"], row["policy"], row["draw"]): row["tokens"] for row in found}
    expected = {
        (row["question_id"], row["policy"], row["draw"]): row["tokens"] for row in only_sft + rows_of(sampled)
    }
    assert {policy for _, policy, _ in answers} == {"policy", "policy2", "sft"}
    assert answers == expected


def test_an_answer_depends_on_its_policy_draw_and_prompt_alone(
    inputs: dict[str, Path], sampled: Run, tmp_path: Path
) -> None:
    alone = {name: inputs[name] for name in ("data", "model", "policy2")}
    few = run_program(tmp_path / "few", alone, sample=SAMPLE | {"answers": 1, "prompts": 9})
    every = {(row["question_id"], row["policy"], row["draw"]): row["tokens"] for row in rows_of(sampled)}
    found = rows_of(few)
    assert len(found) == 9
    for row in found:
        assert row["tokens"] == every[row["question_id"], "policy2", 0]
        assert row["rewards"] == []
        assert row["reward"] is None


def test_equal_runs_write_equal_bytes(inputs: dict[str, Path], sampled: Run, tmp_path: Path) -> None:
    again = run_program(tmp_path / "again", inputs)
    for name in ("candidates.parquet", "summary.json", "metrics.jsonl"):
        assert (again.artifact / name).read_bytes() == (sampled.artifact / name).read_bytes()


def test_rewards_are_raw_by_member_and_combined_as_ppo_sees_them(
    inputs: dict[str, Path], sampled: Run
) -> None:
    rows = rows_of(sampled)[:6]
    base = loading.load(inputs["model"], device=tiny.CPU)
    model, scorer = reward_model.load(inputs["reward"], base, device=tiny.CPU)
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(f"Question: {row['prompt']}\n\nAnswer:")["input_ids"] for row in rows]
    batch = sequences.join(prompts, [row["tokens"] for row in rows], pad_id=tiny.PAD, device=tiny.CPU)
    expected = reward_model.normalised_rewards(scorer, batch)
    assert [row["reward"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    for number, member in enumerate(scorer.members):
        with member.active() as active:
            raw = sequences.scores(active, member.head, batch)
        assert [row["rewards"][number] for row in rows] == pytest.approx(raw.tolist(), abs=1e-4)
    assert scorer.members[0].std != 1.0, "members are standardised, which raw rewards are not"
    assert model is not None


def test_without_a_policy_the_sft_model_answers(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = run_program(tmp_path / "run", {name: inputs[name] for name in ("data", "model")})
    assert {row["policy"] for row in rows_of(run)} == {"sft"}
    assert len(rows_of(run)) == 48


def test_prompts_of_the_independent_score_are_never_asked_about(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    ids = pq.read_table(inputs["data"] / "rl.parquet")["question_id"].to_pylist()
    held_out = {ids[place] for place in row_sample.draw_sample(ids, 10)}  # as ppo.read_questions draws them
    plain = {name: inputs[name] for name in ("data", "model")}
    run = run_program(tmp_path / "run", plain, held_out_prompts=10)
    assert {row["question_id"] for row in rows_of(run)} == set(ids) - held_out


def test_prompts_are_drawn_by_the_seed(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain = {name: inputs[name] for name in ("data", "model")}
    found = [
        {row["question_id"] for row in rows_of(run_program(tmp_path / f"{seed}", plain, seed=seed,
                                                           sample=SAMPLE | {"prompts": 8}))}
        for seed in (0, 1)
    ]  # fmt: skip
    assert [len(ids) for ids in found] == [8, 8]
    assert found[0] != found[1]


def test_a_split_without_prompts_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    schema = pq.read_schema(inputs["data"] / "rl.parquet")
    pq.write_table(pa.Table.from_pylist([], schema=schema), tmp_path / "data" / "rl.parquet")
    with pytest.raises(InputError, match="The rl split has no prompts to ask about"):
        run_program(tmp_path / "run", {"data": tmp_path / "data", "model": inputs["model"]})
