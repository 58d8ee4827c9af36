"""Run TRL on the workloads of training.py, one round of steps.

python peer_training.py WORKLOAD float32|bfloat16 FOLDER

Runs in an environment of its own; FOLDER is what training.py wrote: the model, the first
adapters and the texts. Prints one line of JSON.
"""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

SCORED = ("pairwise", "pairwise-1", "kwise")


def settings(what: str, dtype: str, work: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of every TRL trainer: as ours.

    What only costs time is off: recomputing activations, progress bars, saving.
    """
    common = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    common |= {
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    common |= {
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    return common | {
        "max_steps": work["steps"],
        "per_device_train_batch_size": work["batch"][what],
        "max_length": work["block_tokens"],
    }


def lora(work: dict[str, Any], kind: str) -> LoraConfig:
    chosen = {
        "r": work["rank"],
        "lora_alpha": work["alpha"],
        "target_modules": work["targets"],
        "lora_dropout": 0.0,
    }
    return LoraConfig(**chosen, task_type=kind, modules_to_save=["score"] if kind == "SEQ_CLS" else None)


def pairs(folder: Path, what: str) -> Dataset:
    """Return every pair as a row; the prompt and each answer are forwarded as often as they occur."""
    rows = []
    for question in json.loads((folder / f"{what}.json").read_text()):
        better_and_worse = [
            [f" {question['answers'][index]}" for index in pair] for pair in question["pairs"]
        ]
        rows += [
            {"prompt": question["prompt"], "chosen": better, "rejected": worse}
            for better, worse in better_and_worse
        ]
    return Dataset.from_list(rows)


def trainer_of(what: str, dtype: str, folder: Path) -> Trainer:
    work = json.loads((folder / "work.json").read_text())
    base, tokenizer = folder / dtype, AutoTokenizer.from_pretrained(folder / dtype)
    shared = {
        "processing_class": tokenizer,
        "peft_config": lora(work, "SEQ_CLS" if what in SCORED else "CAUSAL_LM"),
    }
    told = settings(what, dtype, work)
    if what in SCORED:
        from trl import RewardConfig, RewardTrainer

        scorer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
        scorer.score.weight.data.copy_(load_file(folder / "start.safetensors")["score"])
        return RewardTrainer(
            model=scorer, args=RewardConfig(**told), train_dataset=pairs(folder, what), **shared
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if what != "sft":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(
            model=model,
            args=DPOConfig(**told, beta=work["beta"]),
            train_dataset=pairs(folder, what),
            **shared,
        )
    from trl import SFTConfig, SFTTrainer

    blocks = Dataset.from_list(
        json.loads((folder / "sft.json").read_text())["blocks"]
    )  # packed already: then both sides' batches are the same
    packed = {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTTrainer(model=model, args=SFTConfig(**told, **packed), train_dataset=blocks, **shared)


def start_from(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Load the shared first weights into the adapter; return the types of the trained parameters."""
    first, found = load_file(folder / "start.safetensors"), {}
    for name, parameter in model.named_parameters():
        if matched := re.search(r"(layers\..*)\.lora_A\.", name):
            parameter.data.copy_(first[matched[1]])
        if parameter.requires_grad:
            found[name.split(".")[-3]] = str(parameter.dtype).removeprefix("torch.")
    return found


class Clock(TrainerCallback):
    """A callback that records when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.used: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        self.used.append(time.process_time())


def main() -> None:
    what, dtype, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trainer, clock = trainer_of(what, dtype, folder), Clock()
    model: Any = trainer.model
    types = start_from(model, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(json.dumps({"ends": clock.ends, "used": clock.used, "losses": losses, "types": types}))


if __name__ == "__main__":
    main()
