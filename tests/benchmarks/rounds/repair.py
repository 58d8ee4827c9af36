"""Measure whether a policy that over-optimises a stale reward model recovers when that is trained anew.

python -m tests.benchmarks.rounds.repair DIR [--seeds 0 1 2] [--refreshes 4] [--more 32] [--threads 1]
                                         [--set NAME=VALUE ...]

The profile `rounds` on the built-in site, with RLOO and without guards. Phase 1: a reward model of a few
noisy labels of the SFT model's answers, and a policy that is trained against it for long. Then
`rounds.comparisons` labels of its own answers, a reward model that is trained anew on all labels, and
--more steps; with several --refreshes, each has its part of these labels and steps. The control takes as many
steps against the stale reward model; with one refresh, with the same prompts and random numbers. The policy
at its peak is that of phase 1 with `ppo.keep=best`; if its score does not fall for certain, that is the last
one.

Policies are compared with the SFT model by the gold scorer on evaluation questions, at a temperature of 1.
DIR gets a home for each seed, and a picture of reward and gold score against steps; what is built or measured
there is neither built nor measured again. Several processes may run different seeds at the same time.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flows import profiles
from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.paired import paired_difference
from tasks.rounds.round_walk import Prepared, round_config
from tasks.stages.ppo import ppo
from tests.benchmarks.rounds import stored_stages
from tests.benchmarks.rounds.gold_test import (
    MORE_QUESTIONS,
    GoldTest,
    Numbers,
    accuracy_on_candidates,
    describe_difference,
    describe_rate,
)
from tests.benchmarks.rounds.repair_picture import draw_repair
from tests.benchmarks.rounds.stored_stages import BuiltRound, find

RECIPE = [
    "reward.members=1",
    "rounds.choose.by=random",
    "rounds.comparisons=200",
    "rounds.sample.answers=4",  # a policy that over-optimises says the same thing often
    "ppo.algorithm=rloo",
    "ppo.steps=64",
    "ppo.kl_coefficient=0.05",
    "ppo.on_alarm=warn",
    "ppo.keep=final",
    "ppo.score={by: gold, every: 4, prompts: 128, best_of: 1}",
]
# a policy that starts above the KL budget would have no best score, without which no curve is written
NO_GUARDS = {"kl_budget_per_token": None, "text_alarm": None, "spike_alarm": None}
POLICIES = ("peak", "stale", "control", "refreshed")
DIFFERENCES = (("peak", "stale"), ("refreshed", "stale"), ("refreshed", "control"), ("refreshed", "peak"))
Points = list[dict[str, float]]


class Repair(NamedTuple):
    """The artifacts of a seed."""

    first: BuiltRound  # phase 1
    later: list[BuiltRound]  # the refreshes
    policies: dict[str, Artifact]  # by the names of POLICIES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=60, help="of the SFT model's answers, in phase 1")
    parser.add_argument("--refreshes", type=int, default=4, help="of the reward model, in phase 2")
    parser.add_argument("--more", type=int, default=32, help="steps of phase 2")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--draws", type=int, default=4, help="answers to each question")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    print_summary([measure_seed(options, seed) for seed in options.seeds])


def measure_seed(options: argparse.Namespace, seed: int) -> dict[str, Numbers]:
    """Train and compare the policies of a seed, and draw its picture; return the policies' mean outcomes by
    question, (Q,).
    """
    changed = [*options.set, f"seed={seed}", f"machine.threads={options.threads}"]
    folder = options.directory.absolute() / f"seed-{seed}"
    stored_stages.open_home(folder / "home")
    config = profiles.load("rounds", [MORE_QUESTIONS, *RECIPE, *changed])
    prepared = stored_stages.build_base(config)
    repair = train_policies(config, prepared, options, seed)
    picture = folder / f"repair-{options.refreshes}.svg"
    stale, control = (read_points(repair.policies[name]) for name in ("stale", "control"))
    picture.write_text(draw_repair(stale, control, refreshed_points(repair.later)))
    print(f"seed {seed}: picture {picture}", flush=True)
    questions, draws = options.questions, options.draws
    test = GoldTest(config, prepared, folder / "measured", questions=questions, draws=draws)
    return measure_policies(test, repair, seed)


def train_policies(config: Pipeline, prepared: Prepared, options: argparse.Namespace, seed: int) -> Repair:
    """Run both phases and the control; print the curve of each as soon as it is there."""
    first = stored_stages.build_round(
        with_rounds(config, comparisons=options.labels), 1, prepared, [stored_stages.ROUND_0]
    )
    stale, reward = first.built["ppo"], first.built["reward"]
    print(f"seed {seed}, stale: {describe_curve(read_points(stale))}", flush=True)
    parts = options.refreshes
    part = with_ppo(config, steps=options.more // parts, **NO_GUARDS)
    if parts > 1:  # of one refresh there is only one policy that can answer
        own = part.rounds.sample.model_copy(update={"policies": 1})
        part = with_rounds(part, comparisons=config.rounds.comparisons // parts, sample=own)
    rounds, later = [stored_stages.ROUND_0, first.round], list[BuiltRound]()
    for number in range(2, 2 + parts):
        later.append(stored_stages.build_round(part, number, prepared, rounds))
        rounds.append(later[-1].round)
        curve = describe_curve(read_points(later[-1].built["ppo"]))
        print(f"seed {seed}, refresh {number - 1}: {curve}", flush=True)
    of_round_2 = round_config(with_ppo(config, steps=options.more, **NO_GUARDS), 2)
    control = stored_stages.build(
        of_round_2, ppo, data=prepared.data, model=prepared.model, reward=reward, start=stale
    )
    print(f"seed {seed}, control: {describe_curve(read_points(control))}", flush=True)
    best = with_ppo(round_config(config, 1), keep="best")
    peak = stored_stages.build(best, ppo, data=prepared.data, model=prepared.model, reward=reward)
    policies = {"peak": peak, "stale": stale, "control": control, "refreshed": later[-1].built["ppo"]}
    return Repair(first, later, policies)


def with_rounds(config: Pipeline, **changes: Any) -> Pipeline:
    """Return settings with some of the rounds' changed."""
    return config.model_copy(update={"rounds": config.rounds.model_copy(update=changes)})


def with_ppo(config: Pipeline, **changes: Any) -> Pipeline:
    """Return settings with some of PPO's changed."""
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=changes)})


def read_points(policy: Artifact) -> Points:
    """Return what PPO's independent score measured: step, independent_score, score_reward and so on."""
    points: Points = json.loads((find(policy) / "scores.json").read_text())["points"]
    return points


def refreshed_points(later: Sequence[BuiltRound]) -> Points:
    """Return the points of all refreshes, with the steps since the first one."""
    points: Points = []
    for one in later:
        done = points[-1]["step"] if points else 0
        points += [point | {"step": done + point["step"]} for point in read_points(one.built["ppo"])]
    return points


def describe_curve(points: Points) -> str:
    """Return gold score and reward at the start, at the best gold score and at the end, and the KL there."""
    best = max(points, key=lambda one: one["independent_score"])
    parts = [
        f"step {one['step']:.0f} gold {one['independent_score']:.2f} "
        f"({one['independent_score_low']:.2f} to {one['independent_score_high']:.2f}) "
        f"reward {one['score_reward']:.2f} KL {one['score_kl']:.1f}"
        for one in (points[0], best, points[-1])
    ]
    return "; ".join(f"{name} {part}" for name, part in zip(("start", "best", "end"), parts, strict=True))


def measure_policies(test: GoldTest, repair: Repair, seed: int) -> dict[str, Numbers]:
    """Print a line for each policy and reward model of a seed; return the policies' mean outcomes by
    question, (Q,).
    """
    kept = repair.policies["peak"]["metrics"].get("ppo.kept_step")
    print(f"seed {seed}, start: win 50 % (the SFT model itself), gold {test.sft.mean():.2f}", flush=True)
    for name, policy in repair.policies.items():
        step = f" (step {kept})" if name == "peak" else ""
        gold = test.scores(policy).mean()
        print(
            f"seed {seed}, {name}{step}: win {describe_rate(test.win(policy))}, gold {gold:.2f}", flush=True
        )
    refreshes = [(f"refreshed ({number})", one) for number, one in enumerate(repair.later, start=1)]
    for name, one in [("stale", repair.first), *refreshes]:
        metrics = one.round.metrics
        print(
            f"seed {seed}, {name} reward model: {metrics['comparisons.asked']} labels of which "
            f"{metrics['comparisons.pairs']} decide, accuracy by gold on the site's answers "
            f"{test.reward_accuracy(one.built['reward']):.1%}",
            flush=True,
        )
    own = [describe_rate(accuracy_on_candidates(one.built["candidates"])) for one in repair.later]
    print(f"seed {seed}, each reward model on the answers of its policy: {', '.join(own)}", flush=True)
    outcomes = {name: np.asarray(test.outcomes(one).mean(axis=0)) for name, one in repair.policies.items()}
    for line in describe_differences([outcomes]):
        print(f"seed {seed}, {line}", flush=True)
    return outcomes


def describe_differences(found: Sequence[Mapping[str, Numbers]]) -> list[str]:
    """Return a line about each difference of two policies' win rates, over the questions of all seeds."""
    lines = []
    for first, second in DIFFERENCES:
        several = [np.concatenate([one[name] for one in found]) for name in (first, second)]
        difference = paired_difference(several[0], several[1])
        lines.append(f"{first} - {second}: {describe_difference(difference)}, {difference.n:,} questions")
    return lines


def print_summary(found: Sequence[Mapping[str, Numbers]]) -> None:
    """Print win rates and differences over all seeds."""
    for name in POLICIES:
        wins = [float(one[name].mean()) for one in found]
        print(
            f"{name}: win {np.mean(wins):.1%}, mean of {len(found)} seeds: "
            + " ".join(f"{x:.1%}" for x in wins)
        )
    for line in describe_differences(found):
        print(f"all seeds, {line}")
    if len(found) < 2:
        return
    for first, second in DIFFERENCES:
        means = [np.array([one[name].mean() for one in found]) for name in (first, second)]
        over_seeds: Interval = paired_difference(means[0], means[1])
        print(f"{first} - {second}: {describe_difference(over_seeds)} over {len(found)} seeds (Student's t)")


if __name__ == "__main__":
    main()
