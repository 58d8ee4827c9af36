"""Initialise the reward model's heads with a linear probe of the untrained model (reward.probe)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.compute import distributed, fsdp, seeds
from tasks.rlhf.evaluation import linear_probe, reward_evaluation
from tasks.rlhf.evaluation.linear_probe import Probe, WeightedPairs
from tasks.rlhf.evaluation.reward_evaluation import Pairs
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.system.errors import InputError

Features = Callable[[Member, Sequence[Comparison], str], Tensor]


class PairLoss(NamedTuple):
    """Parameters of the training loss of a pair."""

    margin: float  # required lead of the chosen reward for each step between two answers' scores
    weigh: Literal["pairs", "questions"]  # what has equal weight
    age_bias: float  # added to the older answer's reward


def initialise_heads(
    model: Scorer,
    questions: Sequence[Comparison],
    held_out: Sequence[Comparison],
    features: Features,
    *,
    pair_loss: PairLoss,
    reported: Sequence[Comparison],
    seed: int,
    spare: Sequence[Member] = (),
) -> dict[str, Any]:
    """Set every head to its probe's; return the probes' results, the same on every rank. Raises InputError.

    So are the heads of the ``spare`` members, which count in no result. An ensemble's members after the first
    are fitted on bootstrap samples of the questions. The accuracy in the results is that on the ``reported``
    questions.
    """
    training_features = features(model.members[0], questions, "training")
    held_out_features = reported_features = features(model.members[0], held_out, "held-out")
    if reported is not held_out:
        reported_features = features(model.members[0], reported, "evaluation")
    for matrix in (training_features, held_out_features, reported_features):
        if not matrix.isfinite().all():
            raise InputError(
                "Some hidden states of the model are NaN or infinite, so nothing can be trained on them: set "
                "weights.merged to float32."
            )
    everyone = [*model.members, *spare]
    probes = _fit_probes(len(everyone), training_features, questions, pair_loss, seed)
    with torch.no_grad():
        for member, probe in zip(everyone, probes, strict=True):
            member.head.weight.copy_(probe.head)
    probes = probes[: len(model.members)]
    weight = torch.cat([probe.head for probe in probes]).mean(dim=0)
    age_bias = pair_loss.age_bias
    held_out_pairs = reward_evaluation.pairs_of(held_out)
    loss = reward_evaluation.held_out_loss(held_out_pairs, held_out_features @ weight, age_bias=age_bias)
    pairs = held_out_pairs if reported is held_out else reward_evaluation.pairs_of(reported)
    accuracy = reward_evaluation.accuracies(pairs, reported_features @ weight, age_bias=age_bias)
    print(
        f"The probe of the model as it is: penalty {probes[0].penalty:g}, held-out loss {loss:.4f}.",
        flush=True,
    )
    members = []
    for probe in probes:
        losses = {f"{penalty:g}": nats for penalty, nats in probe.losses.items()}
        members.append({"penalty": probe.penalty, "losses": losses})
    return {"members": members, "held_out_loss": loss, "accuracy": reward_evaluation.to_json(accuracy)}


def _fit_probes(
    count: int, features: Tensor, questions: Sequence[Comparison], pair_loss: PairLoss, seed: int
) -> list[Probe]:
    """Return the probe of each member, fitted by the first rank."""
    pairs = reward_evaluation.pairs_of(questions)
    probes: list[Probe] = []
    for number in range(count) if distributed.is_first() else ():
        counts = torch.ones(len(questions))
        if number:
            counts = linear_probe.bootstrap_counts(len(questions), seed=seeds.mix(seed, number))
        probes.append(linear_probe.fit_probe(features, weighted_pairs(pairs, counts, pair_loss), seed=seed))
    return distributed.all_gather(probes)[0]


def weighted_pairs(pairs: Pairs, counts: Tensor, pair_loss: PairLoss) -> WeightedPairs:
    """Return the pairs with the training loss's margins and weights; ``counts`` (Q,) is per question."""
    margin = pair_loss.margin * pairs.gap - pair_loss.age_bias * (2 * pairs.older - 1)
    share = torch.ones(len(pairs.question))
    if pair_loss.weigh == "questions":
        share = 1 / pairs.question.bincount()[pairs.question]
    weight = counts[pairs.question] * share
    return WeightedPairs(
        chosen=pairs.chosen,
        rejected=pairs.rejected,
        question=pairs.question,
        margin=margin.float(),
        weight=weight / weight.sum(),
    )


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    """Return the probe's accuracy on the reported pairs, with its interval, for the stage's summary."""
    accuracy = results["accuracy"]
    found = {}
    for name, stratum in (("probe", "votes"), ("probe_knowing_age", "knowing_age")):
        if stratum in accuracy:
            interval = {part: accuracy[stratum][part] for part in ("value", "low", "high", "n")}
            found[f"reward_accuracy.{name}"] = interval
    return found


def answer_features(
    member: Member,
    questions: Sequence[Comparison],
    name: str,
    *,
    collate: Callable[[Sequence[Comparison]], Batch],
    batch_size: int,
    phase: Callable[[str], Callable[[int, int], None]] | None = None,
) -> Tensor:
    """Return the features of every answer of some questions, (S, D) float32 on the CPU.

    ``batch_size`` answers are computed at a time; ``name`` is for the log, ``phase`` starts a progress
    report.
    """
    parts = comparisons.micro_batches(questions, batch_size)
    total, done = sum(len(c.answers) for c in questions), 0

    def features(part: Sequence[Comparison]) -> Tensor:
        nonlocal done
        with torch.no_grad(), member.active() as base:
            matrix = fsdp.with_full_weights(base, shared_prompt.features, collate(part).inputs).float().cpu()
        done += len(matrix) * distributed.world()
        print(f"Probe: {min(done, total)} of {total} {name} answers read.", flush=True)
        return matrix

    report_progress = phase(f"probe of {name} answers") if phase else None
    return torch.cat(distributed.map_over_ranks(parts, features, report_progress=report_progress))
