"""Test RLOO and GRPO: groups of answers, no critic, the KL in the loss, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from tasks.config.sections.ppo import Ppo
from tasks.programs import ppo
from tasks.programs.ppo_stage.estimate_advantages import estimate_advantages
from tasks.programs.runtime.program import Run
from tasks.rlhf.training.rollouts import Rollout, ScoreRule
from tests.programs.ppo import ppo_jobs

EVERY_STEP = {"checkpoint_steps": 10}  # PPO saves ten times as often as the other stages
VARIANTS: list[dict[str, Any]] = [
    {"algorithm": "rloo"},
    {"algorithm": "grpo"},
    {"algorithm": "grpo", "scale_by_group": True, "kl_penalty": "k3", "normalise_length": True},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("ppo"))


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def files(run: Run) -> dict[str, bytes]:
    return {
        path.relative_to(run.artifact).as_posix(): path.read_bytes()
        for path in sorted(run.artifact.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("changed", VARIANTS)
def test_a_policy_is_trained_without_a_critic(
    inputs: dict[str, Path], tmp_path: Path, changed: dict[str, Any]
) -> None:
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs, rollouts=16, learning_rate=5e-3, **changed)
    ppo.train(job, run)
    assert {name.partition("/")[0] for name in files(run)} >= {"adapter", "summary.json"}
    assert not any(name.startswith("critic") for name in files(run))
    logged = lines(run)
    assert [line["step"] for line in logged] == [1, 2]
    assert "value_loss" not in logged[0]
    assert 0 <= logged[0]["equal_groups"] < 1
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert logged[1]["kl"] != logged[0]["kl"], "the policy has moved"


@pytest.mark.parametrize("changed", VARIANTS)
def test_a_killed_run_ends_with_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    job, whole = ppo_jobs.write_run(tmp_path / "whole", inputs, steps=3, **changed)
    ppo.train(job, whole)
    job, cut = ppo_jobs.write_run(tmp_path / "cut", inputs, machine=EVERY_STEP, steps=3, **changed)
    ppo_jobs.train_with_a_cut(job, cut, monkeypatch)
    assert files(cut) == files(whole)


def test_each_prompt_is_answered_several_times(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[list[int]]] = []
    roll_out = ppo.roll_out

    def watched(models: Any, prompts: list[list[int]], **settings: Any) -> Rollout:
        asked.append(prompts)
        return roll_out(models, prompts, **settings)

    monkeypatch.setattr(ppo, "roll_out", watched)
    ppo.train(*ppo_jobs.write_run(tmp_path / "run", inputs, algorithm="rloo", answers_per_prompt=2))
    for prompts in asked:
        assert len(prompts) == 8
        assert prompts[::2] == prompts[1::2]
        assert len({tuple(prompt) for prompt in prompts}) > 2


def rollout(scores: list[float], lengths: list[int], *, log_ratio: float = 0.0) -> Rollout:
    """Return answers to as many prompts as fit; ``log_ratio`` is that of policy and reference a token."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logp = torch.where(mask, -1.0, 0.0)
    batch: Any = type("Batch", (), {"response_mask": mask})
    return Rollout(
        batch=batch,
        logp=logp,
        ref_logp=torch.where(mask, logp - log_ratio, 0.0),
        values=None,
        score=torch.tensor(scores),
        ended=torch.ones(len(scores), dtype=torch.bool),
        sampler_logp=logp,
    )


def advantages(found: Rollout, **settings: Any) -> Tensor:
    job = Ppo(rollouts=4, minibatch=4, **settings)
    estimated, returns = estimate_advantages(found, job, kl_coefficient=0.1)
    assert returns is None
    return estimated


def test_all_tokens_of_an_answer_have_its_advantage() -> None:
    scores, lengths = [1.0, 0.0, 0.5, -0.5], [1, 3, 2, 2]
    found = advantages(rollout(scores, lengths), algorithm="rloo")
    for row, (expected, length) in enumerate(zip([1, -1 / 3, 1 / 3, -1], lengths, strict=True)):
        assert found[row].tolist() == pytest.approx([expected] * length + [0.0] * (3 - length), abs=1e-6)


def test_the_kl_of_the_whole_answer_is_in_its_reward_or_not_at_all() -> None:
    """Four nats a token, of which beta is 0.1: the longer answers are the worse ones."""
    equal = rollout([1.0] * 4, [1, 2, 3, 4], log_ratio=4.0)
    found = advantages(equal, algorithm="grpo")[:, 0]
    assert found.tolist() == pytest.approx([0.6, 0.2, -0.2, -0.6], abs=1e-5)
    assert advantages(equal, algorithm="grpo", kl_penalty="k2").abs().max() == 0


@pytest.mark.parametrize("kl_penalty", ["k2", "k3"])
def test_a_kl_in_the_loss_holds_the_policy(inputs: dict[str, Path], tmp_path: Path, kl_penalty: str) -> None:
    drift = []
    for coefficient in (0.0, 50.0):
        settings = {"algorithm": "grpo", "steps": 5, "learning_rate": 5e-3, "kl_penalty": kl_penalty}
        job, run = ppo_jobs.write_run(
            tmp_path / f"{coefficient}", inputs, kl_coefficient=coefficient, on_alarm="warn", **settings
        )
        ppo.train(job, run)
        drift.append(lines(run)[-1]["kl_k3"])
    assert drift[1] < 0.5 * drift[0]


def test_with_normalised_length_each_answer_weighs_the_same() -> None:
    """Sums over tokens, which the loss divides by the number of all tokens."""
    found = rollout([1.0, 0.0, 0.5, -0.5], [1, 3, 2, 2])
    by_token = advantages(found, algorithm="rloo").sum(dim=1)
    by_answer = advantages(found, algorithm="rloo", normalise_length=True).sum(dim=1)
    assert by_token.tolist() == pytest.approx([1, -1, 2 / 3, -2], abs=1e-5)
    assert by_answer.tolist() == pytest.approx([2, -2 / 3, 2 / 3, -2], abs=1e-5)


def test_a_constant_that_is_added_to_a_prompts_scores_changes_no_weight(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"algorithm": "rloo", "steps": 1}
    job, plain = ppo_jobs.write_run(tmp_path / "plain", inputs, **settings)
    ppo.train(job, plain)
    roll_out = ppo.roll_out

    def shifted(*args: Any, **kwargs: Any) -> Rollout:
        found = roll_out(*args, **kwargs)
        offsets = torch.tensor([8.0, -4.0]).repeat_interleave(4)  # powers of two: the sums stay exact enough
        return found._replace(score=found.score + offsets)

    monkeypatch.setattr(ppo, "roll_out", shifted)
    job, moved = ppo_jobs.write_run(tmp_path / "moved", inputs, **settings)
    ppo.train(job, moved)
    weights = [ppo_weights(run) for run in (plain, moved)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=1e-3)


def ppo_weights(run: Run) -> dict[str, Tensor]:

    return load_file(run.artifact / "adapter" / "adapter_model.safetensors")


def test_scores_are_clipped_and_answers_without_an_end_get_their_reward() -> None:
    scores, ended = torch.tensor([5.0, -5.0, 2.0, float("nan")]), torch.tensor([True, True, False, False])
    replaced = ScoreRule("replace", -3.0, max_score=4.0)(scores, ended)
    assert replaced[:3].tolist() == [4.0, -4.0, -3.0]
    assert replaced[3].isnan(), "a number in its place would hide what is wrong"
    assert ScoreRule("add", -3.0)(scores, ended)[:3].tolist() == [5.0, -5.0, -1.0]


def test_in_the_warmup_the_critic_alone_learns(inputs: dict[str, Path], tmp_path: Path) -> None:
    job, run = ppo_jobs.write_run(tmp_path / "warm", inputs, steps=2, critic_warmup_steps=2)
    ppo.train(job, run)
    policy = ppo_weights(run)
    assert all(value.abs().max() == 0 for name, value in policy.items() if "lora_B" in name)
    job, whole = ppo_jobs.write_run(tmp_path / "whole", inputs, steps=2)
    ppo.train(job, whole)
    assert any(value.abs().max() > 0 for name, value in ppo_weights(whole).items() if "lora_B" in name)
    values = [line["value_loss"] for line in lines(run)]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"algorithm": "rloo", "answers_per_prompt": 1}, "rloo compares the answers to one prompt"),
        ({"algorithm": "grpo", "rollouts": 6}, "rollouts, 6, must be a multiple of answers_per_prompt, 4"),
        ({"algorithm": "rloo", "scale_by_group": True}, "scale_by_group is for algorithm=grpo"),
        ({"algorithm": "rloo", "critic_warmup_steps": 1}, "rloo has no critic"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Ppo(**settings)
