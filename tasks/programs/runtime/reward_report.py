"""Report accuracy and calibration of the reward model on pairs that it did not learn from."""

from typing import Any

from torch import Tensor

from tasks.programs.runtime.program import Run
from tasks.programs.runtime.reward_tests import MEASURES
from tasks.rlhf.evaluation import pair_accuracy, reward_evaluation
from tasks.rlhf.evaluation.reward_evaluation import Calibration, Pairs
from tasks.rlhf.models import reward_model

RULES = {"longer_wins": "the longer answer wins", "older_wins": "the older answer wins"}
# Accuracies of the summary, in this order; all others are in measures.json alone.
BASELINES = (*RULES, "rules_together")
REPORTED = (
    "votes",
    "length_matched",
    "knowing_age",
    *BASELINES,
    *(f"over_{rule}" for rule in BASELINES),
    *(f"knowing_age_over_{rule}" for rule in BASELINES),
)


def report_accuracy(
    pairs: Pairs, rewards: Tensor, run: Run, *, age_bias: float, baseline: Tensor, calibrated: Calibration
) -> dict[str, Any]:
    """Measure accuracy on ``pairs`` by the rewards (S,) of their answers.

    Return metrics; everything measured goes to measures.json.

    ``baseline`` are the weights of the rules' logistic regression on training pairs, see
    `reward_evaluation.fit_baseline_rules`.
    """
    found = reward_evaluation.accuracies(pairs, rewards, age_bias=age_bias, baseline=baseline)
    measures = {
        "accuracy": reward_evaluation.to_json(found),
        "calibration": reward_evaluation.to_json(calibrated),
    }
    run.note(MEASURES, measures)
    run.note(reward_model.RECORD, {"temperature": calibrated.temperature, "head_start": age_bias})
    _warn(found, calibrated, run)
    metrics: dict[str, Any] = {
        f"reward_accuracy.{name}": reward_evaluation.single_interval(found[name])._asdict()
        for name in REPORTED
        if name in found
    }
    metrics |= {
        "reward.length_correlation": found["reward_and_length"]._asdict(),
        "reward.ece": calibrated.after,
        "reward.ece_uncalibrated": calibrated.before,
        "reward.ece_floor": calibrated.floor,
    }
    return metrics if calibrated.reason else metrics | {"reward.temperature": calibrated.temperature}


def report_made(made: dict[str, int], run: Run) -> dict[str, Any]:
    """Record the number of comparisons that were made without people, by kind; return their sum as a metric.

    Warns of kinds of which none could be made.
    """
    run.note(MEASURES, {"made": made})
    if missing := [kind for kind, count in made.items() if not count]:
        run.warn(
            f"No comparison of these kinds could be made: {', '.join(missing)} (reward.hard_negatives). They "
            "need answers that end within text.max_answer_tokens and, for wrong_name, that copy names from "
            "their questions: take the kinds out, raise the limit, or raise the share."
        )
    return {"reward.made_comparisons": sum(made.values())}


def _warn(found: dict[str, Any], calibrated: Calibration, run: Run) -> None:
    votes = pair_accuracy.wider_interval(found["votes"])
    if votes.low <= 0.5:
        run.warn(
            f"The reward model orders {votes.value:.0%} of {votes.n} pairs that it did not learn from as the "
            "votes do, which is "
            "not distinguishable from guessing: a policy trained against it learns noise. Train it longer or "
            "on more pairs."
        )
    for rule, text in RULES.items():
        if f"over_{rule}" in found and found[f"over_{rule}"].high < 0:
            run.warn(
                f'The reward model orders pairs that it did not learn from worse than the rule "{text}" '
                "does: train it longer, "
                "on more pairs, or on a larger base."
            )
    if calibrated.reason:
        run.warn(
            f"No temperature was fitted to the reward model's margins, because {calibrated.reason}; "
            "probabilities are taken as they are."
        )
