"""Run TRL's PPO on the workload of ppo.py: python peer_ppo.py float32|bfloat16 FOLDER

Needs TRL 1.12.0, the last release with PPO. FOLDER holds the model and prompts that ppo.py wrote. In bfloat16
TRL computes under autocast, its own way. Prints one line of JSON.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """A callback that records when each rollout batch has been learnt from."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.used: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        self.used.append(time.process_time())


def settings(work: dict[str, Any], dtype: str) -> PPOConfig:
    """Return the settings as ours; what only costs time is off."""
    return PPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        optim="adamw_torch",
        per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=work["rollouts"] // work["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=work["epochs"],
        total_episodes=work["rollouts"] * work["batches"],
        response_length=work["answer_tokens"],
        local_rollout_forward_batch_size=work["rollouts"],
        num_sample_generations=0,
    )


def main() -> None:
    dtype, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = json.loads((folder / "work.json").read_text())
    base = folder / "base"
    prompts = Dataset.from_list([{"input_ids": ids} for ids in work["prompts"]])
    scorers = [AutoModelForSequenceClassification.from_pretrained(base, num_labels=1) for _ in range(2)]
    trainer = PPOTrainer(
        args=settings(work, dtype),
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(base),
        ref_model=None,
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=prompts,
        eval_dataset=prompts.select(range(work["micro_batch"])),
        peft_config=LoraConfig(
            r=work["rank"],
            lora_alpha=work["alpha"],
            lora_dropout=0.0,
            target_modules=work["targets"],
            task_type="CAUSAL_LM",
        ),
    )
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"ends": clock.ends, "used": clock.used, "rss_mb": round(memory)}))


if __name__ == "__main__":
    main()
