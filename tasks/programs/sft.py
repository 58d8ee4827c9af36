"""Supervised fine-tuning of a LoRA adapter on the best answer of each question, packed without leaks.

python -m tasks.programs.sft DIR        inputs: data, base        artifact: adapter/ (peft format), summary.json
"""

from itertools import pairwise

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.programs.config import InputError, SftJob
from tasks.programs.entry import Run, main
from tasks.rlhf import adapters, checkpoints, devices, losses, models, prompts, schedules
from tasks.rlhf.packing import IGNORE, Blocks, Document, pack

HELD_OUT = 20  # every so many-th question measures perplexity instead of training


def train(job: SftJob, run: Run) -> None:
    """Fine-tune the base on the best answers of the fine-tuning split."""
    settings = job.sft
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Best answers as packed blocks.
    tokenizer = models.load_tokenizer(run.inputs["base"])
    base = models.load_model(run.inputs["base"], device=device)
    models.check_head(base)
    models.check_context(base, job.text.max_prompt_tokens + job.text.max_answer_tokens)
    documents = _documents(job, tokenizer, run)
    if len(documents) < 2:
        raise InputError("The fine-tuning split has fewer than two questions: raise data.finetune_share or give more data.")
    if settings.block_tokens < (longest := max(len(d.ids) for d in documents)):
        raise InputError(f"sft.block_tokens={settings.block_tokens} would cut the end off an answer: the longest document has {longest} tokens.")
    held_out = pack(documents[::HELD_OUT], block_tokens=settings.block_tokens, pad_id=tokenizer.pad_token_id)
    blocks = pack([d for i, d in enumerate(documents) if i % HELD_OUT], block_tokens=settings.block_tokens, pad_id=tokenizer.pad_token_id)
    leak = packing_leak(base, held_out)
    if leak > 1e-3:
        raise InputError(f"Packed documents see each other in this model (logits move by {leak:.3g}): {base.config.model_type} cannot be packed.")

    # 2. A fresh adapter, or the checkpoint's.
    devices.seed_step(job.seed, 0)
    lora = settings.lora
    model = adapters.attach(base, "sft", adapters.lora_config(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets))
    parameters = adapters.parameters(model, "sft")
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    total = schedules.num_steps(len(blocks.labels), batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps)
    start = 0
    if (checkpoint := checkpoints.latest(run.checkpoints)) is not None:
        start = checkpoint.step
        checkpoints.restore_training(parameters, optimizer, checkpoint.tensors)
    run.rewind(start)

    # 3. Optimizer steps.
    model.train()
    for step in range(start, total):
        devices.seed_step(job.seed, step + 1)
        warmup = round(settings.warmup_share * total)
        rate = schedules.learning_rate(step, peak=settings.learning_rate, total=total, warmup=warmup, shape="cosine")
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.tensor(schedules.batch_indices(step, num_rows=len(blocks.labels), batch_size=settings.batch_size, seed=job.seed))
        count = int((blocks.labels[chosen] != IGNORE).sum())
        optimizer.zero_grad(set_to_none=True)
        loss_value = 0.0
        for part in chosen.split(run.machine.micro_batch or len(chosen)):
            loss = block_loss(base, blocks, part, device, count=count)
            loss.backward()
            loss_value += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        run.log(step + 1, total, loss=loss_value, learning_rate=rate)
        if (step + 1) % run.machine.checkpoint_steps == 0:
            checkpoints.save(run.checkpoints, step + 1, checkpoints.training_tensors(parameters, optimizer))

    # 4. The artifact.
    model.eval()
    after = held_out_loss(base, held_out, device)
    adapters.save(model, "sft", run.artifact / "adapter", base=models.fingerprint(run.inputs["base"]))
    metrics = {"sft.held_out_loss": after, "sft.perplexity": losses.perplexity(after), "sft.packing_leak": leak}
    run.finish(metrics, documents=len(documents), blocks=len(blocks.labels), steps=total)


def _documents(job: SftJob, tokenizer: PreTrainedTokenizerBase, run: Run) -> list[Document]:
    text = job.text
    documents = []
    for row in pq.read_table(run.inputs["data"] / "finetune.parquet", columns=["prompt", "answer"]).to_pylist():
        prompt = prompts.encode_prompt(tokenizer, row["prompt"], template=text.template, max_tokens=text.max_prompt_tokens)
        answer = prompts.encode_answer(tokenizer, row["answer"], template=text.template, max_tokens=text.max_answer_tokens)
        documents.append(Document(prompt + answer, [job.sft.loss_on == "all"] * len(prompt) + [True] * len(answer)))
    return documents


def block_loss(model: PreTrainedModel, blocks: Blocks, rows: torch.Tensor, device: torch.device, *, count: int) -> torch.Tensor:
    """Sum of the counted next-token losses of some blocks, over ``count``."""
    labels = blocks.labels[rows].to(device)
    hidden = models.hidden_states(model, blocks.input_ids[rows].to(device), blocks.position_ids[rows].to(device))[:, :-1]
    counted = labels[:, 1:] != IGNORE
    return losses.cross_entropy(models.output_head(model)(hidden[counted]), labels[:, 1:][counted], count=count)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Blocks, device: torch.device) -> float:
    """Mean loss of the counted tokens of all blocks, in nats."""
    count = int((blocks.labels != IGNORE).sum())
    return sum(float(block_loss(model, blocks, rows, device, count=count)) for rows in torch.arange(len(blocks.labels)).split(16))


@torch.no_grad()
def packing_leak(model: PreTrainedModel, blocks: Blocks) -> float:
    """Largest difference between hidden states of the fullest block and those of its documents run alone, relative to their size."""
    row = (blocks.position_ids == 0).sum(dim=1).argmax()[None]  # a block of one document could not leak
    ids, positions = blocks.input_ids[row].to(model.device), blocks.position_ids[row].to(model.device)
    packed = models.hidden_states(model, ids, positions)[0]
    starts = [*torch.where(positions[0] == 0)[0].tolist(), ids.shape[1]]
    alone = torch.cat([models.hidden_states(model, ids[:, a:b])[0] for a, b in pairwise(starts)])
    return ((packed - alone).abs().max() / alone.abs().max()).item()


if __name__ == "__main__":
    main(train, SftJob)
