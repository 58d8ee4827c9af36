"""Evaluate a reward model on held-out pairs: accuracy, calibration, and the accuracy of simple rules."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.algorithms import losses
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.evaluation import calibration, pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.linear_probe import WeightedPairs, fit_head
from tasks.rlhf.evaluation.pair_accuracy import Stratum, wider_interval

RIDGE = 1e-3  # on the two weights of the baseline rule: keeps them finite if a rule is always right


class Pairs(NamedTuple):
    """All P pairs of some questions, by the numbers of their answers, counted through the questions."""

    chosen: Tensor  # (P,) int64
    rejected: Tensor  # (P,) int64
    question: Tensor  # (P,) int64 number of the question
    gap: Tensor  # (P,) float64
    older: Tensor  # (P,) float64: 1 if the chosen answer is the older, 0 if it is the younger, 0.5 if unknown
    tokens: Tensor  # (S,) float64 length of each answer
    asked: Tensor  # (S,) int64 number of each answer's question


def pairs_of(questions: Sequence[Comparison]) -> Pairs:
    """Return the pairs of some questions."""
    rows: list[tuple[int, int, int, float, float]] = []
    answers: list[tuple[int, int]] = []
    for number, comparison in enumerate(questions):
        first = len(answers)
        for (w, x), gap, older in zip(comparison.pairs, comparison.gaps, comparison.older, strict=True):
            rows.append((first + w, first + x, number, gap, 0.5 if older is None else float(older)))
        answers += [(len(answer), number) for answer in comparison.answers]
    chosen, rejected, question, gaps, olders = zip(*rows, strict=True)
    tokens, asked = zip(*answers, strict=True)
    return Pairs(
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        question=torch.tensor(question),
        gap=torch.tensor(gaps, dtype=torch.float64),
        older=torch.tensor(olders, dtype=torch.float64),
        tokens=torch.tensor(tokens, dtype=torch.float64),
        asked=torch.tensor(asked),
    )


def margins(pairs: Pairs, rewards: Tensor) -> Tensor:
    """Return the chosen answer's reward minus the rejected one's, (P,) float64; rewards (S,)."""
    exact = rewards.cpu().double()
    return exact[pairs.chosen] - exact[pairs.rejected]


def held_out_loss(pairs: Pairs, rewards: Tensor, *, age_bias: float = 0.0) -> float:
    """Return the mean pairwise loss, in nats; ``age_bias`` is added to the older answer's reward."""
    margin = margins(pairs, rewards) + age_bias * (2 * pairs.older - 1)
    return losses.pairwise_loss(margin, torch.zeros_like(margin)).mean().item()


def fit_baseline_rules(pairs: Pairs) -> Tensor:
    """Fit a logistic regression of length and age on training pairs; return its two weights, (2,).

    A model that orders pairs no better than this has learnt no more of a text than its length.
    """
    inputs = lengths_and_ages(pairs)
    count = len(inputs)
    zero = torch.zeros_like(inputs[:1])  # stands for the rejected answer of every pair
    weight = torch.full((count,), 1 / count, dtype=inputs.dtype)
    weighted = WeightedPairs(
        chosen=torch.arange(count),
        rejected=torch.full((count,), count),
        question=pairs.question,
        margin=torch.zeros_like(weight),
        weight=weight,
    )
    return fit_head(torch.cat([inputs, zero]), weighted, RIDGE, zero[0])


def lengths_and_ages(pairs: Pairs) -> Tensor:
    """Return (P, 2): the log ratio of lengths; 1, -1 or 0 if the chosen one is older, younger, undated."""
    log_ratio = (pairs.tokens[pairs.chosen] / pairs.tokens[pairs.rejected]).log()
    return torch.stack([log_ratio, 2 * pairs.older - 1], dim=1)


def accuracies(
    pairs: Pairs, rewards: Tensor, *, age_bias: float = 0.0, baseline: Tensor | None = None
) -> dict[str, Any]:
    """Return the accuracy by stratum, and that of the rules "the longer wins" and "the older wins".

    A model that was trained with ``age_bias`` is measured by its rewards alone, as a policy is judged, and
    also with the age bias added. ``baseline`` are the weights of both rules together, from
    `fit_baseline_rules` of the training pairs. Correlations are of answers within their questions.
    """
    credits = pair_accuracy.correct(rewards[pairs.chosen], rewards[pairs.rejected]).cpu()
    rules = _rule_credits(pairs, baseline)
    found: dict[str, Stratum | Interval] = {"votes": pair_accuracy.measure(credits, pairs.question)}
    found |= pair_accuracy.by_gap(credits, pairs.gap, pairs.question)
    chosen_tokens, rejected_tokens = pairs.tokens[pairs.chosen], pairs.tokens[pairs.rejected]
    found |= pair_accuracy.by_length(credits, chosen_tokens, rejected_tokens, pairs.question)
    for name, rule in rules.items():
        found[name] = pair_accuracy.measure(rule, pairs.question)
    for name, rule in rules.items():
        found[f"over_{name}"] = pair_accuracy.accuracy_difference(credits, rule, pairs.question)
    if age_bias:
        margin = margins(pairs, rewards) + age_bias * (2 * pairs.older - 1)
        knowing_age = pair_accuracy.correct(margin, torch.zeros(len(pairs.older)))
        found["knowing_age"] = pair_accuracy.measure(knowing_age, pairs.question)
        for name, rule in rules.items():
            difference = pair_accuracy.accuracy_difference(knowing_age, rule, pairs.question)
            found[f"knowing_age_over_{name}"] = difference
    centred_rewards = pair_accuracy.centre_by_question(rewards.cpu(), pairs.asked)
    centred_tokens = pair_accuracy.centre_by_question(pairs.tokens, pairs.asked)
    correlation = pair_accuracy.spearman(centred_rewards, centred_tokens, question=pairs.asked)
    return found | {"reward_and_length": correlation}


def _rule_credits(pairs: Pairs, baseline: Tensor | None) -> dict[str, Tensor]:
    """Return the credits (P,) of the simple rules by name; ages must be known for all but the first."""
    lengths = pairs.tokens[pairs.chosen], pairs.tokens[pairs.rejected]
    rules = {"longer_wins": pair_accuracy.credit(*lengths)}
    if (pairs.older != 0.5).any():
        rules["older_wins"] = pairs.older
        if baseline is not None:
            log_odds = lengths_and_ages(pairs) @ baseline
            rules["rules_together"] = pair_accuracy.credit(log_odds, torch.zeros(len(pairs.older)))
    return rules


class Calibration(NamedTuple):
    """A reward model's temperature, and its expected calibration errors."""

    temperature: float  # by which margins are divided; 1 if none was fitted
    reason: str  # why none was fitted; "" if one was
    before: float  # expected calibration error without it
    after: float
    floor: float  # that of a perfectly calibrated model with the same confidences, by chance
    n: int  # pairs on which the errors are measured
    reliability: list[calibration.Bin]  # of these pairs, with the temperature


def calibrate(pairs: Pairs, rewards: Tensor, *, fitted_on: Tensor | None = None) -> Calibration:
    """Fit a temperature on margins of other questions, and measure calibration on these pairs.

    Without ``fitted_on`` it is fitted on the pairs of every second question and measured on the others, or
    with fewer than four questions fitted and measured on all.
    """
    margin, question = margins(pairs, rewards), pairs.question
    if fitted_on is None:
        fitted = torch.ones_like(pairs.question, dtype=torch.bool)
        if pairs.question.max() >= 3:
            fitted = pairs.question % 2 == 0
        rest = ~fitted if not fitted.all() else fitted
        fitted_on, margin, question = margin[fitted], margin[rest], question[rest]
    reason = calibration.reason_not_to_fit(fitted_on)
    temperature = 1.0 if reason else calibration.fit_temperature(fitted_on)
    return Calibration(
        temperature=temperature,
        reason=reason,
        before=calibration.expected_calibration_error(margin, 1.0),
        after=calibration.expected_calibration_error(margin, temperature),
        floor=calibration.noise_floor(margin, temperature),
        n=len(margin),
        reliability=calibration.reliability(margin, temperature, question=question),
    )


def single_interval(figure: Stratum | Interval) -> Interval:
    """Return a figure with one interval: of a stratum's two the wider one at either end."""
    return wider_interval(figure) if isinstance(figure, Stratum) else figure


def to_json(value: Any) -> Any:
    """Convert figures, within dictionaries, lists and records, to JSON values."""
    if isinstance(value, Stratum):
        return wider_interval(value)._asdict() | {"questions": value.questions}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: to_json(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    return value
