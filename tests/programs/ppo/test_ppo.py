"""Test PPO: gradients are independent of splits and padding, each check finds its planted cause, and a run
works.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tasks.config.jobs import PpoJob, RewardJob
from tasks.config.sections.samples import Samples
from tasks.programs import ppo, reward
from tasks.programs.ppo_stage import update_policy
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import rewards, sanity_checks
from tasks.rlhf.algorithms.advantages import gae, whiten
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.batches import forward, sampling, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.models import loading, lora, reward_model
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.rollouts import PpoModels, Rollout, ScoreRule
from tasks.system.errors import InputError
from tests.programs.ppo import ppo_jobs
from tests.programs.ppo.ppo_jobs import LORA, TEXT
from tests.support import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write data, a base that has learnt to end its answers, and a reward model on it."""
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("ppo"))


Start = Callable[..., tuple[PpoJob, Run]]


@pytest.fixture
def started(inputs: dict[str, Path], tmp_path: Path) -> Start:
    """Create a PPO job of 8 rollouts a batch, changed as asked, in its folder."""

    def prepared(
        name: str = "ppo",
        *,
        machine: dict[str, Any] | None = None,
        given: dict[str, Path] | None = None,
        text: dict[str, int] | None = None,
        **changed: Any,
    ) -> tuple[PpoJob, Run]:
        given_inputs = inputs | (given or {})
        return ppo_jobs.write_run(tmp_path / name, given_inputs, machine=machine, text=text, **changed)

    return prepared


# ---------------------------------------------------------------------------------------- gradients


def sampled(job: PpoJob, run: Run, models: PpoModels, *, times: int = 1, is_checked: bool = False) -> Rollout:
    """Sample an answer to each of the first eight prompts, ``times`` over."""
    rule = ScoreRule("replace", job.ppo.missing_eos_reward)
    return ppo_jobs.sample_answers(job, run, models, times=times, rule=rule, is_checked=is_checked)


@pytest.fixture
def batch(started: Start) -> tuple[PpoJob, PpoModels, Rollout, Tensor, Tensor]:
    """Return eight answers, sampled by an older policy than the one that is updated."""
    job, run = started(clip_range=0.05)
    models = ppo.load_models(job, run, tiny.CPU)
    torch.manual_seed(11)
    rollout = sampled(job, run, models)
    with torch.no_grad():
        for name, parameter in (models.policy | models.critic).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    mask = rollout.batch.response_mask
    assert len(set(mask.sum(dim=1).tolist())) > 2  # a mean of means would differ
    token_rewards = rewards.token_rewards(
        rollout.score, rollout.logp, rollout.ref_logp, mask, kl_coefficient=0.1
    )
    advantages, returns = gae(token_rewards, rollout.values, mask, discount=1.0, gae_lambda=0.95)
    return job, models, rollout, whiten(advantages, mask), returns


def gradients(
    job: PpoJob,
    models: PpoModels,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    rows: list[int],
    micro: int,
) -> tuple[Tensor, Any]:
    parameters = models.policy | models.critic
    for parameter in parameters.values():
        parameter.grad = None
    update = update_policy.accumulate_gradients(
        models,
        rollout,
        advantages,
        returns,
        torch.tensor(rows),
        job.ppo,
        kl_coefficient=0.1,
        micro_batch=micro,
    )
    assert all(parameter.grad is not None for parameter in parameters.values())
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values()]), update  # type: ignore[union-attr]


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_change_neither_gradients_nor_figures(batch: tuple[Any, ...], micro: int) -> None:
    whole, figures = gradients(*batch, rows=list(range(8)), micro=0)
    assert whole.abs().max() > 1e-2
    assert 0.05 < figures.clip_fraction < 0.95
    parts, same = gradients(*batch, rows=list(range(8)), micro=micro)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    assert same == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_order_and_padding_change_nothing(batch: tuple[Any, ...]) -> None:
    job, models, rollout, advantages, returns = batch
    whole, figures = gradients(*batch, rows=list(range(8)), micro=0)
    shuffled, _ = gradients(*batch, rows=[5, 2, 7, 0, 1, 6, 3, 4], micro=2)
    torch.testing.assert_close(shuffled, whole, atol=1e-5, rtol=1e-4)

    ids, mask = rollout.batch
    junk = torch.where(torch.arange(ids.shape[1]) > sequence_ends(mask)[:, None], 77, ids)
    wider = Sequences(F.pad(junk, (0, 5), value=55), F.pad(mask, (0, 5)))
    padded = Rollout(
        *(
            F.pad(x, (0, 5), value=1e3) if isinstance(x, Tensor) and x.dim() == 2 else x
            for x in rollout._replace(batch=None)
        )
    )  # type: ignore[arg-type]
    again, same = gradients(
        job,
        models,
        padded._replace(batch=wider),
        F.pad(advantages, (0, 5), value=1e3),
        F.pad(returns, (0, 5), value=1e3),
        list(range(8)),
        0,
    )
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-4)
    assert same == pytest.approx(figures, rel=1e-4, abs=1e-6)


def sequence_ends(mask: Tensor) -> Tensor:
    return rewards.last_position(mask)


def test_a_minibatch_is_normalised_by_its_own_tokens(batch: tuple[Any, ...]) -> None:
    rollout = batch[2]
    lengths = rollout.batch.response_mask.sum(dim=1).tolist()
    halves = [gradients(*batch, rows=rows, micro=0)[0] for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    whole, _ = gradients(*batch, rows=list(range(8)), micro=0)
    a, b = sum(lengths[:4]), sum(lengths[4:])
    torch.testing.assert_close((a * halves[0] + b * halves[1]) / (a + b), whole, atol=1e-5, rtol=1e-4)


def test_policy_and_critic_do_not_touch_each_other(batch: tuple[Any, ...]) -> None:
    job, models, rollout, advantages, returns = batch
    gradients(*batch, rows=list(range(8)), micro=0)
    before = [parameter.grad.clone() for parameter in models.policy.values() if parameter.grad is not None]
    gradients(job, models, rollout, advantages, returns + 3.0, list(range(8)), 0)
    assert all(
        torch.equal(a, parameter.grad)
        for a, parameter in zip(before, models.policy.values(), strict=True)
        if parameter.grad is not None
    )


# ------------------------------------------------------------------------------------------ rollout


def test_a_rollout_is_what_the_four_roles_say(started: Start) -> None:
    job, run = started(
        missing_eos_reward=-7.0, temperature=0.8, text={"max_answer_tokens": 16}
    )  # too short for some answers
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    models = ppo.load_models(job, run, tiny.CPU)
    torch.manual_seed(3)
    rollout = sampled(job, run, models, times=4)
    mask = rollout.batch.response_mask
    last = rollout.batch.input_ids[torch.arange(32), rewards.last_position(mask)]
    assert (last == tokenizer.eos_token_id).tolist() == rollout.ended.tolist()
    assert rollout.ended.any()
    assert not rollout.ended.all()
    assert (rollout.score[~rollout.ended] == -7.0).all()
    assert (rollout.score[rollout.ended] > -7.0).all()
    torch.testing.assert_close(rollout.logp, rollout.ref_logp, atol=1e-5, rtol=1e-5)  # an untrained policy
    assert rollout.scorer_logp is None
    assert torch.equal(rollout.sampler_logp, rollout.logp)
    checked = sampled(job, run, models, times=4, is_checked=True)
    assert checked.scorer_logp is not None
    torch.testing.assert_close(checked.sampler_logp, checked.scorer_logp, atol=1e-5, rtol=1e-5)
    assert not torch.equal(checked.sampler_logp, checked.scorer_logp)  # two ways of computing it
    assert torch.equal(checked.logp, checked.sampler_logp)  # a checked step's weights are any other's

    # the critic starts as the normalised reward: before the last token its value is the reward model's
    # score of the text so far
    record = json.loads((run.inputs["reward"] / "reward.json").read_text())
    row = int(torch.where(mask.sum(dim=1) > 2)[0][0])
    end = int(rewards.last_position(mask)[row])
    shorter = Sequences(rollout.batch.input_ids[row : row + 1, :end], mask[row : row + 1, :end])
    with lora.active(models.model, "reward") as base, torch.no_grad():
        score = sequences.scores(base, models.reward.members[0].head, shorter)[0]
    assert rollout.values[row, end].item() == pytest.approx(
        (score.item() - record["mean"]) / record["std"], abs=1e-4
    )


# --------------------------------------------------------------------------------- planted mistakes


def fails(job: PpoJob, run: Run, cause: str) -> None:
    with pytest.raises(StepZeroError, match=cause):
        ppo.train(job, run)
    assert not (run.artifact / "summary.json").exists()


def test_dropout_while_training_is_noticed(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = forward.hidden_states
    monkeypatch.setattr(
        sequences,
        "hidden_states",
        lambda *args: F.dropout(honest(*args), p=0.02, training=torch.is_grad_enabled()),
    )
    fails(*started(), "The first mini-batch has mean ratio")


def test_dropout_while_scoring_is_noticed(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sequences.log_probs
    monkeypatch.setattr(
        sequences, "log_probs", lambda *args, **kwargs: F.dropout(honest(*args, **kwargs), p=0.1)
    )
    fails(*started(), "Sampler's and scorer's")


def test_ratios_off_to_both_sides_are_noticed() -> None:
    sanity_checks.check_ratio(1.0, 0.0, 1e-9, tolerance=1e-3)
    with pytest.raises(StepZeroError):
        sanity_checks.check_ratio(1.0, 0.0, 1e-3, tolerance=1e-3)
    with pytest.raises(StepZeroError):
        sanity_checks.check_ratio(1.0, 0.01, 0.0, tolerance=1e-3)
    with pytest.raises(StepZeroError):
        sanity_checks.check_ratio(float("nan"), 0.0, 0.0, tolerance=1e-3)


def test_another_temperature_in_the_sampler_is_noticed(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sampling.sample
    monkeypatch.setattr(
        sampling, "sample", lambda *args, **kwargs: honest(*args, **(kwargs | {"temperature": 0.9}))
    )
    fails(*started(), "Sampler's and scorer's")


def test_padding_that_is_seen_by_the_sampler_is_noticed(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sampling.pad_left

    def seen(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
        ids, mask = honest(prompts, pad_id, device)
        assert not mask.all() or len(prompts) == 1
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(sampling, "pad_left", seen)
    fails(*started(), "left padding")


def test_a_changed_reward_adapter_is_noticed(started: Start, inputs: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(inputs["reward"], changed)
    weights = load_file(changed / "adapter" / lora.WEIGHTS)
    name = next(key for key in weights if "lora_B" in key)
    save_file(weights | {name: weights[name] + 0.3}, changed / "adapter" / lora.WEIGHTS)
    fails(*started(given={"reward": changed}), "reward model's probe scores")


def test_a_reward_model_of_another_base_is_the_users_to_mend(started: Start, tmp_path: Path) -> None:
    job, run = started(given={"model": tiny.base_folder(tmp_path / "other")})
    with pytest.raises(InputError, match="does not belong to this base: its base's weights were"):
        ppo.train(job, run)


def test_an_adapter_that_is_not_fresh_is_noticed(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lora.parameters

    def moved(model: PeftModel, name: str) -> dict[str, torch.nn.Parameter]:
        parameters = honest(model, name)
        if name == "policy":
            for key, parameter in parameters.items():
                if "lora_B" in key:
                    parameter.data.fill_(0.05)
        return parameters

    monkeypatch.setattr(lora, "parameters", moved)
    fails(*started(), "An untrained policy is")


def test_a_base_that_was_changed_is_noticed(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lora.load

    def merged(
        model: PreTrainedModel | PeftModel, name: str, folder: Path
    ) -> tuple[PeftModel, Tensor | None]:
        loaded, score = honest(model, name, folder)
        loaded.get_base_model().model.norm.weight.data.mul_(1.0001)
        return loaded, score

    monkeypatch.setattr(lora, "load", merged)
    fails(*started(), "Adapter-off and bare logits")


def test_parameters_without_gradient_are_noticed(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lora.active

    def confused(model: PeftModel, name: str | None) -> AbstractContextManager[PreTrainedModel]:
        return honest(model, "reward" if name == "critic" else name)

    monkeypatch.setattr(lora, "active", confused)
    fails(*started(), "trainable parameters got no gradient")


@pytest.mark.parametrize("culprit", ["base", "reward adapter", "reward head"])
def test_frozen_weights_that_move_are_noticed(
    started: Start, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    honest = ppo.load_models
    models: list[PpoModels] = []

    def kept(*args: Any) -> PpoModels:
        models.append(honest(*args))
        return models[0]

    def sabotage(*args: Any, **kwargs: Any) -> None:
        if culprit == "reward head":
            next(models[0].reward.members[0].head.parameters()).data.add_(1e-3)
            return
        marker = ".reward." if culprit == "reward adapter" else "embed_tokens"
        next(p for name, p in models[0].model.named_parameters() if marker in name).data.add_(1e-3)

    monkeypatch.setattr(ppo, "load_models", kept)
    monkeypatch.setattr(checkpoints, "save", sabotage)
    fails(*started(machine={"checkpoint_steps": 1}), "Frozen weights changed")


def test_a_resume_is_checked_too(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    job, run = started(machine={"checkpoint_steps": 1}, steps=4)
    honest = Run.log

    def cut(run: Run, step: int, total: int, **metrics: float) -> None:
        honest(run, step, total, **metrics)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", cut)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(job, run)
    monkeypatch.setattr(Run, "log", honest)
    found = checkpoints.latest(run.checkpoints)
    assert found is not None
    assert found.step == 2
    sample = sampling.sample
    monkeypatch.setattr(
        sampling, "sample", lambda *args, **kwargs: sample(*args, **(kwargs | {"temperature": 0.9}))
    )
    fails(job, run, "Sampler's and scorer's")


# --------------------------------------------------------------------------------------- whole runs


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_the_policy_and_leaves_its_artifact(started: Start) -> None:
    job, run = started(steps=3, kl_target=0.5, kl_horizon=50)
    ppo.train(job, run)
    steps = lines(run)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert abs(steps[0]["kl"]) < 1e-4
    assert abs(steps[0]["kl_k3"]) < 1e-4
    assert steps[-1]["kl_k3"] > 1e-4
    assert steps[1]["kl_coefficient"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 50))
    assert all(
        torch.isfinite(torch.tensor([float(value) for value in line.values()])).all() for line in steps
    )
    for folder in ("adapter", "critic"):
        weights = load_file(run.artifact / folder / lora.WEIGHTS)
        assert any(value.any() for key, value in weights.items() if "lora_B" in key)
    summary = json.loads((run.artifact / "summary.json").read_text())
    assert summary["metrics"]["ppo.rollout_reward"] == steps[-1]["reward"]


def test_answers_that_do_not_end_are_warned_of(started: Start) -> None:
    def warnings(name: str, **changed: Any) -> list[str]:
        job, run = started(name, **changed)
        ppo.train(job, run)
        assert run.mean("ended") == pytest.approx(sum(line["ended"] for line in lines(run)) / 2)
        found: list[str] = json.loads((run.artifact / "summary.json").read_text())["warnings"]
        return found

    assert warnings("long") == []
    (warning,) = warnings("short", text={"max_answer_tokens": 2})
    assert "of the sampled answers ended within text.max_answer_tokens = 2;" in warning


def test_a_fooled_reward_model_stops_ppo_where_it_is_told_to(
    started: Start, inputs: dict[str, Path], tmp_path: Path
) -> None:
    fooled = tmp_path / "fooled"
    shutil.copytree(inputs["reward"], fooled)
    record = json.loads((fooled / "reward.json").read_text())
    (fooled / "reward.json").write_text(json.dumps(record | {"fooled": ["long_fences"]}))
    job, run = started("stops", given={"reward": fooled}, allow_exploitable=False)
    with pytest.raises(InputError, match=r"fooled by answers that are worth nothing \(long_fences\)"):
        ppo.train(job, run)
    ppo.train(*started("goes-on", given={"reward": fooled}))


@pytest.mark.parametrize(
    "settings",
    [{"members": 2, "uncertainty_penalty": 1.0}, {"tune": "full", "learning_rate": 1e-3}],
    ids=["ensemble", "full"],
)
def test_ppo_trains_against_every_kind_of_reward_model(
    started: Start, inputs: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    job = {"seed": 0, "text": TEXT, "reward": {"lora": LORA, "max_steps": 4} | settings}
    run = Run(
        tiny.write_job(tmp_path / "reward", "reward", job, {name: inputs[name] for name in ("data", "model")})
    )
    reward.train(RewardJob.model_validate(run.record), run)
    against, rollouts = started("ppo", given={"reward": run.artifact})
    ppo.train(against, rollouts)  # with the step-zero checks: the reward model's probes give what was stored
    assert [line["step"] for line in lines(rollouts)] == [1, 2]


def test_every_step_begins_without_gradients_and_every_pass_takes_each_rollout_once(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = started(steps=2, epochs=3)
    honest = update_policy.accumulate_gradients
    taken: list[int] = []

    def watched(models: PpoModels, *args: Any, **kwargs: Any) -> update_policy.Update:
        assert all(parameter.grad is None for parameter in (models.policy | models.critic).values())
        taken.extend(args[3].tolist())
        return honest(models, *args, **kwargs)

    monkeypatch.setattr(update_policy, "accumulate_gradients", watched)
    ppo.train(job, run)
    passes = [taken[i : i + 8] for i in range(0, len(taken), 8)]
    assert len(passes) == 6
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert len(set(map(tuple, passes))) == 6


def test_equal_jobs_give_equal_bytes(started: Start) -> None:
    for name in ("first", "second"):
        ppo.train(*started(name))
    first, second = (
        started(f"{name}-again")[1].directory.parent / name / "artifact" for name in ("first", "second")
    )
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert (first / "adapter" / lora.WEIGHTS).read_bytes() == (second / "adapter" / lora.WEIGHTS).read_bytes()


def test_steps_too_far_from_the_sampler_are_skipped_before_they_are_taken(started: Start) -> None:
    for name, limit, skipped in (
        ("strict", 1e-12, 3),
        ("free", None, 0),
    ):  # the first of four has KL 0; it is taken, and all others are too far
        job, run = started(
            name, steps=1, max_step_kl=limit, learning_rate=1e-2, machine={"checkpoint_steps": 1}
        )
        ppo.train(job, run)
        assert lines(run)[0]["skipped"] == skipped
        found = checkpoints.latest(run.checkpoints)
        assert found is not None
        assert {
            value.item() for key, value in found.tensors.items() if key.startswith("optimizer.step.")
        } == {4 - skipped}


def test_an_empty_rl_split_is_the_users_to_mend(
    started: Start, inputs: dict[str, Path], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    empty = tmp_path / "data"
    empty.mkdir()
    pq.write_table(pq.read_table(inputs["data"] / "rl.parquet").slice(0, 0), empty / "rl.parquet")
    with pytest.raises(InputError, match="no prompts"):
        ppo.train(*started(given={"data": empty}))


# --------------------------------------------------------------------------------- NaN and infinity


def altered(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    return folder


def ends(job: PpoJob, run: Run, sentence: str) -> None:
    """Check that the run ends with one sentence, leaves nothing like a result, and has logged valid JSON."""
    with pytest.raises(InputError, match=sentence) as refusal:
        ppo.train(job, run)
    assert "\n" not in str(refusal.value)
    assert not list(run.artifact.iterdir())
    text = (run.directory / "metrics.jsonl").read_text() if (run.directory / "metrics.jsonl").exists() else ""
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").replace("}", " ").split())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_ends_the_run(
    started: Start, inputs: dict[str, Path], tmp_path: Path, value: float
) -> None:
    def change(folder: Path) -> None:
        record = json.loads((folder / "reward.json").read_text())
        (folder / "reward.json").write_text(json.dumps(record | {"mean": value}))

    given = {"reward": altered(inputs["reward"], tmp_path / "bad", change)}
    ends(
        *started(given=given),
        r"^The (critic's value|reward model's score) is -?(nan|inf) \(\d+ of \d+ values\) in step 1: ",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_score_that_is_no_number_ends_the_run_where_it_comes_up(
    started: Start, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    honest, calls = reward_model.normalised_rewards, iter(range(100))

    def scored(*args: Any) -> Tensor:
        score = honest(*args)
        return torch.where(torch.arange(len(score)) == 3, value, score) if next(calls) == 1 else score

    monkeypatch.setattr(reward_model, "normalised_rewards", scored)
    job, run = started(steps=3)
    ends(
        job.model_copy(update={"samples": Samples(prompts=0)}),  # whose scores are not counted
        run,
        rf"^The reward model's score is {value} \(1 of 8 values\) in step 2: train the reward model again",
    )


def test_a_score_out_of_range_ends_the_run(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reward_model.normalised_rewards
    monkeypatch.setattr(reward_model, "normalised_rewards", lambda *args: 1e25 * honest(*args))
    ends(
        *started(),
        (
            r"^The (advantage|policy loss|value loss) is (nan|inf).* in step 1: training has diverged; "
            r"lower ppo\.learning_rate\.$"
        ),
    )


def test_weights_that_leave_the_numbers_end_the_run(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.optim.Adam.step

    def broken(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        done = honest(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = float("nan")
        return done

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    ends(*started(minibatch=8, epochs=1), r"^The weight base_model\S+ is nan \(1 of \d+ values\) in step 1")


def test_a_base_that_is_no_number_ends_the_run(
    started: Start, inputs: dict[str, Path], tmp_path: Path
) -> None:
    from tasks.rlhf.models import fingerprint, loading

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = next(key for key in weights if "down_proj" in key)
        weights[name][0, 0] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    model = altered(inputs["model"], tmp_path / "model", change)

    def belongs(folder: Path) -> None:
        path = folder / "adapter" / fingerprint.RECORD
        actual = fingerprint.compute_fingerprint(model, loading.load(model, device=tiny.CPU))
        path.write_text(json.dumps(actual._asdict()))

    given = {"model": model, "reward": altered(inputs["reward"], tmp_path / "reward", belongs)}
    job, run = started(given=given)
    with pytest.raises((InputError, StepZeroError), match="nan"):
        ppo.train(job, run)
    assert not list(run.artifact.iterdir())
