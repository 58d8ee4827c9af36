"""Measure whether three rounds of labels are worth more than one round of as many.

python -m tests.benchmarks.rounds.budget DIR [--seeds 0 1 2] [--arms A B] [--threads 1] [--set NAME=VALUE ...]

The profile `rounds` on the built-in site: the gold scorer labels with noise 0.1, and the first answers are
those of the SFT model. Arm A is the profile (3 rounds of 100 labels and 24 steps), B one round with
all labels and steps of A (300, 72), C one round with all labels and the steps of one round (300, 24). Stages
that compare policies are left out; each policy answers the same evaluation questions, with the same random
numbers at a temperature of 1, and the gold scorer compares its answers with the SFT model's.

As in the flow, a policy that is shown to lose is set aside; here gold compares it with the one that it goes
on from, on --verdicts other questions. An arm ends with the last policy that has not lost.

DIR gets a home for each seed; what is built or measured there is neither built nor measured again. Several
processes may run different seeds at the same time.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flows import profiles
from tasks.config.pipeline import Pipeline
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.paired import paired_difference
from tasks.rounds.round_walk import Prepared, Round, standing_round
from tasks.rounds.verdict import EVEN
from tests.benchmarks.rounds import stored_stages
from tests.benchmarks.rounds.gold_test import (
    MORE_QUESTIONS,
    GoldTest,
    Numbers,
    describe_difference,
    describe_rate,
)

ARMS = ("A", "B", "C")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["A", "B"])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--verdicts", type=int, default=250, help="questions on which a round can lose")
    parser.add_argument("--draws", type=int, default=4, help="answers to each question")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    found: dict[str, list[Numbers]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        settings = [MORE_QUESTIONS, *options.set, f"seed={seed}", f"machine.threads={options.threads}"]
        folder = options.directory.absolute() / f"seed-{seed}"
        stored_stages.open_home(folder / "home")
        config = profiles.load("rounds", settings)
        prepared = stored_stages.build_base(config)
        gold = partial(GoldTest, config, prepared, folder / "measured", draws=options.draws)
        test = gold(questions=options.questions)
        verdicts = gold(questions=options.verdicts, apart_from=test.ids)
        for arm in options.arms:
            name = f"seed {seed}, {arm}"
            found[arm].append(measure_arm(test, verdicts, arm_config(config, arm), prepared, name))
        for arm in options.arms[1:]:
            difference = paired_difference(found[options.arms[0]][-1], found[arm][-1])
            print(f"seed {seed}, {options.arms[0]} - {arm}: {describe_difference(difference)}", flush=True)
    print_summary(options.arms, found)


def arm_config(config: Pipeline, arm: str) -> Pipeline:
    """Return the settings of an arm; ``config`` are those of A."""
    count, ppo = config.rounds.count, config.ppo
    if arm == "A":
        return config
    if arm == "B":
        ppo = ppo.model_copy(update={"steps": count * ppo.steps})
    one = {"count": 1, "comparisons": count * config.rounds.comparisons}
    return config.model_copy(update={"ppo": ppo, "rounds": config.rounds.model_copy(update=one)})


def measure_arm(
    test: GoldTest, verdicts: GoldTest, config: Pipeline, prepared: Prepared, name: str
) -> Numbers:
    """Run all rounds of an arm, print a line for each, and return the mean outcome of the last policy that
    has not lost on each question, (Q,); of the SFT model if all have.
    """
    rounds: list[Round] = [stored_stages.ROUND_0]
    for number in range(1, config.rounds.count + 1):
        standing = standing_round(rounds)
        one = stored_stages.build_round(config, number, prepared, rounds).round
        assert one.policy
        assert one.reward
        verdict = verdicts.win_against(one.policy, standing.policy if standing else None)
        rounds.append(one._replace(has_lost=verdict.high < EVEN))
        win, accuracy = test.win(one.policy), test.reward_accuracy(one.reward)
        line = describe_round(one.metrics, win, accuracy)
        against = f"round {standing.number}" if standing else "SFT"
        set_aside = ", set aside" if rounds[-1].has_lost else ""
        print(
            f"{name}, round {number}: {line}; {describe_rate(verdict)} against {against}{set_aside}",
            flush=True,
        )
    last = standing_round(rounds)
    if last is None:
        return np.full(len(test.ids), EVEN)
    assert last.policy
    return np.asarray(test.outcomes(last.policy).mean(axis=0))


def describe_round(metrics: Any, win: Interval, accuracy: float) -> str:
    """Return a line about a round."""
    return (
        f"win {describe_rate(win)}, reward model by gold {accuracy:.1%}, "
        f"by votes {metrics['reward_accuracy.votes']['value']:.1%}, "
        f"{metrics['comparisons.asked']} labels of which {metrics['comparisons.pairs']} decide, "
        f"{metrics['comparisons.right_by_gold']['value']:.1%} right, KL {metrics['ppo.rollout_kl']:.1f}"
    )


def print_summary(arms: list[str], found: dict[str, list[Numbers]]) -> None:
    """Print the mean win rate of each arm, and the differences of the first arm from the others."""
    num_seeds = len(found[arms[0]])
    for arm in arms:
        wins = [float(one.mean()) for one in found[arm]]
        print(
            f"{arm}: mean of {num_seeds} seeds {np.mean(wins):.1%}, " + " ".join(f"{one:.1%}" for one in wins)
        )
    for arm in arms[1:]:
        first, other = found[arms[0]], found[arm]
        pooled = paired_difference(np.concatenate(first), np.concatenate(other))
        print(f"{arms[0]} - {arm}: {describe_difference(pooled)} over {pooled.n:,} questions of all seeds")
        if num_seeds > 1:
            means = [np.array([one.mean() for one in some]) for some in (first, other)]
            seeds = paired_difference(means[0], means[1])
            print(f"{arms[0]} - {arm}: {describe_difference(seeds)} over {num_seeds} seeds (Student's t)")


if __name__ == "__main__":
    main()
