"""Write the inputs and the job of a small PPO run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tasks.config.jobs import PpoJob, RewardJob
from tasks.programs import reward
from tasks.programs.runtime.program import Run
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 40}
LORA = {"rank": 2, "alpha": 4}


def write_inputs(root: Path, **reward_settings: Any) -> dict[str, Path]:
    """Write data, a base that has learnt to end its answers, and a reward model on it."""
    data = tiny.data_folder(root / "data", 40)
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


def assert_same_weights(one: Run, other: Run) -> None:
    """Compare policy and critic of two runs, to the bit."""
    for name in ("adapter", "critic"):
        first, second = (load_file(run.artifact / name / "adapter_model.safetensors") for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def brevity(questions: list[str], answers: list[str]) -> list[float]:
    """Return minus the words of each answer above eight: a reward function as a user would write it."""
    return [-float(max(0, len(answer.split()) - 8)) for answer in answers]
