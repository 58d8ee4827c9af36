"""Linear probing: the score head that does best on the features of a model that is not trained, to begin fine-tuning from.

Fine-tuning from a head of chance first bends good features to it (Kumar et al. 2022, Fine-tuning can distort pretrained features and underperform
out-of-distribution, section 3); from the probe's head it need not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.algorithms import losses
from tasks.rlhf.compute.seeds import mix

PENALTIES = (
    100.0,
    30.0,
    10.0,
    3.0,
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
)  # of the L2 penalty on standardised features, each fit begins where the last ended
FOLDS = 5
ITERATIONS = 200


class WeightedPairs(NamedTuple):
    """Pairs, P, of answers, S, by their numbers."""

    chosen: Tensor  # (P,) int64
    rejected: Tensor  # (P,) int64
    question: Tensor  # (P,) int64 number of the question
    margin: Tensor  # (P,) float32 nats by which the chosen answer must lead
    weight: Tensor  # (P,) float32, sum 1

    def of(self, taken: Tensor) -> "WeightedPairs":
        """The pairs that are ``taken``, (P,) bool."""
        chosen, rejected, question, margin, weight = (values[taken] for values in self)
        return WeightedPairs(chosen, rejected, question, margin, weight / weight.sum())


class Probe(NamedTuple):
    head: Tensor  # (1, D) float32, for the features as they are
    strength: float
    losses: dict[
        float, float
    ]  # of each strength: mean loss, in nats, of the pairs of questions that it was not fitted on


def fit_probe(features: Tensor, evidence: WeightedPairs, *, seed: int) -> Probe:
    """The Bradley-Terry logistic regression on ``features``, (S, D) float32, whose penalty does best over ``FOLDS`` parts of the questions."""
    standard, scale = standardise(features)
    evidence = evidence.of(evidence.weight > 0)
    fold = torch.tensor([mix(seed, number) % FOLDS for number in evidence.question.tolist()])
    found: dict[float, float] = {}
    parts = (
        fold.unique() if len(fold.unique()) > 1 else []
    )  # all questions in one part: nothing to choose by, and the strongest penalty it is
    for part in parts:
        fitted, judged = evidence.of(fold != part), evidence.of(fold == part)
        share, weight = evidence.weight[fold == part].sum().item(), torch.zeros(features.shape[1])
        for strength in PENALTIES:
            weight = fit_head(standard, fitted, strength, weight)
            found[strength] = found.get(strength, 0.0) + share * loss(standard @ weight, judged).item()
    best = min(PENALTIES, key=lambda strength: found.get(strength, 0.0))
    weight = fit_head(standard, evidence, best, torch.zeros(features.shape[1]))
    return Probe((weight / scale)[None], best, found)


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (S, D) with mean 0 and deviation 1 over the answers, and their deviations (D,): infinite for one that never changes, which is 0."""
    scale = features.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)
    return (features - features.mean(dim=0)).div_(scale), scale


def loss(scores: Tensor, evidence: WeightedPairs) -> Tensor:
    """Weighted mean of the pairwise loss; scores (S,)."""
    return evidence.weight @ losses.pairwise_loss(
        scores[evidence.chosen], scores[evidence.rejected], evidence.margin
    )


def fit_head(features: Tensor, evidence: WeightedPairs, strength: float, begin: Tensor) -> Tensor:
    """Minimise the loss plus ``strength`` / 2 times the squared norm of the weights, (D,), by L-BFGS; the problem is convex."""
    weight = begin.clone().requires_grad_(True)
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
            value = loss(features @ weight, evidence) + strength / 2 * weight.square().sum()
            value.backward()
        return value

    optimizer.step(objective)
    return weight.detach()


def bootstrap_counts(count: int, *, seed: int) -> Tensor:
    """How often each of ``count`` is drawn when as many are drawn with replacement, (count,) float32."""
    drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
    return drawn.bincount(minlength=count).float()
