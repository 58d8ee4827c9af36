"""Direct preference optimisation of a LoRA adapter on the merged SFT model; the reference is the model with the adapter off.

python -m tasks.programs.dpo DIR        inputs: data, model        artifact: adapter/ (peft format), summary.json
"""

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import Tensor

from tasks.programs.config import Dpo, DpoJob, InputError
from tasks.programs.entry import Run, main
from tasks.rlhf import adapters, branches, checkpoints, comparisons, devices, losses, models, schedules
from tasks.rlhf.comparisons import Batch, Comparison
from tasks.rlhf.intervals import wilson


def train(job: DpoJob, run: Run) -> None:
    """Optimise the policy on the reward split's pairs directly."""
    settings, text = job.dpo, job.text
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Comparisons, grouped by question; some questions are held out.
    tokenizer = models.load_tokenizer(run.inputs["model"])
    base = models.load_model(run.inputs["model"], device=device)
    models.check_head(base)
    models.check_context(base, text.max_prompt_tokens + text.max_answer_tokens)
    lengths = {"max_prompt_tokens": text.max_prompt_tokens, "max_answer_tokens": text.max_answer_tokens}
    rows = pq.read_table(run.inputs["data"] / "reward.parquet", columns=["question_id", "prompt", "chosen", "rejected"]).to_pylist()
    encoded = comparisons.encode(rows, tokenizer, template=text.template, **lengths)
    training, held_out = comparisons.hold_out(encoded, share=settings.held_out_share, seed=job.seed)
    if not training or not held_out:
        raise InputError("The reward split has fewer than two questions with pairs: raise data.reward_share or give more data.")

    # 2. A fresh adapter, or the checkpoint's.
    devices.seed_step(job.seed, 0)
    lora = settings.lora
    model = adapters.attach(base, "dpo", adapters.lora_config(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets))
    parameters = adapters.parameters(model, "dpo")
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    total = schedules.num_steps(len(training), batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps)
    start = 0
    if (checkpoint := checkpoints.latest(run.checkpoints)) is not None:
        start = checkpoint.step
        checkpoints.restore_training(parameters, optimizer, checkpoint.tensors)
    run.rewind(start)

    # 3. Optimizer steps.
    adapters.train_mode(model)
    for step in range(start, total):
        devices.seed_step(job.seed, step + 1)
        rate = schedules.learning_rate(step, peak=settings.learning_rate, total=total, warmup=round(settings.warmup_share * total), shape="linear")
        optimizer.param_groups[0]["lr"] = rate
        indices = schedules.batch_indices(step, num_rows=len(training), batch_size=settings.batch_size, seed=job.seed)
        chosen = [training[i] for i in indices]
        num_pairs, num_best = sum(len(c.pairs) for c in chosen), max(1, sum(len(c.best) for c in chosen))
        optimizer.zero_grad(set_to_none=True)
        sums, anchor = torch.zeros(4, device=device), 0.0
        for part in comparisons.micro_batches(chosen, run.machine.micro_batch):
            batch = comparisons.collate(part, pad_id=tokenizer.pad_token_id, device=device, hidden_size=base.config.hidden_size)
            result, nll = batch_loss(model, batch, settings)
            best_nll = nll[batch.best].sum() / num_best
            (result.loss.sum() / num_pairs + settings.nll_weight * best_nll).backward()
            anchor += best_nll.item()
            margin = result.chosen_reward - result.rejected_reward
            sums += torch.stack([result.loss.detach().sum(), (margin > 0).sum(), margin.sum(), result.chosen_reward.sum()])
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        names = ("loss", "accuracy", "margin", "chosen_reward")
        run.log(step + 1, total, **dict(zip(names, (sums / num_pairs).tolist(), strict=True)), nll=anchor, learning_rate=rate)
        if (step + 1) % run.machine.checkpoint_steps == 0:
            checkpoints.save(run.checkpoints, step + 1, checkpoints.training_tensors(parameters, optimizer))

    # 4. Held-out loss and accuracy; the artifact.
    model.eval()
    loss, right, pairs = evaluate(model, held_out, tokenizer.pad_token_id, settings, device)
    adapters.save(model, "dpo", run.artifact / "adapter", base=models.fingerprint(run.inputs["model"]))
    metrics = {"dpo.held_out_loss": loss, "dpo.implicit_accuracy": wilson(right, pairs)._asdict()}
    run.finish(metrics, questions=len(training), pairs=sum(len(c.pairs) for c in training), steps=total)


def batch_loss(model: PeftModel, batch: Batch, settings: Dpo) -> tuple[losses.DpoLoss, Tensor]:
    """DPO's loss of each pair, and each answer's negative log-likelihood a token; every answer goes through policy and reference once."""
    with adapters.active(model, None) as reference, torch.no_grad():
        ref = branches.log_probs(reference, batch.branches)
    with adapters.active(model, "dpo") as policy:
        logp = branches.log_probs(policy, batch.branches)
    w, x = batch.chosen, batch.rejected
    pairs = losses.dpo_loss(logp[w], logp[x], ref[w], ref[x], beta=settings.beta, smoothing=settings.label_smoothing)
    return pairs, -logp / branches.num_tokens(batch.branches)


@torch.no_grad()
def evaluate(model: PeftModel, questions: list[Comparison], pad_id: int, settings: Dpo, device: torch.device) -> tuple[float, int, int]:
    """Mean loss, pairs ordered as the votes do by the implicit reward, and pairs."""
    loss, right, pairs = 0.0, 0, 0
    for part in comparisons.micro_batches(questions, 128):
        batch = comparisons.collate(part, pad_id=pad_id, device=device, hidden_size=model.config.hidden_size)
        result, _ = batch_loss(model, batch, settings)
        loss += result.loss.sum().item()
        right += int((result.chosen_reward > result.rejected_reward).sum())
        pairs += len(batch.chosen)
    return loss / pairs, right, pairs


if __name__ == "__main__":
    main(train, DpoJob)
