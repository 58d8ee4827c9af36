"""Measure what hard comparisons (reward.hard_negatives) do to the demo's reward model and to its PPO.

python -m tests.benchmarks.negatives DIR [--seeds 0 1 2] [--shares 0 1] [--threads 1] [--reward-only]
                                         [--set NAME=VALUE ...]

DIR gets a folder for each seed with the demo's stages up to merge, and one for each seed and share with the
reward model and PPO; a stage that is finished is not run again. Per run: pairs that the reward model orders
as the votes and as the gold scorer do, real answers that each kind of worthless answer and that a copy with a
wrong name out-scores, and PPO against the SFT model by the gold scorer at a temperature of 1. The gold scorer
also says of how many made comparisons the real answer is the better one.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from flows import profiles
from tasks.config import jobs
from tasks.config.jobs import RewardJob
from tasks.config.sections.reward import HardNegatives
from tasks.dataset import row_sample
from tasks.demo_site.gold import gold_score
from tasks.judges.judge import Answer
from tasks.judges.reward_judge import RewardScores
from tasks.programs import reward
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.hard_negatives import KINDS, add_hard_negatives
from tasks.rlhf.batches.prompts import decode_answer
from tasks.rlhf.judging.gold_agreement import ordering_agreement
from tasks.rlhf.models import loading, reward_model
from tests.benchmarks import learning

# the inputs of each stage, as paths from the seed's folder
CHAIN = {
    "site": {},
    "data": {"source": "site/artifact/Posts.xml"},
    "pretrain": {"data": "data/artifact"},
    "sft": {"data": "data/artifact", "base": "pretrain/artifact/model"},
    "merge": {"base": "pretrain/artifact/model", "adapter": "sft/artifact"},
}
MODEL = {"data": "data/artifact", "model": "merge/artifact/model"}  # of reward and ppo
RANKED = 300  # evaluation questions whose answers the gold scorer orders


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reward-only", action="store_true", help="train no policies")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    found: dict[float, list[dict[str, float]]] = {share: [] for share in options.shares}
    for seed in options.seeds:
        settings = [*options.set, f"seed={seed}", f"machine.threads={options.threads}"]
        root = options.directory.absolute() / f"seed-{seed}"
        for stage, inputs in CHAIN.items():
            run_stage(root / stage, stage, settings, {name: root / path for name, path in inputs.items()})
        for share in options.shares:
            changed = [*settings, f"reward.hard_negatives.share={share}"]
            figures = train_reward(root, f"share-{share:g}", changed)
            print(f"seed {seed}, share {share:g}: {describe([figures])}", flush=True)
            if not options.reward_only:
                figures |= train_policy(root, f"share-{share:g}", changed)
                print(f"seed {seed}, share {share:g}: {describe([figures])}", flush=True)
            found[share].append(figures)
        print(f"seed {seed}: {describe_made(check_made(root))}", flush=True)
    for share, several in found.items():
        print(f"mean of {len(several)} seeds, share {share:g}: {describe(several)}")


def train_reward(root: Path, name: str, settings: list[str]) -> dict[str, float]:
    """Train a reward model in a folder of ``root``; return shares of pairs and of answers out-scored."""
    folder = root / f"reward-{name}"
    artifact = run_stage(folder, "reward", settings, {stage: root / path for stage, path in MODEL.items()})
    metrics = json.loads((artifact / "summary.json").read_text())["metrics"]
    measures = json.loads((artifact / "measures.json").read_text())
    attacks = measures["attacks"] | measures.get("copying", {})
    return {
        "votes": metrics["reward_accuracy.votes"]["value"],
        "gold": measure_gold(Run(folder), artifact),
        **{kind: verdict["wins"]["value"] for kind, verdict in attacks.items()},
        "elsewhere": metrics["reward.elsewhere_correlation"]["value"],
    }


def train_policy(root: Path, name: str, settings: list[str]) -> dict[str, float]:
    """Train a policy with the reward model of that name; return its win rate and its gain."""
    inputs = {stage: root / path for stage, path in MODEL.items()}
    inputs["reward"] = root / f"reward-{name}" / "artifact"
    run_stage(root / f"ppo-{name}", "ppo", settings, inputs)
    learnt = learning.measure(root / f"ppo-{name}", split="evaluation", temperature=1.0, most=500)
    return {"win": learnt.win.value, "gain": learnt.gain[0], "perfect": learnt.perfect[1]}


def run_stage(folder: Path, stage: str, settings: list[str], inputs: dict[str, Path]) -> Path:
    """Run a stage's program in ``folder``, unless it is finished; return its artifact."""
    if not (folder / "done").exists():
        config = profiles.load("demo", settings)
        record: dict[str, Any] = {
            "stage": stage,
            "job": getattr(jobs, f"{stage.capitalize()}Job").of(config).model_dump(mode="json"),
            "inputs": {name: str(path) for name, path in inputs.items()},
            "machine": config.machine.model_dump(mode="json"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(record))
        with (folder / "log.txt").open("ab") as log:
            command = [sys.executable, "-m", f"tasks.programs.{stage}", str(folder)]
            subprocess.run(command, check=True, stdout=log, stderr=log)
    return folder / "artifact"


def measure_gold(run: Run, artifact: Path) -> float:
    """Return the share of pairs of evaluation answers that a reward model orders as the gold scorer does."""
    job = RewardJob.model_validate(run.record)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    base, scorer = reward_model.load(
        artifact, loading.load(run.inputs["model"], device=learning.CPU), device=learning.CPU
    )
    del base
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    columns = ["question_id", "prompt", "answers"]
    table = pq.read_table(run.inputs["data"] / "evaluation.parquet", columns=columns)
    rows = table.take(sorted(row_sample.draw_sample(table["question_id"].to_pylist(), RANKED))).to_pylist()
    asked = [(row["prompt"], Answer(text)) for row in rows for text in row["answers"]]
    score = RewardScores(scorer, encoder, tokenizer.pad_token_id, learning.CPU, 64)
    scores = iter(score(asked, lambda done, total: None))
    judged = [[next(scores) for _ in row["answers"]] for row in rows]
    truth = [[gold_score(row["prompt"], text) for text in row["answers"]] for row in rows]
    return ordering_agreement(judged, truth).value


def check_made(root: Path) -> dict[str, Counter[str]]:
    """Return, by kind, how many made answers of a seed are worse, equal and better by the gold scorer."""
    run = Run(next(root.glob("reward-*")))
    job = RewardJob.model_validate(run.record)
    encoder = pair_tables.build_encoder(job.text, loading.load_tokenizer(run.inputs["model"]), {})
    voted, _ = reward.read_comparisons(job, run, encoder)
    table = pq.read_table(
        run.inputs["data"] / "reward.parquet", columns=["question_id", "prompt"]
    ).to_pylist()
    prompts = {row["question_id"]: row["prompt"] for row in table}
    counts: dict[str, Counter[str]] = {}
    for kind in KINDS:
        settings = HardNegatives(share=1, kinds=(kind,))
        made = add_hard_negatives(voted, encoder, settings, seed=job.seed).questions
        counts[kind] = Counter()
        for old, new in zip(voted, made, strict=True):
            for best, number in new.pairs[len(old.pairs) :]:
                real, worse = (
                    gold_score(
                        prompts[new.question_id],
                        decode_answer(encoder.tokenizer, new.answers[place], template=encoder.template),
                    )
                    for place in (best, number)
                )
                counts[kind]["worse" if real > worse else "equal" if real == worse else "better"] += 1
    return counts


def describe(figures: Sequence[dict[str, float]]) -> str:
    """Return the mean of each figure; shares in per cent."""
    means = {name: fmean(one[name] for one in figures) for name in figures[0]}
    return ", ".join(
        f"{name} {value:.2f}" if name in ("gain", "elsewhere") else f"{name} {value:.1%}"
        for name, value in means.items()
    )


def describe_made(counts: dict[str, Counter[str]]) -> str:
    """Return a line about made answers by the gold scorer."""
    parts = []
    for kind, count in counts.items():
        total = max(count.total(), 1)
        shares = ", ".join(f"{count[name] / total:.1%} {name}" for name in ("worse", "equal", "better"))
        parts.append(f"{kind} {count.total()}: {shares}")
    return "made answers by gold: " + "; ".join(parts)


if __name__ == "__main__":
    main()
