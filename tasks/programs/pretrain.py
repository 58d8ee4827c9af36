"""Trains the built-in base: a byte-level BPE tokenizer and a small Llama, from scratch, on the fine-tuning split's questions and answers.

python -m tasks.programs.pretrain DIR        inputs: data        artifact: model/ (a Hugging Face folder), summary.json
"""

import random
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from tasks.config.jobs import PretrainJob
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.algorithms.muon import Muon
from tasks.rlhf.batches import chunked_log_probs, forward
from tasks.rlhf.batches.packing import IGNORE, Document, pack
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import builtin
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.finite_checks import DIVERGED, check_finite, check_weights


def train(job: PretrainJob, run: Run) -> None:
    """Pretrain the built-in base with next-token prediction."""
    settings = job.base
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Tokenizer and packed blocks.
    corpus = pq.read_table(
        run.inputs["data"] / "corpus.parquet", columns=["prompt", "answer", "score"]
    ).to_pylist()
    random.Random(job.seed).shuffle(
        corpus
    )  # answers to one question would share a block, and a batch would hold few questions
    tokenizer = builtin.train_tokenizer(
        [part for row in corpus for part in _page(row)], vocabulary=settings.vocabulary
    )
    documents = _documents(tokenizer, corpus, answers_only=settings.loss_on == "answer")
    blocks = pack(documents, block_tokens=settings.context, pad_id=tokenizer.pad_token_id)
    rows = len(blocks.labels)

    # 2. Model and optimizer.
    seeds.seed_step(job.seed, 0)
    model = builtin.new_llama(
        vocabulary=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        context=settings.context,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    torch.nn.Module.to(model, device)
    model.train()
    parameters = dict(model.named_parameters())
    inner = {
        name: p
        for name, p in parameters.items()
        if p.dim() == 2 and p is not model.get_input_embeddings().weight
    }
    outer = {name: p for name, p in parameters.items() if name not in inner}
    decay = [
        {"params": [p for p in outer.values() if (p.dim() > 1) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizers: list[tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]] = [
        (Muon(inner.values(), lr=settings.learning_rate, momentum=0.9), inner),
        (torch.optim.AdamW(decay, betas=(0.9, 0.95), eps=1e-8, fused=True), outer),
    ]
    start = 0
    if (checkpoint := checkpoints.latest(run.checkpoints)) is not None:
        start = checkpoint.step
        for optimizer, own in optimizers:
            checkpoints.restore_training(own, optimizer, checkpoint.tensors)
    run.rewind(start)

    # 3. Optimizer steps; rows come in a fresh order every pass.
    loss_value = float("nan")
    for step in range(start, settings.steps):
        seeds.seed_step(job.seed, step + 1)
        rate = schedules.learning_rate(
            step,
            peak=settings.learning_rate,
            total=settings.steps,
            warmup=max(1, settings.steps // 20),
            shape="linear",
        )
        for optimizer, _ in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        chosen = torch.tensor(
            schedules.batch_indices(step, num_rows=rows, batch_size=settings.batch_size, seed=job.seed)
        )
        count = int((blocks.labels[chosen] != IGNORE).sum())
        model.zero_grad(set_to_none=True)
        loss_value = 0.0
        for part in chosen.split(run.machine.micro_batch or len(chosen)):
            labels = blocks.labels[part].to(device)
            hidden = forward.hidden_states(
                model, blocks.input_ids[part].to(device), blocks.position_ids[part].to(device)
            )[:, :-1]
            counted = labels[:, 1:] != IGNORE
            loss = chunked_log_probs.cross_entropy(
                hidden[counted], forward.output_head(model), labels[:, 1:][counted], count=count
            )
            loss.backward()
            loss_value += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        check_finite(
            {"the loss": loss_value, "the gradient's norm": norm.item()},
            step=step + 1,
            advice=DIVERGED.replace("lower ", "lower base."),
        )
        for optimizer, _ in optimizers:
            optimizer.step()
        run.log(step + 1, settings.steps, loss=loss_value, learning_rate=rate)
        if (step + 1) % run.machine.checkpoint_steps == 0:
            states = [checkpoints.training_tensors(own, optimizer) for optimizer, own in optimizers]
            checkpoints.save(run.checkpoints, step + 1, states[0] | states[1])

    # 4. The artifact.
    check_weights(parameters)
    model.save_pretrained(run.artifact / "model")
    tokenizer.save_pretrained(run.artifact / "model")
    run.finish(
        {"pretrain.loss": loss_value, "pretrain.parameters": sum(p.numel() for p in model.parameters())},
        blocks=rows,
        vocabulary=len(tokenizer),
    )


def _page(row: dict[str, Any]) -> tuple[str, str, str]:
    """Question, answer and what a page shows below it. The score stands behind the end token, so no sampled answer reaches it, but the model learns
    to weigh what it read."""
    return f"Question: {row['prompt']}\n\nAnswer:", f" {row['answer']}", f" Score: {row['score']:g}"


def _documents(
    tokenizer: PreTrainedTokenizerBase, corpus: list[dict[str, Any]], *, answers_only: bool
) -> list[Document]:
    """One document per answer; with ``answers_only`` the question's tokens are read but not predicted."""
    pages = [_page(row) for row in corpus]
    texts = tokenizer(
        [question + answer for question, answer, _ in pages],
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    footers = tokenizer([footer for _, _, footer in pages], split_special_tokens=True)["input_ids"]
    documents = []
    for (question, _, _), ids, offsets, footer in zip(
        pages, texts["input_ids"], texts["offset_mapping"], footers, strict=True
    ):
        counted = [not answers_only or first >= len(question) for first, _ in offsets]
        documents.append(
            Document([*ids, tokenizer.eos_token_id, *footer], [*counted, *[True] * (1 + len(footer))])
        )
    return documents


if __name__ == "__main__":
    main(train, PretrainJob)
