"""Fit a linear probe: the best score head on features of an untrained model, to start fine-tuning from.

Fine-tuning from a random head first changes good features to fit it; from the probe's head it need not (Kumar
et al. 2022, Fine-tuning can distort pretrained features and underperform out-of-distribution, arXiv
2202.10054, section 3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.algorithms import losses
from tasks.rlhf.compute.seeds import mix

# L2 penalties on standardised features; each fit starts from the weights of the penalty before it.
PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
FOLDS = 5
ITERATIONS = 200


class WeightedPairs(NamedTuple):
    """P pairs of S answers, which are numbered."""

    chosen: Tensor  # (P,) int64
    rejected: Tensor  # (P,) int64
    question: Tensor  # (P,) int64 number of the question
    margin: Tensor  # (P,) float32 nats by which the chosen answer must lead
    weight: Tensor  # (P,) float32, sum 1

    def select(self, mask: Tensor) -> "WeightedPairs":
        """Return the pairs for which ``mask`` (P,) is True, with weights that sum to 1."""
        chosen, rejected, question, margin, weight = (values[mask] for values in self)
        return WeightedPairs(
            chosen=chosen,
            rejected=rejected,
            question=question,
            margin=margin,
            weight=weight / weight.sum(),
        )


class Probe(NamedTuple):
    """A fitted probe, and how its penalty was chosen."""

    head: Tensor  # (1, D) float32, for features that are not standardised
    penalty: float
    losses: dict[float, float]  # by penalty: cross-validated mean loss, in nats


def fit_probe(features: Tensor, pairs: WeightedPairs, *, seed: int) -> Probe:
    """Fit a Bradley-Terry logistic regression on ``features``, (S, D) float32.

    The penalty is chosen by cross-validation over ``FOLDS`` parts of the questions; with all questions in one
    part it is the strongest.
    """
    standard, scale = standardise(features)
    pairs = pairs.select(pairs.weight > 0)
    fold = torch.tensor([mix(seed, number) % FOLDS for number in pairs.question.tolist()])
    cross_validated: dict[float, float] = {}
    folds = fold.unique()
    for held_out in folds if len(folds) > 1 else []:
        training, validation = pairs.select(fold != held_out), pairs.select(fold == held_out)
        share, weight = pairs.weight[fold == held_out].sum().item(), torch.zeros(features.shape[1])
        for penalty in PENALTIES:
            weight = fit_head(standard, training, penalty, weight)
            value = share * loss(standard @ weight, validation).item()
            cross_validated[penalty] = cross_validated.get(penalty, 0.0) + value
    best = min(PENALTIES, key=lambda penalty: cross_validated.get(penalty, 0.0))
    weight = fit_head(standard, pairs, best, torch.zeros(features.shape[1]))
    return Probe((weight / scale)[None], best, cross_validated)


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Scale features (S, D) to mean 0 and standard deviation 1; return also the deviations (D,).

    A constant feature becomes 0, and its deviation infinite.
    """
    scale = features.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)
    return (features - features.mean(dim=0)).div_(scale), scale


def loss(scores: Tensor, pairs: WeightedPairs) -> Tensor:
    """Return the weighted mean of the pairwise loss; scores (S,)."""
    return pairs.weight @ losses.pairwise_loss(scores[pairs.chosen], scores[pairs.rejected], pairs.margin)


def fit_head(features: Tensor, pairs: WeightedPairs, penalty: float, start: Tensor) -> Tensor:
    """Minimise the loss plus ``penalty`` / 2 times the squared norm of the weights, (D,), by L-BFGS."""
    weight = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(features @ weight, pairs) + penalty / 2 * weight.square().sum()
            value.backward()
        return value

    optimizer.step(objective)
    return weight.detach()


def bootstrap_counts(count: int, *, seed: int) -> Tensor:
    """Draw ``count`` of ``count`` items with replacement; return how often each is drawn, (count,)."""
    indices = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
    return indices.bincount(minlength=count).float()
