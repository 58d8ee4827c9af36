"""Train the built-in base from scratch: a byte-level BPE tokenizer and a small Llama.

python -m tasks.programs.pretrain DIR

inputs: data
artifact: model/ (a Hugging Face folder), summary.json
"""

import random
from typing import NamedTuple, NotRequired, TypedDict

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import PretrainJob
from tasks.config.sections.models import BuiltinBase
from tasks.dataset.conversation import USER, from_records
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.algorithms.muon import Muon
from tasks.rlhf.batches import chunked_log_probs, conversations, forward
from tasks.rlhf.batches.packing import IGNORE, Blocks, Document, pack
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import builtin
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.finite_checks import DIVERGED, check_finite, check_weights


class Row(TypedDict):
    """A row of corpus.parquet."""

    prompt: str
    answer: str
    score: float
    messages: NotRequired[list[dict[str, str]] | None]  # of a prompt that is a conversation


class Part(NamedTuple):
    """Some parameters and the optimizer that trains them."""

    optimizer: Optimizer
    parameters: dict[str, nn.Parameter]


def train(job: PretrainJob, run: Run) -> None:
    """Pretrain the built-in base with next-token prediction."""
    settings, machine = job.base, run.machine
    device = devices.set_up(machine.device, machine.threads)

    # 1. Tokenizer and packed blocks, shuffled so that a batch holds answers to many questions.
    table = run.inputs["data"] / "corpus.parquet"
    columns = [name for name in Row.__annotations__ if name in pq.read_schema(table).names]
    corpus: list[Row] = pq.read_table(table, columns=columns).to_pylist()
    random.Random(job.seed).shuffle(corpus)
    texts = [text for row in corpus for text in _texts(row)]
    tokenizer = builtin.train_tokenizer(texts, vocabulary=settings.vocabulary)
    documents = _documents(tokenizer, corpus, answers_only=settings.loss_on == "answer")
    blocks = pack(documents, block_tokens=settings.context, pad_id=tokenizer.pad_token_id)
    num_blocks = len(blocks.labels)

    # 2. Model and optimizers, or the checkpoint's.
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
    nn.Module.to(model, device)
    model.train()
    parts = create_optimizers(model, settings)
    start = 0
    if (checkpoint := checkpoints.latest(run.checkpoints)) is not None:
        start = checkpoint.step
        for part in parts:
            checkpoints.restore_training(part.parameters, part.optimizer, checkpoint.tensors)
    run.rewind(start)

    # 3. Optimizer steps over blocks in an order drawn from the seed, fresh in every pass.
    loss = float("nan")
    for step in run.interruptions.during(range(start, settings.steps), list):
        seeds.seed_step(job.seed, step + 1)
        warmup = max(1, settings.steps // 20)
        rate = schedules.learning_rate(
            step, peak=settings.learning_rate, total=settings.steps, warmup=warmup, shape="linear"
        )
        for part in parts:
            for group in part.optimizer.param_groups:
                group["lr"] = rate
        rows = torch.tensor(
            schedules.batch_indices(step, num_rows=num_blocks, batch_size=settings.batch_size, seed=job.seed)
        )
        model.zero_grad(set_to_none=True)
        loss = accumulate_gradients(model, blocks, rows, device, micro_batch=machine.micro_batch)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        advice = DIVERGED.replace("lower ", "lower base.")
        check_finite({"the loss": loss, "the gradient's norm": norm}, step=step + 1, advice=advice)
        for part in parts:
            part.optimizer.step()
        run.log(step + 1, settings.steps, loss=loss, learning_rate=rate)
        if run.interruptions.wants_checkpoint() or (step + 1) % machine.checkpoint_steps == 0:
            states = [checkpoints.training_tensors(part.parameters, part.optimizer) for part in parts]
            checkpoints.save(run.checkpoints, step + 1, states[0] | states[1])

    # 4. The artifact.
    check_weights(dict(model.named_parameters()))
    model.save_pretrained(run.artifact / "model")
    tokenizer.save_pretrained(run.artifact / "model")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    metrics = {"pretrain.loss": loss, "pretrain.parameters": num_parameters}
    run.finish(metrics, blocks=num_blocks, vocabulary=len(tokenizer))


def create_optimizers(model: PreTrainedModel, settings: BuiltinBase) -> list[Part]:
    """Return Muon for the layers' matrices, and AdamW for embeddings, head and norms."""
    parameters = dict(model.named_parameters())
    embedding = model.get_input_embeddings().weight
    matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and p is not embedding}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    groups = [
        {"params": [p for p in others.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in others.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [
        Part(Muon(matrices.values(), lr=settings.learning_rate, momentum=0.9), matrices),
        Part(AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True), others),
    ]


def accumulate_gradients(
    model: PreTrainedModel, blocks: Blocks, rows: Tensor, device: torch.device, *, micro_batch: int
) -> float:
    """Add the gradients of the mean loss over the counted tokens of blocks ``rows``. Return the loss."""
    count = int((blocks.labels[rows] != IGNORE).sum())
    total = 0.0
    for part in rows.split(micro_batch or len(rows)):
        labels = blocks.labels[part].to(device)
        hidden = forward.hidden_states(
            model, blocks.input_ids[part].to(device), blocks.position_ids[part].to(device)
        )[:, :-1]
        counted = labels[:, 1:] != IGNORE
        loss = chunked_log_probs.cross_entropy(
            hidden[counted], forward.output_head(model), labels[:, 1:][counted], count=count
        )
        loss.backward()
        total += loss.item()
    return total


def _texts(row: Row) -> list[str]:
    """Return the texts of a row's page that the tokenizer learns from, turn by turn."""
    turns = from_records(row.get("messages")) or ((USER, row["prompt"]),)
    texts = [_write_question(text) if role == USER else f" {text}" for role, text in turns]
    return [*texts, *_write_ending(row)]


def _write_question(text: str) -> str:
    return f"Question: {text}\n\nAnswer:"


def _write_ending(row: Row) -> tuple[str, str]:
    """Return answer and footer.

    The score is in the footer, after the end token: no sampled answer reaches it, but the model learns to
    predict the quality of what it read.
    """
    return f" {row['answer']}", f" Score: {row['score']:g}"


def _documents(
    tokenizer: PreTrainedTokenizerBase, corpus: list[Row], *, answers_only: bool
) -> list[Document]:
    """Return one document per answer; with ``answers_only`` the loss leaves out the questions' tokens."""
    questions = ["" if row.get("messages") else _write_question(row["prompt"]) for row in corpus]
    endings = [_write_ending(row) for row in corpus]
    texts = tokenizer(
        [question + answer for question, (answer, _) in zip(questions, endings, strict=True)],
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    footer_ids = tokenizer([footer for _, footer in endings], split_special_tokens=True)["input_ids"]
    documents = []
    for row, question, ids, offsets, footer in zip(
        corpus, questions, texts["input_ids"], texts["offset_mapping"], footer_ids, strict=True
    ):
        turns, is_answer = _encode_turns(tokenizer, row)
        is_answer += [first >= len(question) for first, _ in offsets]
        counted = [not answers_only or is_one for is_one in is_answer]
        documents.append(
            Document([*turns, *ids, tokenizer.eos_token_id, *footer], [*counted, *[True] * (1 + len(footer))])
        )
    return documents


def _encode_turns(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids up to where its last answer starts, as SFT's plain template writes it.

    Also returns which of them belong to earlier answers; nothing if the prompt is one question.
    """
    messages = from_records(row.get("messages"))
    if not messages:
        return [], []
    ids = conversations.encode_messages(tokenizer, messages, "question-answer")
    return ids, conversations.find_answers(tokenizer, messages, "question-answer")


if __name__ == "__main__":
    main(train, PretrainJob)
