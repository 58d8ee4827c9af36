"""Test the diagnosis of a negative KL: each planted cause is refused, and named in one sentence."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tasks.programs import ppo
from tasks.programs.ppo_stage.rollout_checks import RolloutChecks
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import sanity_checks
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.batches import sampling, sequences
from tasks.rlhf.models import loading, lora
from tasks.rlhf.training import kl_diagnosis
from tasks.rlhf.training.rollouts import PpoModels, Rollout
from tests.programs.ppo import ppo_jobs
from tests.support import tiny

TOLERANCE = 1e-3
Warp = Callable[[Tensor, int], Tensor]  # of logits (B, V) at a step of the sampler


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("kl"))


def warp_sampler(monkeypatch: pytest.MonkeyPatch, change: Warp) -> None:
    """Let the sampler, and it alone, draw from changed logits."""
    honest = sampling.sample

    def warped(model: PreTrainedModel, *args: Any, **kwargs: Any) -> sampling.Samples:
        steps = itertools.count()

        def hook(_: Any, __: Any, output: Any) -> Any:
            output.logits = change(output.logits[:, -1], next(steps))[:, None]
            return output

        handle = model.register_forward_hook(hook)
        try:
            return honest(model, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(sampling, "sample", warped)


def top_k(logits: Tensor, _: int) -> Tensor:
    return logits.masked_fill(logits < logits.topk(5, dim=1).values[:, -1:], -torch.inf)


def top_p(logits: Tensor, _: int) -> Tensor:
    ordered, places = logits.softmax(dim=1).sort(dim=1, descending=True)
    left_out = ordered.cumsum(dim=1) - ordered >= 0.8
    return logits.masked_fill(torch.zeros_like(left_out).scatter(1, places, left_out), -torch.inf)


def min_length(logits: Tensor, step: int) -> Tensor:
    return logits.index_fill(1, torch.tensor([tiny.EOS]), -torch.inf) if step < 14 else logits


def cooler(logits: Tensor, _: int) -> Tensor:
    return logits / 0.8


def refused(inputs: dict[str, Path], folder: Path, sentence: str, **settings: Any) -> None:
    job, run = ppo_jobs.write_run(folder, inputs, rollouts=16, **settings)
    with pytest.raises(StepZeroError, match=sentence) as found:
        ppo.train(job, run)
    assert "\n" not in str(found.value)
    assert not (run.artifact / "summary.json").exists()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (top_k, r"the sampler draws from the 5 most likely tokens alone \(top-k\)"),
        (top_p, r"the sampler draws from the likeliest tokens that reach 0\.\d\d alone \(top-p\)"),
        (min_length, r"the sampler allows no end token among the first \d+ tokens \(a minimum length\)"),
        (cooler, r"the sampler's temperature is 0\.80 times the scorer's"),
    ],
)
def test_a_sampling_setting_is_named(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Warp, cause: str
) -> None:
    warp_sampler(monkeypatch, change)
    refused(inputs, tmp_path / "run", rf"^Sampler's and scorer's.*Likely cause: {cause}")


def test_dropout_is_named(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sequences.log_probs
    monkeypatch.setattr(
        sequences, "log_probs", lambda *args, **kwargs: F.dropout(honest(*args, **kwargs), p=0.1)
    )
    refused(inputs, tmp_path / "run", "Likely cause: dropout is on: two passes of the policy")


def test_padding_that_the_sampler_sees_is_named(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sampling.pad_left

    def seen(*args: Any) -> tuple[Tensor, Tensor]:
        ids, mask = honest(*args)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(sampling, "pad_left", seen)
    refused(inputs, tmp_path / "run", "Likely cause: the sampler sees left padding")


def test_padding_that_the_scorer_sees_is_named(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that are shifted by the padding of the batch."""
    honest = sequences.log_probs

    def shifted(model: PreTrainedModel, batch: sequences.Sequences, **kwargs: Any) -> Tensor:
        padding = batch.response_mask.flip(1).long().argmax(dim=1)
        return torch.where(batch.response_mask, honest(model, batch, **kwargs) - 0.02 * padding[:, None], 0.0)

    monkeypatch.setattr(sequences, "log_probs", shifted)
    refused(
        inputs, tmp_path / "run", "Likely cause: padding is visible to the policy, or shifts its positions"
    )


def replace_reference(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    """Let another model be the reference, made of the base."""
    honest, made = lora.active, list[PreTrainedModel]()

    @contextmanager
    def active(model: PeftModel, name: str | None) -> Iterator[PreTrainedModel]:
        with honest(model, name) as base:
            if name is None and not made:
                plain = copy.deepcopy(base)
                made.append(change(plain))
            yield made[0] if name is None else base

    monkeypatch.setattr(lora, "active", active)


def test_a_reference_in_another_precision_is_named(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs)
    models = ppo.load_models(job, run, tiny.CPU)
    monkeypatch.setattr(ppo, "load_models", lambda *_: models)
    replace_reference(monkeypatch, lambda base: base.bfloat16())  # type: ignore[arg-type, return-value]
    with pytest.raises(
        StepZeroError, match="another precision: the reference computes in bfloat16, the policy in f"
    ):
        ppo.train(job, run)


def rolled(
    inputs: dict[str, Path], folder: Path, *, moved: float = 0.0
) -> tuple[PpoModels, Rollout, RolloutChecks]:
    """Return answers of a policy that has moved, and their checks as after a start or a resume."""
    job, run = ppo_jobs.write_run(folder, inputs, rollouts=32)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    models = ppo.load_models(job, run, tiny.CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in models.policy.items():
            if moved and "lora_B" in name:
                parameter.normal_(std=moved)
    rollout = ppo_jobs.sample_answers(job, run, models, count=32, is_checked=True)
    checks = RolloutChecks(job, models, encoder, models.frozen, {}, tolerance=TOLERANCE)
    return models, rollout, checks


def lowered(rollout: Rollout, by: float = 1.0) -> Rollout:
    """Return the rollout with a reference that finds every token more likely than the policy does."""
    mask = rollout.batch.response_mask
    return rollout._replace(ref_logp=torch.where(mask, rollout.logp + by, 0.0))


def test_a_healthy_policy_is_not_suspected(inputs: dict[str, Path], tmp_path: Path) -> None:
    models, rollout, checks = rolled(inputs, tmp_path / "run", moved=0.1)
    assert not kl_diagnosis.is_below_zero(rollout, tolerance=TOLERANCE)
    assert kl_diagnosis.find_cause(models, rollout, checks.settings) == ""
    assert kl_diagnosis.find_start_cause(models, rollout, checks.settings) == ""
    checks.is_resumed = True
    checks.check_start(rollout)
    checks.check_kl(rollout, 1)
    assert checks.warnings() == []


def test_a_mean_below_zero_by_chance_is_not_suspected(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, rollout, _ = rolled(inputs, tmp_path / "run")
    mask = rollout.batch.response_mask
    signs = torch.where(torch.arange(len(mask)) % 8 < 5, 0.5, -0.5)[:, None] * torch.ones_like(rollout.logp)
    noisy = rollout._replace(ref_logp=torch.where(mask, rollout.logp + signs, 0.0))
    kl = (noisy.logp - noisy.ref_logp).sum(dim=1)
    assert kl.mean() < 0
    assert not kl_diagnosis.is_below_zero(noisy, tolerance=TOLERANCE)
    assert kl_diagnosis.is_below_zero(lowered(rollout), tolerance=TOLERANCE)
    assert not kl_diagnosis.is_below_zero(lowered(rollout, TOLERANCE / 1e3), tolerance=TOLERANCE)


def test_a_reference_that_is_another_model_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, rollout, checks = rolled(inputs, tmp_path / "run", moved=0.1)
    with pytest.raises(
        StepZeroError, match=r"^In step 3 the KL .* at -\d.*: the reference is not the policy's base"
    ):
        checks.check_kl(lowered(rollout), 3)


def test_a_reference_that_was_computed_in_bfloat16_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    models, rollout, checks = rolled(inputs, tmp_path / "run", moved=0.1)
    base = models.model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    with models.model.disable_adapter(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = sequences.log_probs(base, rollout.batch)
    cause = kl_diagnosis.find_cause(models, rollout._replace(ref_logp=rounded.float()), checks.settings)
    assert cause.startswith("another precision: the reference's log-probabilities are of a bfloat16 pass")


def test_a_reference_that_moved_during_the_run_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    models, rollout, checks = rolled(inputs, tmp_path / "run", moved=0.1)
    next(p for name, p in models.model.named_parameters() if "embed_tokens" in name).data.add_(1e-3)
    with pytest.raises(
        StepZeroError, match="Likely cause: the reference has moved: a frozen weight is not what"
    ):
        checks.check_kl(lowered(rollout), 3)


def test_a_kl_below_zero_without_a_cause_is_warned_of(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rollout, checks = rolled(inputs, tmp_path / "run")
    monkeypatch.setattr(kl_diagnosis, "is_below_zero", lambda *_, **__: True)
    checks.check_kl(rollout, 3)
    checks.check_kl(rollout, 5)
    (sentence,) = checks.warnings()
    assert sentence.startswith("In 2 steps, first 3, the estimated KL from the SFT model was below 0")


def test_an_end_token_that_cannot_be_drawn_is_named(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sampler and scorer alike, so that both agree."""
    models, rollout, checks = rolled(inputs, tmp_path / "run")
    base = models.model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    head = torch.nn.Linear(tiny.WIDTH, tiny.VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(base.get_output_embeddings().weight)  # type: ignore[operator, union-attr, arg-type]
        head.bias.zero_()
        head.bias[tiny.EOS] = -1e4
    monkeypatch.setattr(kl_diagnosis, "output_head", lambda _: head)
    endless = rollout._replace(ended=torch.zeros_like(rollout.ended))
    cause = kl_diagnosis._find_missing_end(models, endless, torch.arange(8), checks.settings)
    assert cause.startswith("the end token cannot be drawn: its log-probability at the last position is -")
    assert kl_diagnosis._find_missing_end(models, rollout, torch.arange(8), checks.settings) == ""


# ------------------------------------------------------------------------------------------- resuming


def cut_after(inputs: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Run]:
    """Return a run that was killed in its third step, with a checkpoint of the second."""
    job, run = ppo_jobs.write_run(
        folder, inputs, machine={"checkpoint_steps": 1}, steps=4, learning_rate=5e-3
    )
    honest = Run.log

    def cut(run: Run, step: int, total: int, **metrics: float) -> None:
        honest(run, step, total, **metrics)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", cut)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(job, run)
    return job, run


def resume_refused(job: Any, run: Run, sentence: str) -> None:
    with pytest.raises(StepZeroError, match=sentence):
        ppo.train(job, run)
    assert not (run.artifact / "summary.json").exists()


@pytest.mark.parametrize("change", [top_k, min_length])
def test_a_sampling_setting_is_refused_at_a_resume(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Warp
) -> None:
    job, run = cut_after(inputs, tmp_path / "run", monkeypatch)
    warp_sampler(monkeypatch, change)
    resume_refused(job, run, "Likely cause: the sampler ")


def test_a_reference_that_moved_between_start_and_resume_is_refused(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of the reward model: its fingerprint would tell of the base."""
    changed = tmp_path / "reward"
    shutil.copytree(inputs["reward"], changed)
    job, run = cut_after(inputs | {"reward": changed}, tmp_path / "run", monkeypatch)
    weights = load_file(changed / "adapter" / lora.WEIGHTS)
    name = next(key for key in weights if "lora_A" in key)
    save_file(weights | {name: weights[name] + 1e-7}, changed / "adapter" / lora.WEIGHTS)
    resume_refused(job, run, "The frozen weights are not those that the run was started with")


def test_another_reference_is_refused_at_a_resume(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another precision, though the policy is not fresh any more."""
    job, run = cut_after(inputs, tmp_path / "run", monkeypatch)
    models = ppo.load_models(job, run, tiny.CPU)
    monkeypatch.setattr(ppo, "load_models", lambda *_: models)
    replace_reference(monkeypatch, lambda base: base.bfloat16())  # type: ignore[arg-type, return-value]
    resume_refused(job, run, "another precision: the reference computes in bfloat16")


def test_gradients_that_are_missing_are_refused_at_a_resume(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = cut_after(inputs, tmp_path / "run", monkeypatch)
    honest = lora.active

    def confused(model: PeftModel, name: str | None) -> AbstractContextManager[PreTrainedModel]:
        return honest(model, "reward" if name == "critic" else name)

    monkeypatch.setattr(lora, "active", confused)
    resume_refused(job, run, "trainable parameters got no gradient")


def test_a_frozen_parameter_with_a_gradient_is_refused() -> None:
    frozen = [torch.nn.Parameter(torch.ones(2), requires_grad=False) for _ in range(2)]
    sanity_checks.check_frozen(frozen)
    frozen[1].grad = torch.zeros(2)
    with pytest.raises(StepZeroError, match="1 frozen parameters got a gradient"):
        sanity_checks.check_frozen(frozen)


def test_a_checkpoint_without_digest_is_accepted(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Of another precision too: a CPU without bfloat16 computes with other bytes."""
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs)
    models = ppo.load_models(job, run, tiny.CPU)
    encoder = pair_tables.build_encoder(job.text, loading.load_tokenizer(run.inputs["model"]), {})
    for state in ({}, {"kl_coefficient": 1}, {"frozen": {"dtype": "torch.bfloat16", "digest": "other"}}):
        RolloutChecks(job, models, encoder, models.frozen, json.loads(json.dumps(state)), tolerance=TOLERANCE)
