"""Folds an adapter into its base and measures by how much the logits move.

python -m tasks.programs.merge DIR        inputs: base, adapter        artifact: model/ (a Hugging Face folder), summary.json
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.programs.config import InputError, MergeJob
from tasks.programs.entry import Run, main
from tasks.rlhf import adapters, devices, models

PROBES = (
    "Question: How do I list the files of a directory?\n\nAnswer: Use `ls -l`.",
    "Question: What should I see in three days?\n\nAnswer: The old town and the museum by the river.",
    "Once upon a time there was a little girl who liked to play outside.",
    "def mean(values):\n    return sum(values) / len(values)",
    "The quick brown fox jumps over the lazy dog, 1234567890.",
)


def merge(job: MergeJob, run: Run) -> None:
    """Merge the adapter of the input stage into the base model."""
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = models.load_tokenizer(run.inputs["base"])
    base = models.load_model(run.inputs["base"], device=device)
    folder = run.inputs["adapter"] / "adapter"
    if (recorded := adapters.belongs_to(folder)) != (actual := models.fingerprint(run.inputs["base"])):
        raise InputError(
            f"The adapter was trained on base {recorded[:19]}, but this base is {actual[:19]}: merge it into the base it was trained on."
        )
    model, _ = adapters.load(base, "merged", folder)
    with adapters.active(model, "merged") as adapted:
        before = probe_logits(adapted, tokenizer)
    merged = model.merge_and_unload(adapter_names=["merged"])
    if job.merge.dtype is not None:
        merged = merged.to(getattr(torch, job.merge.dtype))
    merged.save_pretrained(run.artifact / "model")
    tokenizer.save_pretrained(run.artifact / "model")
    after = probe_logits(models.load_model(run.artifact / "model", device=device), tokenizer)
    run.rewind(0)
    run.log(1, 1)
    run.finish({f"merge.{name}": value for name, value in drift(before, after).items()})


@torch.no_grad()
def probe_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Logits at every token of the probe texts, (N, V) float32."""
    ids = [torch.tensor([tokenizer(text)["input_ids"]], device=model.device) for text in PROBES]
    return torch.cat([model(x, use_cache=False).logits[0].float() for x in ids])


def drift(before: Tensor, after: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference of logits (N, V), and the share of tokens whose likeliest successor stayed the same."""
    gap = (before - after).abs()
    agreement = (before.argmax(dim=1) == after.argmax(dim=1)).float().mean()
    return {"drift_max": gap.max().item(), "drift_mean": gap.mean().item(), "top1_agreement": agreement.item()}


if __name__ == "__main__":
    main(merge, MergeJob)
