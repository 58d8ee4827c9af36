"""Trains the reward model: a LoRA adapter and a scalar head on the merged SFT model, from pairs of answers.

python -m tasks.programs.reward DIR        inputs: data, model
artifact: adapter/ (a SEQ_CLS adapter), reward.json (normalisation and probe scores), summary.json
"""

import json

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from tasks.programs.config import InputError, RewardJob
from tasks.programs.entry import Run, main
from tasks.rlhf import adapters, branches, checkpoints, comparisons, devices, losses, models, prompts, schedules, sequences
from tasks.rlhf.comparisons import Comparison
from tasks.rlhf.intervals import wilson

REFERENCE_ANSWERS = 512  # best answers whose reward gives the normalisation
PROBES = 8  # of them, whose scores are stored so that users of the adapter can check that it computes the same


def train(job: RewardJob, run: Run) -> None:
    """Train the pairwise reward model on the reward split."""
    settings, text = job.reward, job.text
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Comparisons, grouped by question; some questions are held out.
    tokenizer = models.load_tokenizer(run.inputs["model"])
    base = models.load_model(run.inputs["model"], device=device)
    models.check_context(base, text.max_prompt_tokens + text.max_answer_tokens)
    lengths = {"max_prompt_tokens": text.max_prompt_tokens, "max_answer_tokens": text.max_answer_tokens}
    rows = pq.read_table(run.inputs["data"] / "reward.parquet", columns=["question_id", "prompt", "chosen", "rejected"]).to_pylist()
    encoded = comparisons.encode(rows, tokenizer, template=text.template, **lengths)
    training, held_out = comparisons.hold_out(encoded, share=settings.held_out_share, seed=job.seed)
    if not training or not held_out:
        raise InputError("The reward split has fewer than two questions with pairs: raise data.reward_share or give more data.")

    # 2. Adapter and head, or the checkpoint's.
    devices.seed_step(job.seed, 0)
    lora = settings.lora
    model = adapters.attach(base, "reward", adapters.lora_config(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets))
    head = adapters.new_head(base.config.hidden_size).to(device)
    head.bias.requires_grad_(False)  # pairs say nothing about an offset
    assert isinstance(head.weight, nn.Parameter)
    parameters: dict[str, nn.Parameter] = {**adapters.parameters(model, "reward"), "head.weight": head.weight}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    total = schedules.num_steps(len(training), batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps)
    start = 0
    if (checkpoint := checkpoints.latest(run.checkpoints)) is not None:
        start = checkpoint.step
        checkpoints.restore_training(parameters, optimizer, checkpoint.tensors)
    run.rewind(start)

    # 3. Optimizer steps: each answer of a question goes through the model once, all its pairs share the step.
    adapters.train_mode(model)
    for step in range(start, total):
        devices.seed_step(job.seed, step + 1)
        rate = schedules.learning_rate(step, peak=settings.learning_rate, total=total, warmup=round(settings.warmup_share * total), shape="linear")
        optimizer.param_groups[0]["lr"] = rate
        indices = schedules.batch_indices(step, num_rows=len(training), batch_size=settings.batch_size, seed=job.seed)
        chosen = [training[i] for i in indices]
        num_pairs = sum(len(c.pairs) for c in chosen)
        optimizer.zero_grad(set_to_none=True)
        loss_value = right = 0.0
        for part in comparisons.micro_batches(chosen, run.machine.micro_batch):
            batch = comparisons.collate(part, pad_id=tokenizer.pad_token_id, device=device, hidden_size=base.config.hidden_size)
            with adapters.active(model, "reward"):
                score = branches.scores(base, head, batch.branches)
            loss = losses.pairwise_loss(score[batch.chosen], score[batch.rejected]).sum() / num_pairs
            loss.backward()
            loss_value += loss.item()
            right += (score[batch.chosen] > score[batch.rejected]).sum().item()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        run.log(step + 1, total, loss=loss_value, accuracy=right / num_pairs, learning_rate=rate)
        if (step + 1) % run.machine.checkpoint_steps == 0:
            checkpoints.save(run.checkpoints, step + 1, checkpoints.training_tensors(parameters, optimizer))

    # 4. Held-out accuracy, normalisation and probes; the artifact.
    model.eval()
    accuracy = wilson(*pair_accuracy(model, head, held_out, tokenizer.pad_token_id, device))
    longer = sum(len(c.answers[w]) > len(c.answers[x]) for c in held_out for w, x in c.pairs)
    adapters.save(model, "reward", run.artifact / "adapter", base=models.fingerprint(run.inputs["model"]), score=head.weight)
    reference = _reference_answers(job, run, tokenizer)
    normalisation = score_statistics(model, head, reference, tokenizer.pad_token_id, device)
    (run.artifact / "reward.json").write_text(json.dumps(normalisation, indent=1) + "\n")
    if accuracy.low <= 0.5:
        run.warn(
            f"The reward model orders {accuracy.value:.0%} of {accuracy.n} held-out pairs as the votes do, which is not distinguishable from "
            "guessing: a policy trained against it learns noise. Train it longer or on more pairs."
        )
    run.finish(
        {
            "reward_accuracy.votes": accuracy._asdict(),
            "reward_accuracy.longer_wins": wilson(longer, accuracy.n)._asdict(),
            "reward.mean": normalisation["mean"],
            "reward.std": normalisation["std"],
        },
        questions=len(training),
        pairs=sum(len(c.pairs) for c in training),
        steps=total,
    )


@torch.no_grad()
def pair_accuracy(model: PeftModel, head: nn.Linear, questions: list[Comparison], pad_id: int, device: torch.device) -> tuple[int, int]:
    """How many pairs the reward model orders as the votes do, and how many pairs there are."""
    right = total = 0
    with adapters.active(model, "reward") as base:
        for part in comparisons.micro_batches(questions, 128):
            batch = comparisons.collate(part, pad_id=pad_id, device=device, hidden_size=base.config.hidden_size)
            score = branches.scores(base, head, batch.branches)
            right += int((score[batch.chosen] > score[batch.rejected]).sum())
            total += len(batch.chosen)
    return right, total


def _reference_answers(job: RewardJob, run: Run, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    text = job.text
    rows = pq.read_table(run.inputs["data"] / "finetune.parquet", columns=["prompt", "answer"]).slice(0, REFERENCE_ANSWERS).to_pylist()
    return [
        (
            prompts.encode_prompt(tokenizer, row["prompt"], template=text.template, max_tokens=text.max_prompt_tokens),
            prompts.encode_answer(tokenizer, row["answer"], template=text.template, max_tokens=text.max_answer_tokens),
        )
        for row in rows
    ]


@torch.no_grad()
def score_statistics(
    model: PeftModel, head: nn.Linear, reference: list[tuple[list[int], list[int]]], pad_id: int, device: torch.device
) -> dict[str, object]:
    """Mean and standard deviation of the reward of reference answers, and the first answers with their scores as probes."""
    scored: list[float] = []
    with adapters.active(model, "reward") as base:
        for first in range(0, len(reference), 64):
            prompt_ids, answer_ids = zip(*reference[first : first + 64], strict=True)
            batch = sequences.join(list(prompt_ids), list(answer_ids), pad_id=pad_id, device=device)
            scored += sequences.scores(base, head, batch).tolist()
    all_scores = torch.tensor(scored)
    probes = [{"prompt": p, "answer": a, "score": s} for (p, a), s in zip(reference[:PROBES], scored[:PROBES], strict=True)]
    return {"mean": all_scores.mean().item(), "std": max(all_scores.std().item(), 1e-6) if len(scored) > 1 else 1.0, "probes": probes}


if __name__ == "__main__":
    main(train, RewardJob)
