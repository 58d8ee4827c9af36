"""Test PPO-ptx: the text's gradients, their measured weight, the user's own text, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tasks.config.sections.ppo import PretrainingMix
from tasks.programs import ppo
from tasks.programs.ppo_stage import pretraining_mix
from tasks.programs.ppo_stage.pretraining_mix import Norms, TextMix, load_text_mix
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.documents import read_finetune_split
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.batches.packing import pack
from tasks.rlhf.models import loading, lora
from tasks.rlhf.training.rollouts import PpoModels
from tasks.system.errors import InputError
from tests.programs.ppo import ppo_jobs
from tests.support import tiny

BLOCK = 100
EVERY_STEP = {"checkpoint_steps": 10}  # PPO saves ten times as often as the other stages


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("ptx"))


def start(folder: Path, inputs: dict[str, Path], **ptx: Any) -> tuple[TextMix, PpoModels, Run]:
    """Return the mix of a job with random weights in the policy's adapter, and the models."""
    settings = {"weight": 1.0, "blocks": 3, "block_tokens": BLOCK} | ptx
    job, run = ppo_jobs.write_run(folder, inputs, ptx=settings)
    models = ppo.load_models(job, run, tiny.CPU)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in models.policy.values():
            parameter.normal_(std=0.2)
    found = load_text_mix(job, run, loading.load_tokenizer(run.inputs["model"]), models, {})
    assert found is not None
    return found, models, run


def gradients(models: PpoModels) -> Tensor:
    assert all(one.grad is None for one in models.critic.values()), "the critic does not learn from text"
    return torch.cat([one.grad.flatten() for one in models.policy.values()])  # type: ignore[union-attr]


def fill_gradients(models: PpoModels, value: float) -> None:
    for parameter in models.policy.values():
        parameter.grad = torch.full_like(parameter, value)


def test_packed_text_has_the_gradients_of_its_documents_one_by_one(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """The independent reference: plain forward passes and the library's own loss, no packing."""
    mix, models, run = start(tmp_path / "run", inputs, weight=0.7)
    fill_gradients(models, 0.01)
    mixed = mix.add_gradients(models, number=2)
    packed = gradients(models)

    job, _ = ppo_jobs.write_run(tmp_path / "other", inputs)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    documents = read_finetune_split(run, pair_tables.build_encoder(job.text, tokenizer, {}), loss_on="last")
    blocks = [documents[i] for i in range(len(documents))]
    ids = pack(blocks, block_tokens=BLOCK, pad_id=tokenizer.pad_token_id)
    rows = schedules.batch_indices(2, num_rows=len(ids.labels), batch_size=3, seed=0)
    taken = [one for one in documents if _is_inside(one.ids, ids.input_ids[rows].tolist())]
    assert len(taken) > 3, "some block holds several documents"
    for parameter in models.policy.values():
        parameter.grad = None
    total, count = torch.zeros(()), 0
    with lora.active(models.model, "policy") as policy:
        for one in taken:
            logits = policy(torch.tensor([one.ids])).logits[0, :-1]
            counted = torch.tensor(one.target[1:])
            total = total + F.cross_entropy(
                logits[counted], torch.tensor(one.ids[1:])[counted], reduction="sum"
            )
            count += int(counted.sum())
        (0.7 * total / count).backward()
    assert mixed.loss == pytest.approx((total / count).item(), rel=1e-5)
    torch.testing.assert_close(packed - 0.01, gradients(models), atol=1e-6, rtol=1e-4)


def _is_inside(ids: list[int], rows: list[list[int]]) -> bool:
    return any(row[at : at + len(ids)] == ids for row in rows for at in range(len(row)))


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_change_nothing(inputs: dict[str, Path], tmp_path: Path, micro: int) -> None:
    mix, models, _ = start(tmp_path / "run", inputs)
    mix.add_gradients(models, 0)
    whole = gradients(models)
    for parameter in models.policy.values():
        parameter.grad = None
    mix.micro_batch = micro
    mix.add_gradients(models, 0)
    torch.testing.assert_close(gradients(models), whole, atol=1e-6, rtol=1e-4)


def test_the_weight_is_measured_and_then_fixed(inputs: dict[str, Path], tmp_path: Path) -> None:
    shared = {"weight": 0.0, "gradient_share": 0.25, "measured_steps": 2}
    mix, models, _ = start(tmp_path / "run", inputs, **shared)
    size = sum(one.numel() for one in models.policy.values())
    weights, norms = [], []
    for number, value in enumerate((0.01, 0.03, 0.5)):
        fill_gradients(models, value)
        weights.append(mix.add_gradients(models, number).weight)
        norms.append((gradients(models) - value).norm().item() / weights[-1])
    of_policy = [value * size**0.5 for value in (0.01, 0.03)]
    assert weights[0] * norms[0] == pytest.approx(0.25 * of_policy[0], rel=1e-3), "a quarter of the policy's"
    assert weights[1] == pytest.approx(0.25 * sum(of_policy) / sum(norms[:2]), rel=1e-3)
    assert weights[2] == weights[1], "measured no longer"


def test_without_weight_nothing_is_read(inputs: dict[str, Path], tmp_path: Path) -> None:
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs)
    assert load_text_mix(job, run, None, None, {}) is None  # type: ignore[arg-type]


def test_text_of_ones_own_is_split_into_blocks_and_read_as_far_as_it_is_needed(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    end = tiny.tokenizer().eos_token
    rows = ["tar files " * 200, f"copy {end} a disk", *["the user lists " * 30] * 500]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    job, run = ppo_jobs.write_run(
        tmp_path / "run", inputs, ptx={"weight": 1.0, "block_tokens": 64, "blocks": 4, "path": str(path)}
    )
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    documents = pretraining_mix.read_text(path, tokenizer, job.ppo, 64)
    assert all(1 < len(one.ids) <= 64 and all(one.target) for one in documents)
    assert sum(len(one.ids) for one in documents) < 4 * 64 * job.ppo.num_updates + 2000
    ends = [one.ids for one in documents if tiny.EOS in one.ids]
    assert all(one.index(tiny.EOS) == len(one) - 1 for one in ends), "an end that is written out ends nothing"
    assert tokenizer.decode(documents[0].ids).startswith("tar files tar files")
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(InputError, match=r"ppo\.ptx\.path: text\.jsonl, row 2 has no column text"):
        pretraining_mix.read_text(path, tokenizer, job.ppo, 64)


@pytest.mark.parametrize("ptx", [{"weight": 0.5}, {"gradient_share": 0.5, "measured_steps": 6}])
def test_a_killed_run_resumes_with_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path, ptx: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 3, "ptx": ptx | {"blocks": 2, "block_tokens": BLOCK}}
    whole = ppo_jobs.write_run(tmp_path / "whole", inputs, machine=EVERY_STEP, **settings)
    ppo.train(*whole)
    cut = ppo_jobs.write_run(tmp_path / "cut", inputs, machine=EVERY_STEP, **settings)

    class Killed(Exception):
        pass

    honest = ppo.check_rollout

    def dies(rollout: Any, step: int) -> None:
        if step == 2:
            raise Killed
        honest(rollout, step)

    monkeypatch.setattr(ppo, "check_rollout", dies)
    with pytest.raises(Killed):
        ppo.train(*cut)
    monkeypatch.setattr(ppo, "check_rollout", honest)
    ppo.train(*cut)
    ppo_jobs.assert_same_weights(whole[1], cut[1])
    steps = [
        [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]
        for _, run in (whole, cut)
    ]
    assert [line["text_loss"] for line in steps[0]] == [line["text_loss"] for line in steps[1]]
    assert [line["text_weight"] for line in steps[0]] == [line["text_weight"] for line in steps[1]]


def test_every_optimizer_step_of_a_run_takes_the_next_text(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"weight": 0.5, "blocks": 2, "block_tokens": BLOCK}
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs, steps=2, ptx=settings)
    numbers: list[int] = []
    honest = TextMix.add_gradients

    def watched(self: TextMix, models: PpoModels, number: int) -> pretraining_mix.Mixed:
        numbers.append(number)
        return honest(self, models, number)

    monkeypatch.setattr(TextMix, "add_gradients", watched)
    ppo.train(job, run)
    assert numbers == list(range(8)), "two steps, two passes, two mini-batches"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        PretrainingMix(weight=1, gradient_share=0.1)
    with pytest.raises(ValidationError, match="text that has no weight"):
        PretrainingMix(path="text.jsonl")


def test_blocks_that_would_cut_answers_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ppo\.ptx\.block_tokens=32 would cut the end off an answer"):
        start(tmp_path / "run", inputs, block_tokens=32)


def test_blocks_longer_than_the_models_context_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n' * 9)
    with pytest.raises(InputError, match=r"ppo\.ptx\.block_tokens is 512, but this model reads 128 tokens"):
        start(tmp_path / "run", inputs | {"text": path}, block_tokens=512, path=str(path))


def test_blocks_have_room_for_a_prompt_and_its_answer_by_default(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    mix, _, _ = start(tmp_path / "run", inputs, block_tokens=None)
    assert mix.packed.block_tokens == sum(ppo_jobs.TEXT.values())


def test_while_the_critic_alone_learns_no_text_is_used(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = {"weight": 0.5, "blocks": 2, "block_tokens": BLOCK}
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs, steps=2, critic_warmup_steps=1, ptx=settings)
    ppo.train(job, run)
    logged = [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]
    assert ["text_loss" in line for line in logged] == [False, True]


def test_norms_survive_a_checkpoint_of_json() -> None:
    assert Norms(*json.loads(json.dumps(Norms(1.5, 2.5)))) == Norms(1.5, 2.5)
