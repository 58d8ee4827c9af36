"""A trained reward model as others use it: one adapter with its head or an ensemble of them on a shared base, or a model of its own."""

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


class Member(NamedTuple):
    """One reward model: how its model is had, and its head (D -> 1, fp32)."""

    active: Active
    head: nn.Linear
    mean: float = 0.0  # of its reward over reference answers, before members are compared: pairs leave a reward's origin and scale open
    std: float = 1.0


class Scorer(NamedTuple):
    members: tuple[Member, ...]
    caution: float  # standard deviations of the members' rewards that are taken off their mean
    mean: float = 0.0  # of the reward over reference answers
    std: float = 1.0


def combine_members(rewards: Tensor, caution: float) -> Tensor:
    """Mean less ``caution`` standard deviations over the members (Coste et al. 2023, eq. 4, with the deviation for the variance). (M, B) -> (B,)."""
    return (
        rewards.mean(dim=0) - caution * rewards.std(dim=0, correction=0) if len(rewards) > 1 else rewards[0]
    )


@torch.no_grad()
def rewards(scorer: Scorer, batch: Sequences | SharedPromptBatch) -> Tensor:
    """Reward of each answer as the members agree on it, float32: (B,) of rows, (S,) of branches."""
    found = []
    for member in scorer.members:
        with member.active() as model:
            score = sequences.scores if isinstance(batch, Sequences) else shared_prompt.scores
            found.append(
                (fsdp.with_full_weights(model, score, member.head, batch) - member.mean) / member.std
            )
    return combine_members(torch.stack(found), scorer.caution)


def normalised_rewards(scorer: Scorer, batch: Sequences) -> Tensor:
    """The same with mean 0 and deviation 1 over the reference answers, (B,)."""
    return (rewards(scorer, batch) - scorer.mean) / scorer.std


def is_adapter(artifact: Path) -> bool:
    """Whether a reward artifact needs a base: it has adapters and no model of its own."""
    return (artifact / "adapter").is_dir()


def load_record(artifact: Path) -> dict[str, Any]:
    """A reward artifact's reward.json."""
    record: dict[str, Any] = json.loads((artifact / RECORD).read_text())
    return record


def load(
    artifact: Path, base: PreTrainedModel | PeftModel, *, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, Scorer]:
    """``base`` with the reward model's adapters, where it has some, and the reward model; all of it frozen."""
    record = load_record(artifact)
    settled = {"caution": record["caution"], "mean": record["mean"], "std": record["std"]}
    if not is_adapter(artifact):
        model = loading.load(artifact / "model", device=device)
        head = build_head(load_file(artifact / HEAD)["score.weight"], device)
        return base, Scorer((Member(partial(unchanged, model), head),), **settled)
    members = []
    for number in range(record["members"]):
        name = f"reward{number or ''}"
        base, score = lora.load(base, name, adapter_folder(artifact, number))
        assert score is not None
        members.append(
            Member(partial(lora.active, base, name), build_head(score, device), *record["apart"][number])
        )
    return base, Scorer(tuple(members), **settled)


def build_head(weight: Tensor, device: torch.device) -> nn.Linear:
    """A frozen score head (1, D) without an offset: pairs say nothing about one."""
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32, device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    head.requires_grad_(False)
    return head
