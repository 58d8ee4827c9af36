"""Load finished policies to answer with: those of the same base share its weights."""

from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.commands.usage import PolicyFiles
from tasks.programs.usage.chat_templates import set_chat_template
from tasks.rlhf.batches import prompts
from tasks.rlhf.models import fingerprint, loading, lora, trainable
from tasks.rlhf.models.trainable import Active


class LoadedPolicy(NamedTuple):
    """A policy in memory."""

    files: PolicyFiles
    active: Active  # returns a context in which the model computes as this policy
    tokenizer: PreTrainedTokenizerBase  # its chat template renders prompts as training did
    end_ids: tuple[int, ...]
    context: int | None  # tokens that a prompt and its answer may have together; None: no limit is known


def load_policies(policies: tuple[PolicyFiles, ...], device: torch.device) -> list[LoadedPolicy]:
    """Load the policies in their order. Raises InputError."""
    by_base: dict[tuple[str, str | None], list[int]] = {}
    for place, files in enumerate(policies):
        by_base.setdefault((files.folder, files.precision), []).append(place)
    loaded: dict[int, LoadedPolicy] = {}
    for places in by_base.values():
        found = _load_with_base([policies[place] for place in places], device)
        loaded |= dict(zip(places, found, strict=True))
    return [loaded[place] for place in range(len(policies))]


def _load_with_base(policies: list[PolicyFiles], device: torch.device) -> list[LoadedPolicy]:
    """Load policies of the same base: their adapters on one model."""
    folder, precision = Path(policies[0].folder), policies[0].precision
    load = partial(loading.load, folder, device=device, precision=precision)
    base = load()
    model = cast(PreTrainedModel | PeftModel, base)
    tuned = [files for files in policies if files.tuned]
    actual = fingerprint.compute_fingerprint(folder, base) if tuned else None
    contexts: dict[str, Active] = {}
    for number, files in enumerate(tuned):
        if files.tuned not in contexts:
            assert actual is not None
            model, contexts[files.tuned] = trainable.load(
                Path(files.tuned), model, f"policy-{number}",
                actual=actual, setting="weights.merged", reload_base=load,
            )  # fmt: skip
    if isinstance(model, PeftModel):
        contexts[""] = partial(lora.active, model, None)
    else:
        contexts[""] = partial(trainable.unchanged, model)
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return [_with_tokenizer(files, contexts[files.tuned], context) for files in policies]


def _with_tokenizer(files: PolicyFiles, active: Active, context: int | None) -> LoadedPolicy:
    tokenizer = loading.load_tokenizer(Path(files.folder))
    set_chat_template(tokenizer, files.template)
    return LoadedPolicy(files, active, tokenizer, prompts.end_tokens(tokenizer, "chat"), context)
