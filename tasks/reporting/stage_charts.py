"""Draw each stage's metrics, with one sentence on how to read each chart."""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from markupsafe import Markup

from tasks.reporting.charts import Curve, Mark, draw_curves
from tasks.reporting.numbers import (
    format_interval,
    format_number,
    format_percent,
    format_points,
    format_range,
)


class Panel(NamedTuple):
    """One chart: its metrics with their labels. Metrics that a stage did not log are left out."""

    title: str
    metrics: Mapping[str, str]
    note: str
    bounds: tuple[float, float] | None = None
    only_if_it_moves: bool = False


class Chart(NamedTuple):
    """A drawn panel; ``legend`` holds each curve's label and last value."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    drawing: Markup


TITLES = {
    "pretrain": (
        "Base model",
        "A small Llama, trained from scratch on the fine-tuning questions and all their answers.",
    ),
    "sft": ("Supervised fine-tuning", "Fine-tuned on the best answer of each question."),
    "merge": ("Merge", "The adapter folded into the base; every later stage starts from the result."),
    "reference": (
        "Reference",
        "The SFT model's log-probability of every answer that DPO compares, computed once.",
    ),
    "reward": ("Reward model", "Learns from pairs of answers which one the voters preferred."),
    "ppo": (
        "PPO",
        "The policy samples answers, the reward model scores them, a KL penalty keeps it near the SFT model.",
    ),
    "dpo": ("DPO", "Learns from the same pairs without a reward model; the SFT model is its reference."),
}

HELD_OUT = "held_out_loss"  # logged now and then, not at every step
LOSSES = {"loss": "training", HELD_OUT: "held-out"}

PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (
        Panel(
            "Loss", {"loss": "loss"}, "Cross-entropy of the next token in nats; it should fall and level off."
        ),
    ),
    "sft": (
        Panel(
            "Loss", LOSSES, "Cross-entropy of the answers' tokens in nats; e raised to it is the perplexity."
        ),
    ),
    "reward": (
        Panel("Loss", LOSSES, "Log-loss of the preferred answer; guessing costs 0.693."),
        Panel(
            "Accuracy",
            {"accuracy": "accuracy"},
            "Share of the batch's pairs ordered as the votes do; guessing gets one half.",
            (0, 1),
        ),
    ),
    "ppo": (
        Panel(
            "Reward",
            {"reward": "reward"},
            "Normalised score of the sampled answers: 0 is an average reference answer, 1 a standard "
            "deviation better.",
        ),
        Panel(
            "KL from the SFT model",
            {"kl": "k1", "kl_k3": "k3"},
            "How far the policy has moved, in nats a response; two estimators (k1 unbiased, k3 never "
            "negative) that should agree.",
        ),
        Panel(
            "Entropy",
            {"entropy_estimate": "entropy"},
            "Nats a token the policy is undecided by; a collapse to 0 means it repeats itself.",
        ),
        Panel(
            "Length",
            {"length": "tokens"},
            "Mean tokens of an answer; a steady climb often means that length, not quality, is rewarded.",
        ),
        Panel(
            "Ended answers",
            {"ended": "share"},
            "Share of answers that end by themselves before the length limit.",
            (0, 1),
        ),
        Panel(
            "Clip fraction",
            {"clip_fraction": "policy"},
            "Share of tokens whose probability moved past the clip range in an update; 0.05 to 0.3 is usual.",
        ),
        Panel(
            "Update size",
            {"approx_kl": "KL"},
            "KL of an update from the policy that sampled, in nats a token; large values mean steps too "
            "long.",
        ),
        Panel(
            "Value loss",
            {"value_loss": "loss"},
            "Half the squared error of the critic's forecast of the return.",
        ),
        Panel(
            "Explained variance",
            {"explained_variance": "share"},
            "Share of the returns' variance that the critic foresees; 1 is perfect, below 0 worse than none.",
        ),
        Panel(
            "KL coefficient",
            {"kl_coefficient": "beta"},
            "Weight of the KL penalty, as the controller set it to reach its target.",
            None,
            True,
        ),
        Panel(
            "Skipped updates",
            {"skipped": "updates"},
            "Updates left out because the policy had moved too far from the sampler.",
            None,
            True,
        ),
    ),
    "dpo": (
        Panel(
            "Loss", LOSSES, "Log-loss of the preferred answer under the implicit reward; it starts at 0.693."
        ),
        Panel(
            "Accuracy",
            {"accuracy": "accuracy"},
            "Share of pairs that the implicit reward orders as the votes do.",
            (0, 1),
        ),
        Panel(
            "Implicit reward",
            {"margin": "margin", "chosen_reward": "preferred"},
            "Preferred minus other answer, which should grow, and preferred alone; below 0 that became "
            "less likely than under SFT.",
        ),
        Panel(
            "Best answers",
            {"nll": "nats"},
            "Negative log-likelihood a token of the questions' best answers: the likelihood term holds it "
            "down.",
        ),
    ),
}

FACTS = {  # shown in this order
    "pretrain.loss": "last training loss",
    "pretrain.parameters": "parameters",
    "sft.held_out_loss": "held-out loss",
    "sft.best_step": "step with the lowest held-out loss",
    "sft.perplexity": "held-out perplexity",
    "sft.packing_leak": "leak between packed documents",
    "sft.prompts_cut": "prompts cut to the limit",
    "sft.answers_cut": "answers cut to the limit",
    "merge.drift_max": "largest change of a logit",
    "merge.drift_mean": "mean change of a logit",
    "merge.top1_agreement": "tokens with the same likeliest successor",
    "merge.answers_reproduced": "test texts continued alike",
    "merge.reward_drift_max": "largest change of a reward",
    "merge.order_reproduced": "test texts ranked alike",
    "reference.log_prob": "mean log-probability of a token, nats",
    "reward.held_out_loss": "held-out loss",
    "reward.best_step": "step with the lowest held-out loss",
    "reward_accuracy.votes": "pairs ordered as the votes",
    "reward_accuracy.length_matched": "of those of like length",
    "reward_accuracy.longer_wins": 'by the rule "the longer wins"',
    "reward_accuracy.over_longer_wins": 'more than the rule "the longer wins"',
    "reward_accuracy.older_wins": 'by the rule "the older wins"',
    "reward_accuracy.over_older_wins": 'more than the rule "the older wins"',
    "reward_accuracy.rules_together": "by both rules, weighed by the training pairs",
    "reward_accuracy.over_rules_together": "more than both rules together",
    "reward_accuracy.knowing_age": "pairs ordered as the votes, knowing which answer was first",
    "reward_accuracy.knowing_age_over_longer_wins": 'that, more than the rule "the longer wins"',
    "reward_accuracy.knowing_age_over_older_wins": 'that, more than the rule "the older wins"',
    "reward_accuracy.knowing_age_over_rules_together": "that, more than both rules together",
    "reward_accuracy.probe": "by the head alone, before training",
    "reward_accuracy.probe_knowing_age": "by that, knowing which answer was first",
    "reward.length_correlation": "rank correlation of reward and length",
    "reward.ece": "calibration error",
    "reward.ece_floor": "that of a perfect model, by chance",
    "reward.ece_uncalibrated": "before calibration",
    "reward.temperature": "temperature",
    "reward.worst_attack": "real answers out-scored by the worst attack",
    "reward.elsewhere_correlation": "correlation of rewards at the own and another question",
    "reward.mean": "mean reward of reference answers",
    "reward.std": "their standard deviation",
    "reward.prompts_cut": "prompts cut to the limit",
    "reward.answers_cut": "answers cut to the limit",
    "reward.pairs_equal_once_cut": "pairs left out: equal once cut",
    "ppo.rollout_reward": "reward of the last batch",
    "ppo.rollout_kl": "KL of the last batch",
    "ppo.rollout_length": "tokens of its answers",
    "ppo.rollout_ended": "of them ended by themselves",
    "ppo.prompts_cut": "prompts cut to the limit",
    "dpo.held_out_loss": "held-out loss",
    "dpo.best_step": "step with the lowest held-out loss",
    "dpo.implicit_accuracy": "pairs ordered as the votes",
    "dpo.prompts_cut": "prompts cut to the limit",
    "dpo.answers_cut": "answers cut to the limit",
    "dpo.pairs_equal_once_cut": "pairs left out: equal once cut",
}
SHARES = ("agreement", "accuracy", "ended", "wins", "win_rate", "reproduced", "worst_attack", ".ece", "s_cut")
DIFFERENCES = (".over_",)  # of shares


def draw_charts(
    stage: str, lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any] = MappingProxyType({})
) -> list[Chart]:
    """Return the charts of a stage's logged steps.

    The chart of the held-out loss marks the kept weights, by the stage's ``metrics``.
    """
    drawn = []
    for panel in PANELS.get(stage, ()):
        named = [
            (name, Curve(label, _read_points(lines, name), sparse=name == HELD_OUT))
            for name, label in panel.metrics.items()
        ]
        found = [curve for _, curve in named if curve.points]
        if panel.only_if_it_moves and len({y for curve in found for _, y in curve.points}) < 2:
            continue
        mark = next(
            (find_kept_weights(stage, curve.points, metrics) for name, curve in named if name == HELD_OUT),
            None,
        )
        if drawing := draw_curves(found, title=f"{stage}: {panel.title}", bounds=panel.bounds, mark=mark):
            drawn.append(
                Chart(
                    panel.title,
                    panel.note,
                    [(curve.label, format_number(curve.points[-1][1])) for curve in found],
                    drawing,
                )
            )
    return drawn


def _read_points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def find_kept_weights(
    stage: str, looks: Sequence[tuple[float, float]], metrics: Mapping[str, Any]
) -> Mark | None:
    """Return the evaluation step whose weights were kept.

    It is the step with the stage's own held-out loss; without one, the step with the lowest loss. The best
    step alone is not enough: with keep=last other weights are kept.
    """
    final, best = metrics.get(f"{stage}.{HELD_OUT}"), metrics.get(f"{stage}.best_step")
    looks = [look for look in looks if math.isfinite(look[1])]
    if not looks:
        return None
    word, wanted = ("lowest", min(y for _, y in looks)) if final is None else ("kept", final)
    step, loss = min(looks, key=lambda look: (abs(look[1] - wanted), look[0] != best, look[0]))
    return Mark(step, loss, f"{word}: {format_number(loss)} at step {step:,}")


def drawn_metrics(stage: str, lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the metrics that the stage's charts show."""
    return {f"{stage}.{HELD_OUT}", f"{stage}.best_step"} if _read_points(lines, HELD_OUT) else set()


def format_facts(metrics: Mapping[str, Any], drawn: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return (name, value) of the metrics of a stage's summary that are not drawn, with readable names."""
    places = {name: place for place, name in enumerate(FACTS)}
    names = sorted(
        (name for name in metrics if name not in drawn), key=lambda name: places.get(name, len(places))
    )
    return [
        (FACTS.get(name, name.partition(".")[2].replace("_", " ")), format_metric(name, metrics[name]))
        for name in names
    ]


def format_metric(name: str, value: Any) -> str:
    """Return a metric as text, with its interval if it has one.

    Shares are in per cent, differences of shares in points.
    """
    if any(word in name for word in DIFFERENCES):
        value, low, high = (format_points(value[part]) for part in ("value", "low", "high"))
        return f"{value} points ({low} to {high})"
    is_share = any(word in name for word in SHARES)
    if not isinstance(value, Mapping):
        return format_percent(value) if is_share else format_number(value)
    if is_share:
        return f"{format_percent(value['value'])} ({format_interval(value)})"
    return f"{format_number(value['value'])} ({format_range(value)})"
