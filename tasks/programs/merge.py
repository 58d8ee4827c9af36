"""Folds an adapter into its base, or takes over a model that was trained whole, and measures what that changes.

python -m tasks.programs.merge DIR        inputs: base, adapter (an artifact of sft, ppo, dpo or reward)
artifact: model/ (a Hugging Face folder; of a reward adapter one for sequence classification with a single label), summary.json
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tasks.config.jobs import MergeJob
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.batches import forward, prompts, sampling
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import fingerprint, loading, lora
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite
from tasks.system.errors import InputError

PROBES = (
    "Question: How do I list the files of a directory?\n\nAnswer: Use `ls -l`.",
    "Question: What should I see in three days?\n\nAnswer: The old town and the museum by the river.",
    "Once upon a time there was a little girl who liked to play outside.",
    "def mean(values):\n    return sum(values) / len(values)",
    "The quick brown fox jumps over the lazy dog, 1234567890.",
)
CONTINUED = 24  # tokens of each probe's likeliest continuation
COLD = 1e-3  # a temperature at which the likeliest token is drawn


def merge(job: MergeJob, run: Run) -> None:
    """Merge the adapter of the input stage into the base model."""
    device = devices.set_up(run.machine.device, run.machine.threads)
    artifact, folder = run.inputs["adapter"], run.inputs["base"]
    tokenizer = loading.load_tokenizer(folder)
    run.rewind(0)
    if (artifact / "bottleneck").is_dir():
        raise InputError(
            "Bottlenecks cannot be folded into a model's own layers: use them as they are, beside their base."
        )
    if (artifact / "adapter-1").is_dir():
        raise InputError(
            "An ensemble cannot be merged into one model: use its adapters as they are, or train with reward.members=1."
        )
    if (artifact / "adapter").is_dir():
        metrics = _merge_adapter(job, run, artifact / "adapter", tokenizer, device)
    else:
        whole = loading.load(artifact / "model", device=device)
        metrics = _write(whole, None, job, run, tokenizer, likely(whole, tokenizer))
    run.log(1, 1)
    run.finish({f"merge.{name}": value for name, value in metrics.items()})


def _merge_adapter(
    job: MergeJob, run: Run, adapter: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, float]:
    """Merge into the weights that the adapter's base computed with; gives what it changes."""
    folder, precision = run.inputs["base"], job.weights.base
    base = loading.load(folder, device=device, precision=precision)
    fingerprint.check_fingerprint(
        adapter, fingerprint.compute_fingerprint(folder, base), setting="weights.base"
    )
    model, score = lora.load(base, "merged", adapter)
    with lora.active(model, "merged") as adapted:
        before = rewards(adapted, score, tokenizer) if score is not None else likely(adapted, tokenizer)
    if precision in ("int8", "nf4"):
        model, _ = lora.load(
            loading.load_dequantised(folder, device=device, precision=precision), "merged", adapter
        )
    merged = model.merge_and_unload(adapter_names=["merged"])
    assert isinstance(merged, PreTrainedModel)
    return _write(merged, score, job, run, tokenizer, before)


def _write(
    merged: PreTrainedModel,
    score: Tensor | None,
    job: MergeJob,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    before: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """Save the merged model, have it back as anybody would, and compare."""
    place = run.artifact / "model"
    ends = prompts.end_tokens(tokenizer, job.text.template)
    wanted = job.merge.dtype or ("float32" if job.weights.base == "float32" else None)
    kept = loading.folder_dtype(run.inputs["base"])
    nn.Module.to(
        merged, dtype=getattr(torch, wanted) if wanted else torch.bfloat16 if kept == torch.float16 else kept
    )  # to be trained on
    if merged.generation_config is not None:
        stop_at(merged.generation_config, ends)
    if score is not None:
        merged = with_score(merged, score)
        tokenizer.pad_token = padding(tokenizer, ends)
        merged.config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(place)
    tokenizer.save_pretrained(place)
    if score is None:
        after = likely(loading.load(place, device=merged.device), tokenizer)
        _check_merged(before[0], after[0], "logits")
        return drift(before[0], after[0]) | {
            "answers_reproduced": (before[1] == after[1]).all(dim=1).float().mean().item()
        }
    again = AutoModelForSequenceClassification.from_pretrained(
        place, use_safetensors=True, trust_remote_code=False, dtype="auto"
    )
    after = rewards(nn.Module.to(again.eval(), merged.device), again.score.weight.detach(), tokenizer)
    _check_merged(before[0], after[0], "reward")
    return {
        "reward_drift_max": (before[0] - after[0]).abs().max().item(),
        "order_reproduced": float(torch.equal(before[1], after[1])),
    }


def _check_merged(before: Tensor, after: Tensor, name: str) -> None:
    advice = "merging has taken it out of range; set merge.dtype to bfloat16 or float32"
    check_finite({f"the adapter's {name} on its base": before}, advice=UNSOUND_MODEL)
    check_finite({f"the merged model's {name}": after}, advice=advice)


def with_score(merged: PreTrainedModel, score: Tensor) -> PreTrainedModel:
    """The body of a merged model under a score head (1, D), as transformers has reward models: the score of a text is that at its last token."""
    config = merged.config
    config.num_labels = 1
    whole = AutoModelForSequenceClassification.from_config(config, dtype=merged.dtype).to(merged.device)
    assert isinstance(whole, PreTrainedModel)
    whole.base_model.load_state_dict(merged.base_model.state_dict())
    head = whole.get_submodule("score")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(score)
    return whole.eval()


def stop_at(generation: GenerationConfig, ends: Sequence[int]) -> None:
    """Let `generate` stop at all of ``ends``, besides the tokens at which it stops already."""
    known = generation.eos_token_id
    stops = [known] if isinstance(known, int) else list(known or [])
    stops += [end for end in ends if end not in stops]
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops


def padding(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str | None:
    """A token for padding that ends no answer, if there is one: transformers reads a score at the last token that is not padding."""
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]
    return next(
        (
            token
            for token in special
            if token is not None and tokenizer.convert_tokens_to_ids(token) not in ends
        ),
        None,
    )


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in PROBES]


@torch.no_grad()
def likely(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Logits at every token of the probe texts, (N, V) float32, and the likeliest continuations, (5, 24)."""
    ids = _ids(tokenizer)
    logits = torch.cat(
        [model(torch.tensor([x], device=model.device), use_cache=False).logits[0].float() for x in ids]
    )
    seeds.seed_step(0, 0)
    continued = sampling.sample(model, ids, max_tokens=CONTINUED, temperature=COLD, end_ids=(), pad_id=0)
    return logits, continued.ids


@torch.no_grad()
def rewards(
    model: PreTrainedModel, score: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """The reward of each probe text, (5,) float32, and their order."""
    ends = [
        forward.hidden_states(model, torch.tensor([x], device=model.device))[0, -1].float()
        for x in _ids(tokenizer)
    ]
    found = (torch.stack(ends) @ score.float().to(model.device).T)[:, 0]
    return found, found.argsort()


def drift(before: Tensor, after: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference of logits (N, V), and the share of tokens whose likeliest successor stayed the same."""
    gap = (before - after).abs()
    agreement = (before.argmax(dim=1) == after.argmax(dim=1)).float().mean()
    return {
        "drift_max": gap.max().item(),
        "drift_mean": gap.mean().item(),
        "top1_agreement": agreement.item(),
    }


if __name__ == "__main__":
    main(merge, MergeJob)
