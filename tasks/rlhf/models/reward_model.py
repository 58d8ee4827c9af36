"""Load a trained reward model and score answers with it.

It is one adapter with its head, an ensemble of them on a shared base, or a model of its own.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.rlhf.batches import sequences, shared_prompt
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.batches.shared_prompt import SharedPromptBatch
from tasks.rlhf.compute import fsdp
from tasks.rlhf.models import loading, lora
from tasks.rlhf.models.trainable import HEAD, Active, adapter_folder, unchanged

RECORD = "reward.json"
HELD_OUT = "held_out"  # in the record: mean and standard deviation of the member that PPO never sees


class Member(NamedTuple):
    """One reward model: a context in which its model computes, and its head (D -> 1, fp32)."""

    active: Active
    head: nn.Linear
    # Mean and standard deviation of its reward over reference answers. Pairs determine neither, so members
    # are standardised before their rewards are combined.
    mean: float = 0.0
    std: float = 1.0


class Scorer(NamedTuple):
    """An ensemble of reward models, or a single one."""

    members: tuple[Member, ...]
    uncertainty_penalty: (
        float  # standard deviations of the members' rewards that are subtracted from their mean
    )
    mean: float = 0.0  # of the combined reward over reference answers
    std: float = 1.0


def combine_members(rewards: Tensor, uncertainty_penalty: float) -> Tensor:
    """Return the members' mean minus ``uncertainty_penalty`` standard deviations, (M, B) -> (B,).

    Coste et al. 2023, eq. 4, with the standard deviation instead of the variance.
    """
    if len(rewards) == 1:
        return rewards[0]
    return rewards.mean(dim=0) - uncertainty_penalty * rewards.std(dim=0, correction=0)


@torch.no_grad()
def rewards(scorer: Scorer, batch: Sequences | SharedPromptBatch) -> Tensor:
    """Return the combined reward of each answer, float32: (B,) of rows, (S,) of shared prompts."""
    found = []
    for member in scorer.members:
        with member.active() as model:
            if isinstance(batch, Sequences):
                raw = fsdp.with_full_weights(model, sequences.scores, member.head, batch)
            else:
                raw = fsdp.with_full_weights(model, shared_prompt.scores, member.head, batch)
            found.append((raw - member.mean) / member.std)
    return combine_members(torch.stack(found), scorer.uncertainty_penalty)


def normalised_rewards(scorer: Scorer, batch: Sequences) -> Tensor:
    """Return `rewards` scaled to mean 0 and standard deviation 1 over the reference answers, (B,)."""
    return (rewards(scorer, batch) - scorer.mean) / scorer.std


def is_adapter(artifact: Path) -> bool:
    """Return whether a reward artifact needs a base: it has adapters and no model of its own."""
    return (artifact / "adapter").is_dir()


def load_record(artifact: Path) -> dict[str, Any]:
    """Return a reward artifact's reward.json."""
    record: dict[str, Any] = json.loads((artifact / RECORD).read_text())
    return record


def load(
    artifact: Path, base: PreTrainedModel | PeftModel, *, device: torch.device, name: str = "reward"
) -> tuple[PreTrainedModel | PeftModel, Scorer]:
    """Load a reward model, frozen; return ``base`` with its adapters, if any, and the reward model.

    The adapters are called ``name``, with a number if there are several.
    """
    record = load_record(artifact)
    if not is_adapter(artifact):
        model = loading.load(artifact / "model", device=device)
        head = build_head(load_file(artifact / HEAD)["score.weight"], device)
        member = Member(partial(unchanged, model), head)
        return base, Scorer((member,), record["caution"], record["mean"], record["std"])
    members = []
    for number, (mean, std) in enumerate(record["apart"]):
        base, member = _load_member(artifact, base, number, device, name)
        members.append(member._replace(mean=mean, std=std))
    return base, Scorer(tuple(members), record["caution"], record["mean"], record["std"])


def _load_member(
    artifact: Path,
    base: PreTrainedModel | PeftModel,
    number: int,
    device: torch.device,
    prefix: str = "reward",
) -> tuple[PeftModel, Member]:
    """Load an adapter with its head; return ``base`` with the adapter, and the member."""
    name = f"{prefix}{number or ''}"
    base, score = lora.load(base, name, adapter_folder(artifact, number))
    assert score is not None
    return base, Member(partial(lora.active, base, name), build_head(score, device))


def load_held_out(
    artifact: Path, base: PreTrainedModel | PeftModel, *, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, Scorer | None]:
    """Load the member that PPO has never seen, frozen, and alone; None if none was trained."""
    record = load_record(artifact)
    if HELD_OUT not in record:
        return base, None
    base, member = _load_member(artifact, base, record["members"], device)
    return base, Scorer((member,), 0.0, **record[HELD_OUT])


def build_head(weight: Tensor, device: torch.device) -> nn.Linear:
    """Return a frozen head with weights (1, D) and no bias, which pairs do not determine."""
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32, device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    head.requires_grad_(False)
    return head
