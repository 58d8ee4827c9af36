"""How the reward model's heads begin with reward.probe: by what the features of the model that is about to be trained say already."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.compute import distributed, fsdp, seeds
from tasks.rlhf.evaluation import linear_probe, reward_evaluation
from tasks.rlhf.evaluation.linear_probe import Probe, WeightedPairs
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.system.errors import InputError

Features = Callable[[Member, list[Comparison], str], Tensor]


class PairLoss(NamedTuple):
    """What the training loss makes of a pair, beside the scores of its answers."""

    margin: float  # the chosen reward should be ahead by this much for each step between two answers' scores
    weigh: Literal["pairs", "questions"]  # what counts equally
    ahead: float  # what the older answer has before its reward


def initialise_heads(
    model: Scorer,
    questions: list[Comparison],
    held_out: list[Comparison],
    features: Features,
    *,
    pair_loss: PairLoss,
    measured: list[Comparison],
    seed: int,
) -> dict[str, Any]:
    """Begin every head with its probe, those of an ensemble's others on redrawn questions; gives what is told of it, the same on every rank.

    The accuracy is of the ``measured`` questions. Raises InputError.
    """
    known, unseen = (
        features(model.members[0], questions, "training"),
        features(model.members[0], held_out, "held-out"),
    )
    reported = unseen if measured is held_out else features(model.members[0], measured, "evaluation")
    if not all(some.isfinite().all() for some in (known, unseen, reported)):
        raise InputError(
            "Some hidden states of the model are no numbers, so nothing can be trained on them: set weights.merged to float32."
        )
    pairs, judged = reward_evaluation.pairs_of(questions), reward_evaluation.pairs_of(held_out)
    found: list[Probe] = []
    for number in range(len(model.members)) if distributed.is_first() else ():
        drawn = (
            linear_probe.bootstrap_counts(len(questions), seed=seeds.mix(seed, number))
            if number
            else torch.ones(len(questions))
        )
        found.append(linear_probe.fit_probe(known, weighted_pairs(pairs, drawn, pair_loss), seed=seed))
    found = distributed.all_gather(found)[0]
    with torch.no_grad():
        for member, one in zip(model.members, found, strict=True):
            member.head.weight.copy_(one.head)
    weight = torch.cat([one.head for one in found]).mean(dim=0)
    rewards = unseen @ weight
    loss = reward_evaluation.held_out_loss(judged, rewards, ahead=pair_loss.ahead)
    if measured is not held_out:
        judged, rewards = reward_evaluation.pairs_of(measured), reported @ weight
    accuracy = reward_evaluation.accuracies(judged, rewards, ahead=pair_loss.ahead)
    print(
        f"The probe of the model as it is: penalty {found[0].strength:g}, held-out loss {loss:.4f}.",
        flush=True,
    )
    chosen = [
        {"penalty": one.strength, "losses": {f"{strength:g}": lost for strength, lost in one.losses.items()}}
        for one in found
    ]
    return {"members": chosen, "held_out_loss": loss, "accuracy": reward_evaluation.to_json(accuracy)}


def weighted_pairs(pairs: reward_evaluation.Pairs, drawn: Tensor, pair_loss: PairLoss) -> WeightedPairs:
    """The pairs with the training loss's margins and weights, each question ``drawn`` so many times, (Q,)."""
    margin = pair_loss.margin * pairs.gap - pair_loss.ahead * (2 * pairs.older - 1)
    share = (
        1 / pairs.question.bincount()[pairs.question]
        if pair_loss.weigh == "questions"
        else torch.ones(len(pairs.question))
    )
    weight = drawn[pairs.question] * share
    return WeightedPairs(pairs.chosen, pairs.rejected, pairs.question, margin.float(), weight / weight.sum())


def metrics(told: dict[str, Any]) -> dict[str, Any]:
    """What the probe reached on the pairs that are reported on, as the summary has it."""
    shares, named = told["accuracy"], {"probe": "votes", "probe_knowing_age": "knowing_age"}
    return {
        f"reward_accuracy.{name}": {part: shares[of][part] for part in ("value", "low", "high", "n")}
        for name, of in named.items()
        if of in shares
    }


def answer_features(
    member: Member,
    questions: list[Comparison],
    what: str,
    *,
    collate: Callable[[list[Comparison]], Batch],
    most: int,
    phase: Callable[[str], Callable[[int, int], None]] | None = None,
) -> Tensor:
    """What a member's head sees of every answer of some questions, (S, D) float32; ``most`` answers at a time."""
    parts = comparisons.micro_batches(questions, most)
    total, read = sum(len(c.answers) for c in questions), 0

    def features(part: list[Comparison]) -> Tensor:
        nonlocal read
        with torch.no_grad(), member.active() as base:
            found = fsdp.with_full_weights(base, shared_prompt.features, collate(part).branches).float().cpu()
        read += len(found) * distributed.world()
        print(f"Probe: {min(read, total)} of {total} {what} answers read.", flush=True)
        return found

    return torch.cat(
        distributed.map_over_ranks(parts, features, told=phase(f"probe of {what} answers") if phase else None)
    )
