"""Measure how much of a perfect policy's gain PPO reaches on the built-in site, at a temperature of 1.

python -m tests.benchmarks.learning DIR [DIR ...] [--split rl] [--temperature 0.7] [--prompts 500] [--train]

DIR is a folder with a job of the stage ppo (`alignflow job demo ppo DIR --set seed=1`), which --train runs
first. A tie is half a win, so even a policy with perfect answers alone ties where the SFT model is perfect:
the gain is (win - 1/2) / (ceiling - 1/2). Settings are chosen on the prompts of PPO (--split rl) of other
seeds than those that are reported.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from tasks.config.jobs import PpoJob
from tasks.dataset import row_sample
from tasks.demo_site.gold import PERFECT, gold_score
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import prompts, sampling
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.win_rate import win_rate
from tasks.rlhf.models import loading, lora

CPU = torch.device("cpu")


class Learnt(NamedTuple):
    """What the policy of a run has learnt, by the gold scorer."""

    win: Interval  # against the SFT model
    ceiling: float  # a perfect policy's win rate
    perfect: tuple[float, float]  # shares of perfect answers: SFT model, policy
    score: tuple[float, float]  # mean gold scores
    length: tuple[float, float]  # mean tokens

    @property
    def gain(self) -> tuple[float, float, float]:
        """Return the share of a perfect policy's gain, with the interval of the win rate."""
        whole = self.ceiling - 0.5
        return tuple((one - 0.5) / whole for one in self.win[:3])  # type: ignore[return-value]


@torch.no_grad()
def measure(directory: Path, *, split: str, temperature: float, most: int) -> Learnt:
    """Compare the policy of a finished run with its SFT model on the prompts of a split."""
    run = Run(directory)
    job = PpoJob.model_validate(run.record)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    table = pq.read_table(run.inputs["data"] / f"{split}.parquet", columns=["question_id", "prompt"])
    table = table.take(sorted(row_sample.draw_sample(table["question_id"].to_pylist(), most)))
    ids, questions = table["question_id"].to_pylist(), table["prompt"].to_pylist()
    base = loading.load(run.inputs["model"], device=CPU)
    model, _ = lora.load(base, "policy", run.artifact / "adapter")
    scores, lengths = {}, {}
    for name, adapter in (("sft", None), ("ppo", "policy")):
        with lora.active(model, adapter) as policy:
            samples = sampling.sample(
                policy,
                [encoder.encode_prompt(question) for question in questions],
                max_tokens=encoder.max_answer_tokens,
                temperature=temperature,
                end_ids=prompts.end_tokens(tokenizer, encoder.template),
                pad_id=tokenizer.pad_token_id,
                uniform=sampling.uniform_numbers(job.seed, name, ids, encoder.max_answer_tokens),
            )
        answers = [row[kept].tolist() for row, kept in zip(samples.ids, samples.mask, strict=True)]
        texts = [prompts.decode_answer(tokenizer, one, template=encoder.template) for one in answers]
        scores[name] = np.array([gold_score(*pair) for pair in zip(questions, texts, strict=True)])
        lengths[name] = float(np.mean([len(one) for one in answers]))
    sft, ppo = scores["sft"], scores["ppo"]
    outcomes = np.where(ppo == sft, 0.5, (ppo > sft).astype(float))
    is_perfect = [float((one >= PERFECT).mean()) for one in (sft, ppo)]
    return Learnt(
        win=win_rate(outcomes, np.array(ids)),
        ceiling=1 - is_perfect[0] / 2,
        perfect=(is_perfect[0], is_perfect[1]),
        score=(float(sft.mean()), float(ppo.mean())),
        length=(lengths["sft"], lengths["ppo"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--split", choices=["rl", "evaluation"], default="evaluation")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    for directory in options.directories:
        if options.train:
            subprocess.run([sys.executable, "-m", "tasks.programs.ppo", str(directory)], check=True)
        found = measure(directory, split=options.split, temperature=options.temperature, most=options.prompts)
        print(f"{directory.name:<24} {describe(found)}", flush=True)


def describe(found: Learnt) -> str:
    """Return a line about what was learnt."""
    win, gains = found.win, " ".join(f"{one:.2f}" for one in found.gain)
    return (
        f"win {win.value:.3f} ({win.low:.3f} to {win.high:.3f}) of {found.ceiling:.3f}, gain {gains}, "
        f"perfect {found.perfect[0]:.2f} -> {found.perfect[1]:.2f}, "
        f"gold {found.score[0]:.2f} -> {found.score[1]:.2f}, "
        f"length {found.length[0]:.0f} -> {found.length[1]:.0f}"
    )


if __name__ == "__main__":
    main()
