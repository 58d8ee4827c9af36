"""Merge an adapter into its base, or copy a fully trained model, and measure what that changes.

python -m tasks.programs.merge DIR

inputs: base, adapter (an artifact of sft, ppo, dpo or reward)
artifact: model/ (a Hugging Face folder; for a reward adapter a sequence classifier with a single label),
    summary.json
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
CONTINUATION_TOKENS = 24  # of each probe
GREEDY_TEMPERATURE = 1e-3  # at which the likeliest token is drawn


def merge(job: MergeJob, run: Run) -> None:
    """Merge the adapter of the input stage into the base model."""
    device = devices.set_up(run.machine.device, run.machine.threads)
    artifact, folder = run.inputs["adapter"], run.inputs["base"]
    tokenizer = loading.load_tokenizer(folder)
    run.rewind(0)
    if (artifact / "bottleneck").is_dir():
        raise InputError(
            "Bottlenecks cannot be merged into a model's own layers: use them as they are, beside their base."
        )
    if (artifact / "adapter-1").is_dir():
        raise InputError(
            "An ensemble cannot be merged into one model: use its adapters as they are, or train with "
            "reward.members=1."
        )
    if (artifact / "adapter").is_dir():
        metrics = _merge_adapter(job, run, artifact / "adapter", tokenizer, device)
    else:
        model = loading.load(artifact / "model", device=device)
        metrics = _write(model, None, job, run, tokenizer, predict_probes(model, tokenizer))
    run.log(1, 1)
    run.finish({f"merge.{name}": value for name, value in metrics.items()})


def _merge_adapter(
    job: MergeJob, run: Run, adapter: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, float]:
    """Merge into the weights that the adapter's base computed with. Return metrics of what changed."""
    folder, precision = run.inputs["base"], job.weights.base
    base = loading.load(folder, device=device, precision=precision)
    fingerprint.check_fingerprint(
        adapter, fingerprint.compute_fingerprint(folder, base), setting="weights.base"
    )
    model, score = lora.load(base, "merged", adapter)
    with lora.active(model, "merged") as adapted:
        before = predict_probes(adapted, tokenizer) if score is None else rewards(adapted, score, tokenizer)
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
    """Save the merged model, load it as a user would, and return metrics that compare ``before`` with it."""
    place = run.artifact / "model"
    ends = prompts.end_tokens(tokenizer, job.text.template)
    nn.Module.to(merged, dtype=_stored_type(job, run))
    if merged.generation_config is not None:
        add_stop_tokens(merged.generation_config, ends)
    if score is not None:
        merged = with_score(merged, score)
        tokenizer.pad_token = padding_token(tokenizer, ends)
        merged.config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(place)
    tokenizer.save_pretrained(place)
    if score is None:
        after = predict_probes(loading.load(place, device=merged.device), tokenizer)
        _check_merged(before[0], after[0], "logits")
        reproduced = (before[1] == after[1]).all(dim=1).float().mean().item()
        return drift(before[0], after[0]) | {"answers_reproduced": reproduced}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        place, use_safetensors=True, trust_remote_code=False, dtype="auto"
    )
    classifier = nn.Module.to(loaded.eval(), merged.device)
    after = rewards(classifier, loaded.score.weight.detach(), tokenizer)
    _check_merged(before[0], after[0], "reward")
    return {
        "reward_drift_max": (before[0] - after[0]).abs().max().item(),
        "order_reproduced": float(torch.equal(before[1], after[1])),
    }


def _stored_type(job: MergeJob, run: Run) -> torch.dtype:
    """Return the type of the merged weights; never float16 by default, because later stages train on them."""
    name = job.merge.dtype or ("float32" if job.weights.base == "float32" else None)
    if name is not None:
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    stored = loading.folder_dtype(run.inputs["base"])
    return torch.bfloat16 if stored == torch.float16 else stored


def _check_merged(before: Tensor, after: Tensor, name: str) -> None:
    advice = "merging has taken it out of range; set merge.dtype to bfloat16 or float32"
    check_finite({f"the adapter's {name} on its base": before}, advice=UNSOUND_MODEL)
    check_finite({f"the merged model's {name}": after}, advice=advice)


def with_score(merged: PreTrainedModel, score: Tensor) -> PreTrainedModel:
    """Return a merged model's layers under a score head (1, D), in the form of transformers' reward models.

    The score of a text is that at its last token.
    """
    config = merged.config
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=merged.dtype)
    classifier.to(merged.device)
    assert isinstance(classifier, PreTrainedModel)
    classifier.base_model.load_state_dict(merged.base_model.state_dict())
    head = classifier.get_submodule("score")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(score)
    return classifier.eval()


def add_stop_tokens(generation: GenerationConfig, ends: Sequence[int]) -> None:
    """Let `generate` stop at all of ``ends``, besides the tokens at which it stops already."""
    known = generation.eos_token_id
    stops = [known] if isinstance(known, int) else list(known or [])
    stops += [end for end in ends if end not in stops]
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops


def padding_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str | None:
    """Return a token for padding that ends no answer, if there is one.

    transformers reads a score at the last token that is not padding, which must be the end token.
    """
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]
    for token in special:
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in ends:
            return str(token)
    return None


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in PROBES]


@torch.no_grad()
def predict_probes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return logits at every token of the probe texts, (N, V) float32, and their likeliest continuations, (5,
    24).
    """
    ids = _ids(tokenizer)
    logits = torch.cat(
        [model(torch.tensor([x], device=model.device), use_cache=False).logits[0].float() for x in ids]
    )
    seeds.seed_step(0, 0)
    continued = sampling.sample(
        model, ids, max_tokens=CONTINUATION_TOKENS, temperature=GREEDY_TEMPERATURE, end_ids=(), pad_id=0
    )
    return logits, continued.ids


@torch.no_grad()
def rewards(
    model: PreTrainedModel, score: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Return the reward of each probe text, (5,) float32, and their order."""
    last = [
        forward.hidden_states(model, torch.tensor([x], device=model.device))[0, -1].float()
        for x in _ids(tokenizer)
    ]
    values = (torch.stack(last) @ score.float().to(model.device).T)[:, 0]
    return values, values.argsort()


def drift(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return the largest and mean absolute difference of logits (N, V), and the share of tokens with the same
    likeliest successor.
    """
    gap = (before - after).abs()
    agreement = (before.argmax(dim=1) == after.argmax(dim=1)).float().mean()
    return {
        "drift_max": gap.max().item(),
        "drift_mean": gap.mean().item(),
        "top1_agreement": agreement.item(),
    }


if __name__ == "__main__":
    main(merge, MergeJob)
