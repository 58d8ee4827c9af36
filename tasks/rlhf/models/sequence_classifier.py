"""Load a reward model in Hugging Face format: a decoder for sequence classification with one label."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tasks.rlhf.batches import sequences
from tasks.rlhf.models.folder_tokenizer import quiet_libraries
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.rlhf.models.trainable import unchanged
from tasks.system.errors import InputError

MAX_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def load(folder: Path, *, device: torch.device, setting: str) -> Scorer:
    """Return the model as a reward model, frozen; its rewards are not normalised yet.

    ``setting`` names it in messages. Raises InputError if it is no decoder with one label, or its score is
    more than a matrix applied to the hidden state of the last token.
    """
    quiet_libraries()
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, dtype="auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{setting}: {folder} cannot be loaded as a reward model: {reason}") from error
    model, info = loaded
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{setting}: {folder} lacks {len(missing)} tensors of a reward model, first {missing[0]}: give a "
            "sequence classification model with one label"
        )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(
            f"{setting}: {folder} is no decoder with one label (a layer called score with one output): "
            "classifiers with several labels and encoders are not supported"
        )
    model.requires_grad_(False).eval().to(device)
    copied = nn.Linear(head.in_features, 1, bias=head.bias is not None, dtype=torch.float32, device=device)
    copied.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    copied.requires_grad_(False)
    _check_head(model, copied, setting)
    return Scorer((Member(partial(unchanged, model), copied),), 0.0)


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: nn.Linear, setting: str) -> None:
    """Refuse a model whose own score is not the head's at the last token. Raises InputError."""
    ids = (torch.arange(2, 18, device=model.device) % model.config.get_text_config().vocab_size)[None]
    own: Tensor = model(ids, use_cache=False).logits[:, 0].float()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -1] = True
    ours = sequences.scores(model, head, sequences.Sequences(ids, mask))
    gap = (own - ours).abs().max().item()
    if not gap <= MAX_GAP.get(model.dtype, MAX_GAP[torch.bfloat16]) * max(1.0, own.abs().max().item()):
        raise InputError(
            f"{setting}: {model.config.model_type} models change their score after its layer (by {gap:.3g}): "
            "they are not supported"
        )
