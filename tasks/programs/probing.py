"""How the reward model's heads begin with reward.probe: by what the features of the model that is about to be trained say already."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tasks.programs.config import RewardJob
from tasks.programs.entry import Run
from tasks.rlhf import branches, comparisons, measures, probe, ranks, schedules, sharded
from tasks.rlhf.comparisons import Batch, Comparison
from tasks.rlhf.probe import Evidence
from tasks.rlhf.scorer import Member, Scorer

MEASURES = "measures.json"
Features = Callable[[Member, list[Comparison], str], Tensor]


def begin(
    job: RewardJob, run: Run, model: Scorer, questions: list[Comparison], held_out: list[Comparison], features: Features, *, ahead: float
) -> None:
    """Begin every head with its probe, those of an ensemble's others on redrawn questions; what they reach goes to measures.json.

    ``ahead`` is what the older answer of a pair has before its reward.
    """
    known, unseen = features(model.members[0], questions, "training"), features(model.members[0], held_out, "held-out")
    pairs, judged = measures.pairs_of(questions), measures.pairs_of(held_out)
    found = []
    for number, member in enumerate(model.members):
        drawn = probe.redrawn(len(questions), seed=schedules.mix(job.seed, number)) if number else torch.ones(len(questions))
        found.append(ranks.everyones(probe.probe(known, evidence(job, pairs, drawn, ahead), seed=job.seed))[0])
        with torch.no_grad():
            member.head.weight.copy_(found[-1].head)
    rewards = unseen @ torch.cat([one.head for one in found]).mean(dim=0)
    loss, accuracy = measures.held_out_loss(judged, rewards, ahead=ahead), measures.accuracies(judged, rewards, ahead=ahead)
    print(f"The probe of the model as it is: penalty {found[0].strength:g}, held-out loss {loss:.4f}.", flush=True)
    chosen = [{"penalty": one.strength, "losses": one.losses} for one in found]
    run.note(MEASURES, {"probe": {"members": chosen, "held_out_loss": loss, "accuracy": measures.plain(accuracy)}})
    ranks.wait()


def evidence(job: RewardJob, pairs: measures.Pairs, drawn: Tensor, ahead: float) -> Evidence:
    """The pairs as the training loss weighs them, each question ``drawn`` so many times, (Q,)."""
    margin = job.reward.margin * pairs.gap - ahead * (2 * pairs.older - 1)
    share = 1 / pairs.question.bincount()[pairs.question] if job.reward.weigh == "questions" else torch.ones(len(pairs.question))
    weight = drawn[pairs.question] * share
    return Evidence(pairs.chosen, pairs.rejected, pairs.question, margin.float(), weight / weight.sum())


def said(run: Run) -> dict[str, Any]:
    """What measures.json says of the probe."""
    found: dict[str, Any] = json.loads((run.artifact / MEASURES).read_text())["probe"]
    return found


def metrics(run: Run) -> dict[str, Any]:
    """What the probe reached on the held-out pairs, as the summary has it."""
    shares = said(run)["accuracy"]
    named = {"probe": "votes", "probe_knowing_age": "knowing_age"}
    return {
        f"reward_accuracy.{name}": {part: shares[of][part] for part in ("value", "low", "high", "n")} for name, of in named.items() if of in shares
    }


def answer_features(member: Member, questions: list[Comparison], what: str, *, collate: Callable[[list[Comparison]], Batch], most: int) -> Tensor:
    """What a member's head sees of every answer of some questions, (S, D) float32; ``most`` answers at a time."""
    parts = comparisons.micro_batches(questions, most)
    total, read = sum(len(c.answers) for c in questions), 0

    def features(part: list[Comparison]) -> Tensor:
        nonlocal read
        with torch.no_grad(), member.active() as base:
            found = sharded.inside(base, branches.features, collate(part).branches).float().cpu()
        read += len(found) * ranks.world()
        print(f"Probe: {min(read, total)} of {total} {what} answers read.", flush=True)
        return found

    return torch.cat(ranks.each(parts, features))
