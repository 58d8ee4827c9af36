"""Mix the loss of text into PPO's steps, so that the policy keeps what it knew (PPO-ptx).

Ouyang et al. 2022, equation 2: the policy's loss gets ``weight`` times the mean next-token loss of other
text, in the same optimizer step. Their weight, 27.8, belongs to their sizes and does not carry over.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tasks.config.jobs import PpoJob
from tasks.config.sections.ppo import Ppo, PretrainingMix
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.row_files import read_rows
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.documents import document_lengths, measure_packing_leak, read_finetune_split
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.batches.control_tokens import encode_text
from tasks.rlhf.batches.packing import IGNORE, Blocks, Document, PackedDocuments, block_loss, pack_documents
from tasks.rlhf.batches.prompts import prefix_ids
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import lora
from tasks.rlhf.models.architecture_checks import check_context
from tasks.rlhf.training.finite_checks import check_finite
from tasks.rlhf.training.rollouts import PPO_DIVERGED, PpoModels
from tasks.system.errors import InputError


class Norms(NamedTuple):
    """Sums of gradient norms over the optimizer steps that ``gradient_share`` has measured."""

    policy: float = 0.0
    text: float = 0.0


class Mixed(NamedTuple):
    """What the text added to an optimizer step."""

    loss: float  # mean over the counted tokens, in nats
    weight: float


class TextMix:
    """Adds the gradients of text to those of the policy; a batch of blocks in each optimizer step."""

    def __init__(
        self, packed: PackedDocuments, settings: PretrainingMix, *, seed: int, micro_batch: int, norms: Norms
    ) -> None:
        self.packed, self.settings, self.seed, self.micro_batch = packed, settings, seed, micro_batch
        self.norms = norms  # grows while gradient_share is measured; part of a checkpoint

    def add_gradients(self, models: PpoModels, number: int) -> Mixed:
        """Add the text's gradients of optimizer step ``number`` (from 0) to the policy's.

        Raises InputError if the text's loss is not finite.
        """
        settings = self.settings
        indices = schedules.batch_indices(
            number, num_rows=len(self.packed), batch_size=settings.blocks, seed=self.seed
        )
        of_policy = take_gradients(models.policy)
        loss = self._accumulate(models, self.packed.blocks(indices))
        of_text = take_gradients(models.policy)
        if settings.gradient_share is not None and number < settings.measured_steps:
            self.norms = Norms(self.norms.policy + _norm(of_policy), self.norms.text + _norm(of_text))
        weight = self.weight
        for name, parameter in models.policy.items():
            parameter.grad = of_policy[name] + weight * of_text[name]
        return Mixed(loss, weight)

    @property
    def weight(self) -> float:
        """Return the weight of the text's loss: the one that is set, or what was measured so far."""
        if self.settings.gradient_share is None:
            return self.settings.weight
        return self.settings.gradient_share * self.norms.policy / max(self.norms.text, 1e-12)

    def _accumulate(self, models: PpoModels, blocks: Blocks) -> float:
        """Compute the gradients of the mean loss of a step's blocks. Return the mean loss.

        Each rank computes a part of them.
        """
        count, rows = int((blocks.labels != IGNORE).sum()), torch.arange(len(blocks.labels))
        own, total = distributed.rank_slice(rows), 0.0
        parts = [*filter(len, own.split(self.micro_batch or max(1, len(own))))]
        for part, counts in distributed.padded_steps(parts, rows[:1]):
            with lora.active(models.model, "policy") as policy:
                divisor = count if counts else math.inf
                loss = fsdp.with_full_weights(policy, block_loss, blocks, part, policy.device, count=divisor)
                loss.backward()
            total += loss.item()
        distributed.sum_gradients(models.policy.values())
        total = distributed.all_reduce([total])[0]
        check_finite({"the loss of the text": total}, advice=PPO_DIVERGED)
        return total


def take_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients and clear them; a parameter without one has zeros."""
    found = {}
    for name, parameter in parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


def _norm(gradients: dict[str, Tensor]) -> float:
    return torch.stack([one.norm() for one in gradients.values()]).norm().item()


def load_text_mix(
    job: PpoJob, run: Run, tokenizer: PreTrainedTokenizerBase, models: PpoModels, state: dict[str, Any]
) -> TextMix | None:
    """Return the text that is mixed in; None if there is none. ``state`` is that of a checkpoint, or empty.

    Raises InputError if there is too little text.
    """
    settings = job.ppo.ptx
    if not settings.is_on:
        return None
    size = settings.block_tokens or job.text.max_prompt_tokens + job.text.max_answer_tokens
    if "text" in run.inputs:
        with lora.active(models.model, None) as reference:
            check_context(reference, size, settings="ppo.ptx.block_tokens")
        documents: Sequence[Document] = read_text(run.inputs["text"], tokenizer, job.ppo, size)
        lengths = [len(document.ids) for document in documents]
    else:
        # its counts are not those of the prompts
        encoder = pair_tables.build_encoder(job.text, tokenizer, {})
        documents = table = read_finetune_split(run, encoder, loss_on="last")
        lengths = document_lengths(table)
        longest = max(lengths, default=0)
        if longest > size:
            raise InputError(
                f"ppo.ptx.block_tokens={size} would cut the end off an answer: the longest "
                f"document has {longest} tokens"
            )
    if len(documents) < 2:
        raise InputError(
            "ppo.ptx: there are fewer than two texts to mix in: give more, or set ptx.weight to 0"
        )
    packed = pack_documents(documents, lengths, block_tokens=size, pad_id=tokenizer.pad_token_id)
    with lora.active(models.model, None) as reference:
        measure_packing_leak(reference, run, packed)
    norms = Norms(*state.get("text_norms", ()))
    return TextMix(packed, settings, seed=job.seed, micro_batch=run.machine.micro_batch, norms=norms)


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase, settings: Ppo, size: int) -> list[Document]:
    """Return the texts of a file as documents of at most ``size`` tokens, as many as the steps can take.

    Raises InputError if a row has no text.
    """
    enough = settings.ptx.blocks * size * settings.num_updates
    documents: list[Document] = []
    prefix, num_tokens = list(prefix_ids(tokenizer)), 0
    with Quarantine() as bad:
        for row in read_rows(path, bad):
            text = row.fields.get("text")
            if not isinstance(text, str):
                raise InputError(f"ppo.ptx.path: {path.name}, row {row.place.row} has no column text")
            assert isinstance(tokenizer.eos_token_id, int)
            ids = [*prefix, *encode_text(tokenizer, text), tokenizer.eos_token_id]
            documents += [Document(part, [True] * len(part)) for part in _split(ids, size) if len(part) > 1]
            num_tokens += len(ids)
            if num_tokens >= enough:
                break
        if bad.reasons:
            raise InputError(f"ppo.ptx.path: {bad.first}: {next(iter(bad.reasons))}")
    return documents


def _split(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
