"""Fine-tune a language model on the best answer of each question (supervised fine-tuning, SFT).

python -m tasks.programs.sft DIR
torchrun --nproc_per_node 2 -m tasks.programs.sft DIR        the same on two ranks, equal to rounding

inputs: data, base; start, if training starts from given weights
artifact: adapter/ (peft format), or model/ if all weights are trained; samples.jsonl, summary.json

Deviations from Ouyang et al. 2022: an adapter instead of all weights (tune=full trains these), and documents
packed side by side.
"""

import math
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import SftJob
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import ReportProgress, Run, main
from tasks.programs.runtime.training_samples import build_sampler
from tasks.programs.token_tables.documents import document_lengths, measure_packing_leak, read_finetune_split
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.algorithms import losses, schedules
from tasks.rlhf.batches.packing import IGNORE, Blocks, Document, PackedDocuments, block_loss, pack_documents
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, distributed, fsdp, seeds
from tasks.rlhf.models import loading
from tasks.rlhf.models.fingerprint import compute_fingerprint
from tasks.rlhf.models.trainable import Trainable
from tasks.rlhf.training import loop
from tasks.system.errors import InputError

EVALUATED_BLOCKS = 16  # at most so many at a time without gradients


def train(job: SftJob, run: Run) -> None:
    """Fine-tune the base on the best answers of the fine-tuning split."""
    settings, machine, folder = job.sft, run.machine, run.inputs["base"]
    device = devices.set_up(machine.device, machine.threads)

    # 1. Best answers as packed blocks; some questions are held out.
    tokenizer = loading.load_tokenizer(folder)
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    packed, held_out = read_documents(job, tokenizer, run, encoder)
    rows = min(machine.micro_batch or settings.batch_size, -(-settings.batch_size // distributed.world()))
    micro_batch = training_setup.MicroBatch(rows, settings.block_tokens, packed=True)
    training_setup.check_memory(settings, run, "base", job.weights.base, device, micro_batch)
    base = training_setup.load_trained_base(settings, run, "base", job.weights.base, job.text, device)
    leak = measure_packing_leak(base, run, packed, held_out)

    # 2. What is trained: fresh weights, those of the input "start", or the checkpoint's.
    seeds.seed_step(job.seed, 0)
    trainable = training_setup.build_trainable(
        settings, base, "sft", folder=folder, fingerprint=compute_fingerprint(folder, base)
    )
    num_blocks = len(packed)
    training = training_setup.start_training(settings, run, trainable, num_rows=num_blocks, seed=job.seed)

    # 3. Optimizer steps over blocks in an order drawn from the seed; now and then the held-out loss.
    def step_gradients(step: int) -> dict[str, float]:
        indices = schedules.batch_indices(
            step, num_rows=num_blocks, batch_size=settings.batch_size, seed=job.seed
        )
        return accumulate_gradients(
            trainable, packed.blocks(indices), device, micro_batch=machine.micro_batch
        )

    def evaluate() -> float:
        trainable.model.eval()
        with trainable.active() as model:
            return held_out_loss(
                model,
                held_out,
                device,
                min(machine.micro_batch or EVALUATED_BLOCKS, EVALUATED_BLOCKS),
                report_progress=run.phase("held-out blocks"),
            )

    loop.fit(
        training,
        step_gradients,
        evaluate,
        log=run.log,
        checkpoint_steps=machine.checkpoint_steps,
        interruptions=run.interruptions,
        sample=build_sampler(job, run, tokenizer, trainable, total=training.schedule.total),
    )

    # 4. The artifact: the weights that are kept, and how well they predict held-out answers.
    training_setup.print_peak_memory(device)
    after = evaluate()
    trainable.save(run.artifact)
    metrics = {
        "sft.held_out_loss": after,
        "sft.perplexity": losses.perplexity(after),
        "sft.packing_leak": leak,
        "sft.best_step": training.best.step,
    }
    run.warnings += encoder.warnings()
    run.finish(metrics | encoder.metrics("sft"), blocks=num_blocks, steps=training.schedule.total)


def accumulate_gradients(
    trainable: Trainable, blocks: Blocks, device: torch.device, *, micro_batch: int
) -> dict[str, float]:
    """Add the gradients of the mean loss over the counted tokens of a step's blocks; each rank computes its
    part of them.
    """
    trainable.train()
    count, rows = int((blocks.labels != IGNORE).sum()), torch.arange(len(blocks.labels))
    loss_value = 0.0
    parts = [*filter(len, distributed.rank_slice(rows).split(micro_batch or len(rows)))]
    for part, counts in distributed.padded_steps(parts, rows[:1]):
        with trainable.active() as model:
            loss = fsdp.with_full_weights(
                model, block_loss, blocks, part, device, count=count if counts else math.inf
            )
            loss.backward()
        loss_value += loss.item()
    return {"loss": distributed.all_reduce([loss_value])[0]}


def read_documents(
    job: SftJob, tokenizer: PreTrainedTokenizerBase, run: Run, encoder: Encoder
) -> tuple[PackedDocuments, PackedDocuments]:
    """Return packed documents to train on, and held-out ones.

    Raises InputError if there are too few or a block is too short.
    """
    settings = job.sft
    documents = read_finetune_split(run, encoder, loss_on=settings.loss_on)
    if len(documents) < 2:
        raise InputError(
            "The fine-tuning split has fewer than two questions: raise data.finetune_share or give more data."
        )
    longest = max(document_lengths(documents))
    if settings.block_tokens < longest:
        raise InputError(
            f"sft.block_tokens={settings.block_tokens} would cut the end off an answer: "
            f"the longest document has {longest} tokens."
        )
    every = max(2, round(1 / settings.held_out_share))
    pack = partial(_pack, block_tokens=settings.block_tokens, pad_id=tokenizer.pad_token_id)
    trained = documents.select([i for i in range(len(documents)) if i % every])
    return pack(trained), pack(documents[::every])


def _pack(documents: TokenTable[Document], *, block_tokens: int, pad_id: int) -> PackedDocuments:
    return pack_documents(documents, document_lengths(documents), block_tokens=block_tokens, pad_id=pad_id)


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    packed: PackedDocuments,
    device: torch.device,
    batch_size: int = EVALUATED_BLOCKS,
    *,
    report_progress: ReportProgress | None = None,
) -> float:
    """Return the mean loss of the counted tokens of all blocks, in nats; ``batch_size`` blocks at a time."""
    count = packed.num_targets()

    def loss(rows: Tensor) -> float:
        blocks = packed.blocks(rows.tolist())
        every = torch.arange(len(rows))
        return fsdp.with_full_weights(model, block_loss, blocks, every, device, count=count).item()

    parts = torch.arange(len(packed)).split(batch_size)
    return sum(distributed.map_over_ranks(parts, loss, report_progress=report_progress))


if __name__ == "__main__":
    main(train, SftJob, among=distributed.process_group)
