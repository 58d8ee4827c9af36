"""Load the models that a run has made, to compute with each of them: the base, the SFT model, each policy."""

import re
from functools import partial
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tasks.config.policies import PREDECESSOR, TUNED
from tasks.programs.runtime.program import Run
from tasks.rlhf.models import fingerprint, loading, lora, reward_model, trainable
from tasks.rlhf.models.quantised import Precision
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.models.trainable import Active


class Models(NamedTuple):
    """Models in memory: a context in which each computes, and the reward model, if it is an input."""

    active: dict[str, Active]
    scorer: Scorer | None
    held_out: Scorer | None = None  # of the reward model: the member that PPO has never seen


def load_base(run: Run, precision: Precision | None, device: torch.device) -> Models:
    """Load the input base, as SFT does."""
    model = loading.load(run.inputs["base"], device=device, precision=precision)
    return Models({"base": partial(trainable.unchanged, model)}, None)


def load_champion(run: Run, precision: Precision | None, device: torch.device) -> Models:
    """Load the champion, a policy of an earlier run, with the merged model that it was trained from.

    Raises InputError if that is another model.
    """
    folder = run.inputs["champion_model"]
    load = partial(loading.load, folder, device=device, precision=precision)
    model = load()
    actual = fingerprint.compute_fingerprint(folder, model)
    _, active = trainable.load(
        run.inputs["champion"], model, "champion", actual=actual, setting="weights.merged", reload_base=load
    )
    return Models({"champion": active}, None)


def policy_names(run: Run) -> list[str]:
    """Return the inputs that are policies: those of this run, that of the round before, and candidates'."""
    fixed = [name for name in (*TUNED, PREDECESSOR) if name in run.inputs]
    return fixed + sorted(name for name in run.inputs if re.fullmatch(r"policy\d*", name))


def load_tuned(
    run: Run, precision: Precision | None, device: torch.device, *, with_held_out: bool = False
) -> Models:
    """Load the merged SFT model with the adapters of the policies and the reward model that are inputs.

    ``with_held_out`` also loads the reward model's member that PPO has never seen, if one was trained.

    Raises InputError if one of them was trained on another base.
    """
    folder = run.inputs["model"]
    load = partial(loading.load, folder, device=device, precision=precision)
    base = load()
    actual = fingerprint.compute_fingerprint(folder, base)
    model, scorer, held_out = cast(PreTrainedModel | PeftModel, base), None, None
    if "reward" in run.inputs:
        if reward_model.is_adapter(run.inputs["reward"]):
            fingerprint.check_fingerprint(run.inputs["reward"] / "adapter", actual, setting="weights.merged")
        model, scorer = reward_model.load(run.inputs["reward"], model, device=device)
        if with_held_out:
            model, held_out = reward_model.load_held_out(run.inputs["reward"], model, device=device)
    trained: dict[str, Active] = {}
    for name in policy_names(run):
        model, trained[name] = trainable.load(
            run.inputs[name], model, name, actual=actual, setting="weights.merged", reload_base=load
        )
    if isinstance(model, PeftModel):
        return Models({"sft": partial(lora.active, model, None), **trained}, scorer, held_out)
    return Models({"sft": partial(trainable.unchanged, model), **trained}, scorer, held_out)
