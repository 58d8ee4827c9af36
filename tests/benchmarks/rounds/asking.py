"""Measure how many labels a reward model needs if pairs are asked at random, and where its members disagree.

python -m tests.benchmarks.rounds.asking DIR [DIR ...] [--prompts 600] [--answers 8] [--step 40] [--most 400]

DIR is a folder with a job of the stage reward on the built-in site (`alignflow job rounds reward DIR --set
seed=1`). The SFT model answers prompts of the rl split; of a quarter of the prompts all pairs that the gold
scorer orders are held out. The first labels are random and the same for both rules; then each rule asks as
many more at a time, and the reward model is trained anew on all of its labels. The gold scorer labels with
noise 0.1. Prints the accuracy on the held-out pairs by the number of labels, and how many labels disagreement
needs for the accuracy that random has at the end.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from tasks.config.jobs import CandidatesJob, RewardJob
from tasks.demo_site.gold import gold_score
from tasks.programs import reward
from tasks.programs.rounds import candidates
from tasks.programs.rounds.asked import describe_pair, measure_disagreement
from tasks.programs.rounds.choose_pairs import Pair, choose, pair_up
from tasks.programs.rounds.decided_pairs import decide
from tasks.programs.rounds.hashed_number import hashed_number
from tasks.programs.rounds.labellers import gold_labels
from tasks.programs.rounds.mixture import mix
from tasks.programs.rounds.round_tables import COMPARISON, MIXTURE, write_rows, write_table
from tasks.programs.runtime.program import Run
from tasks.rlhf.models import loading, reward_model

CPU = torch.device("cpu")
HELD_OUT_SHARE = 0.25  # of the prompts
NOISE = 0.1
BATCH_SIZE = 200
Row = dict[str, Any]
Rule = Literal["random", "disagreement"]
RULES: tuple[Rule, ...] = ("random", "disagreement")


class Pool:
    """Sampled answers of the SFT model, the pairs that may be asked, and those that are held out."""

    def __init__(self, directory: Path, *, prompts: int, answers: int) -> None:
        self.directory = directory
        self.record = json.loads((directory / "job.json").read_text())
        self.job = RewardJob.model_validate(self.record["job"])
        assert self.job.reward.members > 1, "set reward.members"
        self.rows = self._sample(prompts, answers)
        is_held_out = {
            row["question_id"]: hashed_number("held out", 0, row["question_id"]) < HELD_OUT_SHARE
            for row in self.rows
        }
        pairs = pair_up(self.rows, alike=0.9)
        self.pairs = [pair for pair in pairs if not is_held_out[pair.question_id]]
        held_out = [pair for pair in pairs if is_held_out[pair.question_id]]
        gaps = [
            gold_score(pair.prompt, pair.first["answer"]) - gold_score(pair.prompt, pair.second["answer"])
            for pair in held_out
        ]
        self.held_out = [(pair, gap > 0) for pair, gap in zip(held_out, gaps, strict=True) if gap]

    def _sample(self, prompts: int, answers: int) -> list[Row]:
        """Return the rows of the stage candidates; those of an earlier start of the benchmark are kept."""
        run = self.start("candidates", {"data", "model"})
        table = run.artifact / "candidates.parquet"
        if not (run.artifact / "summary.json").exists():
            sample = {"answers": answers, "prompts": prompts, "batch_size": BATCH_SIZE}
            settings = {name: self.record["job"][name] for name in ("seed", "text", "weights")}
            candidates.sample_candidates(CandidatesJob.model_validate(settings | {"sample": sample}), run)
        rows: list[Row] = pq.read_table(table).to_pylist()
        return rows

    def start(self, name: str, inputs: set[str], **more: Path) -> Run:
        """Return a run of a program in a folder below the benchmark's."""
        folder = self.directory / name
        folder.mkdir(exist_ok=True)
        kept = {one: path for one, path in self.record["inputs"].items() if one in inputs}
        paths = kept | {one: str(path) for one, path in more.items()}
        (folder / "job.json").write_text(json.dumps(self.record | {"inputs": paths}))
        return Run(folder)

    def train(self, name: str, asked: Sequence[Row]) -> Run:
        """Train a reward model on noisy labels of pairs."""
        labels = gold_labels(asked, noise=NOISE, tie=0.0, seed=self.job.seed)
        folder = self.directory / f"{name}-mixture"
        folder.mkdir(exist_ok=True)
        write_rows(folder / "comparisons.parquet", decide(labels, asked, 0.0).comparisons, COMPARISON)
        compared = pq.read_table(folder / "comparisons.parquet")
        votes = compared.slice(0, 0).select([one for one in MIXTURE if one in compared.column_names])
        write_table(folder / "reward.parquet", mix(votes, [compared], old_share=0.0, seed=0))
        run = self.start(name, {"data", "model"}, mixture=folder)
        if not (run.artifact / "summary.json").exists():
            reward.train(self.job, run)
        return run

    def score(self, run: Run) -> None:
        """Put the members' raw rewards of all answers into the rows, of which the pairs are."""
        encoder = candidates.pair_tables.build_encoder(
            self.job.text, loading.load_tokenizer(run.inputs["model"]), {}
        )
        base = loading.load(run.inputs["model"], device=CPU, precision=self.job.weights.merged)
        _, scorer = reward_model.load(run.artifact, base, device=CPU)
        prompt_ids = {row["prompt"]: encoder.encode_prompt(row["prompt"]) for row in self.rows}
        answers = [(prompt_ids[row["prompt"]], row["tokens"]) for row in self.rows]
        raw = candidates.member_rewards(scorer, answers, BATCH_SIZE, encoder.tokenizer.pad_token_id, CPU, run)
        candidates.add_rewards(self.rows, scorer, raw)

    def accuracy(self) -> float:
        """Return the share of the held-out pairs that the scored rewards order as the gold scorer does."""
        right = [(pair.margin or 0.0) > 0 for pair, _ in self.held_out]
        return float(np.mean([one == better for one, (_, better) in zip(right, self.held_out, strict=True)]))


def learn(pool: Pool, rule: Rule, *, step: int, most: int) -> Iterator[tuple[int, float]]:
    """Yield the number of labels and the accuracy with them, as ``rule`` asks for more and more."""
    seed = pool.job.seed
    chosen: list[Pair] = choose(pool.pairs, by="random", count=step, per_question=1, seed=seed)
    while True:
        name = "first" if len(chosen) == step else f"{rule}-{len(chosen)}"
        pool.score(pool.train(name, [describe_pair(pair, rule) for pair in chosen]))
        yield len(chosen), pool.accuracy()
        if len(chosen) + step > most:
            return
        known = {pair.pair_id for pair in chosen}
        left = [pair for pair in pool.pairs if pair.pair_id not in known]
        left, _ = measure_disagreement(left, confidence=None)
        chosen += choose(left, by=rule, count=step, per_question=1, seed=seed + len(chosen))


def labels_needed(curve: Sequence[tuple[int, float]], accuracy: float) -> float:
    """Return the number of labels at which a curve first reaches an accuracy, between two measurements by a
    straight line; infinity if it does not.
    """
    before = curve[0]
    for point in curve:
        if point[1] >= accuracy:
            rise = point[1] - before[1]
            share = (accuracy - before[1]) / rise if rise > 0 else 0.0
            return before[0] + share * (point[0] - before[0])
        before = point
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--step", type=int, default=40)
    parser.add_argument("--most", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for directory in options.directories:
        pool = Pool(directory.absolute(), prompts=options.prompts, answers=options.answers)
        print(f"{directory.name}: {len(pool.pairs):,} pairs, {len(pool.held_out):,} held out", flush=True)
        curves: dict[Rule, list[tuple[int, float]]] = {}
        for rule in RULES:
            curves[rule] = []
            for count, accuracy in learn(pool, rule, step=options.step, most=options.most):
                curves[rule].append((count, accuracy))
                print(f"  {rule:<12} {count:>4} labels  accuracy {accuracy:.3f}", flush=True)
        count, accuracy = curves["random"][-1]
        needed = labels_needed(curves["disagreement"], accuracy)
        print(f"  random has {accuracy:.3f} at {count} labels, disagreement at {needed:.0f}", flush=True)


if __name__ == "__main__":
    main()
