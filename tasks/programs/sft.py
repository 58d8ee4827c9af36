"""Supervised fine-tuning on the best answer of each question, packed without leaks.

python -m tasks.programs.sft DIR        inputs: data, base, and start where weights are given to start from
torchrun --nproc_per_node 2 -m tasks.programs.sft DIR        the same by two processes, each step to rounding
artifact: adapter/ (peft format), or model/ where every weight is trained; summary.json
"""

import math
from collections.abc import Callable
from functools import partial

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import SftJob
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.algorithms import losses, schedules
from tasks.rlhf.batches import chunked_log_probs, forward, layout_checks
from tasks.rlhf.batches.packing import IGNORE, Blocks, Document, pack
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, distributed, fsdp, seeds
from tasks.rlhf.models import fingerprint as models_fingerprint
from tasks.rlhf.models import loading
from tasks.system.errors import InputError


def train(job: SftJob, run: Run) -> None:
    """Fine-tune the base on the best answers of the fine-tuning split."""
    settings = job.sft
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Best answers as packed blocks; some questions are held out.
    tokenizer = loading.load_tokenizer(run.inputs["base"])
    encoder = pair_tables.encoder_of(job.text, tokenizer)
    blocks, held_out = _blocks(job, tokenizer, run, encoder)
    most = min(
        run.machine.micro_batch or 16, 16
    )  # blocks at a time where nothing is kept for a backward pass
    rows = min(run.machine.micro_batch or settings.batch_size, -(-settings.batch_size // distributed.world()))
    training_setup.afford(
        settings,
        run,
        "base",
        job.weights.base,
        device,
        training_setup.Step(rows, settings.block_tokens, packed=True),
    )
    base = training_setup.base(run, "base", job.weights.base, job.text, device)
    leak = packing_leak(base, run, blocks, held_out)

    # 2. Fresh weights, given ones, or the checkpoint's.
    seeds.seed_step(job.seed, 0)
    fingerprint = models_fingerprint.compute_fingerprint(run.inputs["base"], base)
    tuning = training_setup.tuning(
        settings,
        base,
        "sft",
        folder=run.inputs["base"],
        fingerprint=fingerprint,
        shard=run.machine.of("sft").shard,
    )
    training = training_setup.training(settings, run, tuning, num_rows=len(blocks.labels), seed=job.seed)

    for step in training.steps():
        # 3. One optimizer step over some blocks, each rank its part; the loss is divided by the targets of them all.
        tuning.train()
        chosen = torch.tensor(
            schedules.batch_indices(
                step, num_rows=len(blocks.labels), batch_size=settings.batch_size, seed=job.seed
            )
        )
        count = int((blocks.labels[chosen] != IGNORE).sum())
        loss_value = 0.0
        parts = [*filter(len, distributed.rank_slice(chosen).split(run.machine.micro_batch or len(chosen)))]
        for part, counts in distributed.padded_steps(parts, chosen[:1]):
            with tuning.active() as model:
                loss = fsdp.with_full_weights(
                    model, block_loss, blocks, part, device, count=count if counts else math.inf
                )
                loss.backward()
            loss_value += loss.item()
        loss_value = distributed.all_reduce([loss_value])[0]
        line = {
            "loss": loss_value,
            "grad_norm": training.update(loss_value),
            "learning_rate": training.rate(step),
        }

        # 4. The held-out loss now and then, which says which weights are kept.
        if step + 1 in training.looks:
            tuning.model.eval()
            with tuning.active() as model:
                line["held_out_loss"] = held_out_loss(
                    model, held_out, device, most, told=run.phase("held-out blocks")
                )
            training.judged(step + 1, line["held_out_loss"])
        run.log(step + 1, training.plan.total, **line)
        training.save(step + 1, every=run.machine.checkpoint_steps)

    # 5. The artifact: the weights that are kept, and how well they predict answers nobody trained on.
    training.conclude()
    training_setup.tell_peak(device)
    tuning.model.eval()
    with tuning.active() as model:
        after = held_out_loss(model, held_out, device, most, told=run.phase("held-out blocks"))
    tuning.save(run.artifact)
    metrics = {
        "sft.held_out_loss": after,
        "sft.perplexity": losses.perplexity(after),
        "sft.packing_leak": leak,
        "sft.best_step": training.best.step,
    }
    run.warnings += encoder.warnings()
    run.finish(metrics | encoder.metrics("sft"), blocks=len(blocks.labels), steps=training.plan.total)


def _blocks(
    job: SftJob, tokenizer: PreTrainedTokenizerBase, run: Run, encoder: Encoder
) -> tuple[Blocks, Blocks]:
    """Packed documents to train on, and held-out ones. Raises InputError."""
    settings = job.sft
    documents = _documents(job, run, encoder)
    if len(documents) < 2:
        raise InputError(
            "The fine-tuning split has fewer than two questions: raise data.finetune_share or give more data."
        )
    if settings.block_tokens < (longest := max(len(d.ids) for d in documents)):
        raise InputError(
            f"sft.block_tokens={settings.block_tokens} would cut the end off an answer: the longest document has {longest} tokens."
        )
    every = max(2, round(1 / settings.held_out_share))
    parts = [d for i, d in enumerate(documents) if i % every], documents[::every]
    training, held_out = (
        pack(part, block_tokens=settings.block_tokens, pad_id=tokenizer.pad_token_id) for part in parts
    )
    return training, held_out


def _documents(job: SftJob, run: Run, encoder: Encoder) -> list[Document]:
    documents, told = [], run.phase("tokenising")
    rows = pq.read_table(run.inputs["data"] / "finetune.parquet", columns=["prompt", "answer"]).to_pylist()
    for number, row in enumerate(rows, 1):
        prompt, answer = encoder.prompt(row["prompt"]), encoder.answer(row["answer"])
        documents.append(
            Document(prompt + answer, [job.sft.loss_on == "all"] * len(prompt) + [True] * len(answer))
        )
        told(number, len(rows))
    return documents


def block_loss(
    model: PreTrainedModel, blocks: Blocks, rows: torch.Tensor, device: torch.device, *, count: float
) -> torch.Tensor:
    """Sum of the counted next-token losses of some blocks, over ``count``."""
    labels = blocks.labels[rows].to(device)
    hidden = forward.hidden_states(
        model, blocks.input_ids[rows].to(device), blocks.position_ids[rows].to(device)
    )[:, :-1]
    counted = labels[:, 1:] != IGNORE
    return chunked_log_probs.cross_entropy(
        hidden[counted], forward.output_head(model), labels[:, 1:][counted], count=count
    )


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    blocks: Blocks,
    device: torch.device,
    most: int = 16,
    *,
    told: Callable[[int, int], None] | None = None,
) -> float:
    """Mean loss of the counted tokens of all blocks, in nats; ``most`` blocks at a time."""
    count = int((blocks.labels != IGNORE).sum())

    def loss(rows: torch.Tensor) -> float:
        return fsdp.with_full_weights(model, block_loss, blocks, rows, device, count=count).item()

    return sum(distributed.map_over_ranks(torch.arange(len(blocks.labels)).split(most), loss, told=told))


def packing_leak(base: PreTrainedModel, run: Run, *parts: Blocks) -> float:
    """Largest difference between hidden states of packed documents and of each alone, relative to their size.

    A model that cannot have several documents in a row computes each alone from now on. Raises InputError.
    """
    measure = partial(layout_checks.packing_gap, base, *parts)
    gap, told = layout_checks.check_layout(base, measure, layout="Packing several documents in a row")
    if told:
        run.warn(told)
    return gap.hidden


if __name__ == "__main__":
    main(train, SftJob, among=distributed.process_group)
