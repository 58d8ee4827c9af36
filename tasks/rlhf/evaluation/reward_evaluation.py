"""What held-out pairs say of a reward model: how often it is right, where, whether it means its probabilities, and what rules of thumb reach."""

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

RIDGE = 1e-3  # on the two weights of the rules together: holds them finite where a rule is always right


class Pairs(NamedTuple):
    """All pairs of some questions, P, by the numbers of their answers, which are counted through the questions."""

    chosen: Tensor  # (P,) int64
    rejected: Tensor  # (P,) int64
    question: Tensor  # (P,) int64 number of the question
    gap: Tensor  # (P,) float64
    older: Tensor  # (P,) float64: 1 where the chosen answer is the older, 0 where it is not, 0.5 where nobody knows
    tokens: Tensor  # (S,) float64 length of each answer
    asked: Tensor  # (S,) int64 number of each answer's question


def pairs_of(questions: Sequence[Comparison]) -> Pairs:
    """The pairs of some questions."""
    firsts = torch.tensor([0, *(len(c.answers) for c in questions)]).cumsum(0).tolist()
    rows = [
        (first + w, first + x, number, gap, 0.5 if older is None else float(older))
        for number, (c, first) in enumerate(zip(questions, firsts, strict=False))
        for (w, x), gap, older in zip(c.pairs, c.gaps, c.older, strict=True)
    ]
    chosen, rejected, question, gap, older = zip(*rows, strict=True)
    answers = [(len(answer), number) for number, c in enumerate(questions) for answer in c.answers]
    tokens, asked = zip(*answers, strict=True)
    exact = torch.float64
    return Pairs(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor(question),
        torch.tensor(gap, dtype=exact),
        torch.tensor(older, dtype=exact),
        torch.tensor(tokens, dtype=exact),
        torch.tensor(asked),
    )


def margins(pairs: Pairs, rewards: Tensor) -> Tensor:
    """Reward of each pair's chosen answer minus the rejected one's, (P,) float64; rewards (S,)."""
    exact = rewards.cpu().double()
    return exact[pairs.chosen] - exact[pairs.rejected]


def held_out_loss(pairs: Pairs, rewards: Tensor, *, ahead: float = 0.0) -> float:
    """Mean pairwise loss, in nats, where the older answer is ``ahead`` before its reward."""
    margin = margins(pairs, rewards) + ahead * (2 * pairs.older - 1)
    return losses.pairwise_loss(margin, torch.zeros_like(margin)).mean().item()


def fit_baseline_rules(pairs: Pairs) -> Tensor:
    """What a chosen answer's lead in the log of its length, and its being the older, say of its winning: logistic regression on training pairs, (2,).

    A model that orders pairs no better than this knows of a text what its length tells.
    """
    said = lengths_and_ages(pairs)
    count = len(said)
    nothing = torch.zeros_like(said[:1])  # what every pair's lead is held against
    weight = torch.full((count,), 1 / count, dtype=said.dtype)
    evidence = WeightedPairs(
        torch.arange(count), torch.full((count,), count), pairs.question, torch.zeros_like(weight), weight
    )
    return fit_head(torch.cat([said, nothing]), evidence, RIDGE, nothing[0])


def lengths_and_ages(pairs: Pairs) -> Tensor:
    """Of each pair: the log of the lengths' ratio, and 1 where the chosen answer is the older, -1 where it is not, 0 where nobody knows. (P, 2)."""
    return torch.stack(
        [(pairs.tokens[pairs.chosen] / pairs.tokens[pairs.rejected]).log(), 2 * pairs.older - 1], dim=1
    )


def accuracies(
    pairs: Pairs, rewards: Tensor, *, ahead: float = 0.0, together: Tensor | None = None
) -> dict[str, Any]:
    """Accuracy over all pairs, by gap and by length; that of "the longer wins" and "the older wins" on the same pairs, and what we have over them.

    A model that was trained with the older answer ``ahead`` is measured by its rewards alone, as a policy is judged, and knowing the ages as well.
    ``together`` are the weights of both rules as one, from ``rules_together`` of the training pairs.
    Every figure is a ``strata.Stratum`` or a ``Share``; correlations are of answers within their questions.
    """
    credits = pair_accuracy.correct(rewards[pairs.chosen], rewards[pairs.rejected]).cpu()
    chosen_tokens, rejected_tokens = pairs.tokens[pairs.chosen], pairs.tokens[pairs.rejected]
    rules = {"longer_wins": pair_accuracy.credit(chosen_tokens, rejected_tokens)}
    if (pairs.older != 0.5).any():
        rules["older_wins"] = pairs.older
        if together is not None:
            rules["rules_together"] = pair_accuracy.credit(
                lengths_and_ages(pairs) @ together, torch.zeros(len(pairs.older))
            )
    found: dict[str, Any] = {"votes": pair_accuracy.measure(credits, pairs.question)}
    found |= pair_accuracy.by_gap(credits, pairs.gap, pairs.question)
    found |= pair_accuracy.by_length(credits, chosen_tokens, rejected_tokens, pairs.question)
    found |= {name: pair_accuracy.measure(rule, pairs.question) for name, rule in rules.items()}
    found |= {
        f"over_{name}": pair_accuracy.accuracy_difference(credits, rule, pairs.question)
        for name, rule in rules.items()
    }
    if ahead:
        knowing = pair_accuracy.correct(
            margins(pairs, rewards) + ahead * (2 * pairs.older - 1), torch.zeros(len(pairs.older))
        )
        found["knowing_age"] = pair_accuracy.measure(knowing, pairs.question)
        found |= {
            f"knowing_age_over_{name}": pair_accuracy.accuracy_difference(knowing, rule, pairs.question)
            for name, rule in rules.items()
        }
    within = (
        pair_accuracy.centre_by_question(rewards.cpu(), pairs.asked),
        pair_accuracy.centre_by_question(pairs.tokens, pairs.asked),
    )
    return found | {"reward_and_length": pair_accuracy.spearman(*within, question=pairs.asked)}


class Calibration(NamedTuple):
    temperature: float  # by which margins are divided; 1 where none was fitted
    reason: str  # why none was fitted; "" where one was
    before: float  # expected calibration error without it
    after: float
    floor: float  # what a perfectly calibrated model of the same confidences has by chance
    n: int  # pairs that the errors are of
    reliability: list[calibration.Bin]  # of these pairs, with the temperature


def calibrate(pairs: Pairs, rewards: Tensor, *, fitted_on: Tensor | None = None) -> Calibration:
    """A temperature from the margins ``fitted_on``, which are of other questions, and the calibration errors of these pairs.

    Without ``fitted_on`` it is fitted on the pairs of every other question, and the errors are the others' (with fewer than four questions: of all).
    """
    margin, question = margins(pairs, rewards), pairs.question
    if fitted_on is None:
        fitted = (
            pairs.question % 2 == 0
            if pairs.question.max() >= 3
            else torch.ones_like(pairs.question, dtype=torch.bool)
        )
        rest = ~fitted if not fitted.all() else fitted
        fitted_on, margin, question = margin[fitted], margin[rest], question[rest]
    reason = calibration.reason_not_to_fit(fitted_on)
    temperature = 1.0 if reason else calibration.fit_temperature(fitted_on)
    before, after = (calibration.expected_calibration_error(margin, t) for t in (1.0, temperature))
    floor = calibration.noise_floor(margin, temperature)
    return Calibration(
        temperature,
        reason,
        before,
        after,
        floor,
        len(margin),
        calibration.reliability(margin, temperature, question=question),
    )


def single_interval(figure: Stratum | Interval) -> Interval:
    """A figure with one interval."""
    return wider_interval(figure) if isinstance(figure, Stratum) else figure


def to_json(value: Any) -> Any:
    """Figures as JSON."""
    if isinstance(value, Stratum):
        return wider_interval(value)._asdict() | {"questions": value.questions}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: to_json(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    return value
