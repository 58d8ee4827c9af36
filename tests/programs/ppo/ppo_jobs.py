"""Write the inputs and the job of a small PPO run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.config.jobs import PpoJob, RewardJob
from tasks.programs import ppo, reward
from tasks.programs.ppo_stage.reward_mix import UNTOUCHED
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import prompts
from tasks.rlhf.models import loading
from tasks.rlhf.training.rollouts import PpoModels, Rollout, ScoreRule, roll_out
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 40}
LORA = {"rank": 2, "alpha": 4}


def write_inputs(root: Path, *, data: Path | None = None, **reward_settings: Any) -> dict[str, Path]:
    """Write data, unless there are some, a base that has learnt to end its answers, and a reward model."""
    data = data or tiny.data_folder(root / "data", 40)
    model = tiny.trained_folder(root / "base", data)
    job = {"seed": 0, "text": TEXT, "reward": {"lora": LORA, "max_steps": 8} | reward_settings}
    run = Run(tiny.write_job(root / "reward", "reward", job, {"data": data, "model": model}))
    reward.train(RewardJob.model_validate(run.record), run)
    return {"data": data, "model": model, "reward": run.artifact}


def write_run(
    folder: Path,
    inputs: dict[str, Path],
    *,
    machine: dict[str, Any] | None = None,
    text: dict[str, int] | None = None,
    **changed: Any,
) -> tuple[PpoJob, Run]:
    """Write a job of 8 rollouts a batch, with some settings changed."""
    settings = {"lora": LORA, "steps": 2, "rollouts": 8, "minibatch": 4, "epochs": 2} | changed
    job = {"seed": 0, "text": TEXT | (text or {}), "ppo": settings}
    run = Run(tiny.write_job(folder, "ppo", job, inputs, **(machine or {})))
    return PpoJob.model_validate(run.record), run


def sample_answers(
    job: PpoJob,
    run: Run,
    models: PpoModels,
    *,
    count: int = 8,
    times: int = 1,
    rule: ScoreRule = UNTOUCHED,
    is_checked: bool = False,
) -> Rollout:
    """Sample an answer to each of the first ``count`` prompts, ``times`` over."""
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    return roll_out(
        models,
        [prompt.ids for prompt in ppo.read_questions(job, run, encoder)[0][:count]] * times,
        uniform=torch.rand(count * times, job.text.max_answer_tokens, dtype=torch.float64),
        max_tokens=job.text.max_answer_tokens,
        temperature=job.ppo.temperature,
        end_ids=prompts.end_tokens(tokenizer, job.text.template),
        pad_id=tokenizer.pad_token_id,
        score_rule=rule,
        device=tiny.CPU,
        is_checked=is_checked,
    )


def train_with_a_cut(job: PpoJob, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run as it logs its second step, and train on from its checkpoint."""
    log = Run.log

    def stop(run: Run, step: int, total: int, **metrics: float) -> None:
        log(run, step, total, **metrics)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(job, run)
    assert any(run.checkpoints.iterdir())
    ppo.train(job, run)


def assert_same_weights(one: Run, other: Run) -> None:
    """Compare policy and critic of two runs, to the bit."""
    for name in ("adapter", "critic"):
        first, second = (load_file(run.artifact / name / "adapter_model.safetensors") for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def brevity(questions: list[str], answers: list[str]) -> list[float]:
    """Return minus the words of each answer above eight: a reward function as a user would write it."""
    return [-float(max(0, len(answer.split()) - 8)) for answer in answers]
