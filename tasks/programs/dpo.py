"""Direct preference optimisation of an adapter, or of all weights, of the merged SFT model; what the reference says was computed before.

python -m tasks.programs.dpo DIR        inputs: data, model, reference, and start where weights are given to start from
torchrun --nproc_per_node 2 -m tasks.programs.dpo DIR        the same by two processes, each step to rounding
artifact: adapter/ (peft format), bottleneck/ or model/; summary.json
"""

from collections.abc import Callable
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.config.jobs import DpoJob
from tasks.config.stages import Dpo
from tasks.programs.reference import COLUMNS, read
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.algorithms import losses, sanity_checks, schedules
from tasks.rlhf.algorithms.losses import DpoLoss
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.compute import devices, distributed, fsdp, seeds
from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.models import fingerprint as models_fingerprint
from tasks.rlhf.models import loading
from tasks.rlhf.training.finite_checks import check_finite
from tasks.system.errors import InputError

# An untrained policy is the reference: log-probabilities of whole answers, computed in batches of other shapes.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 4.0, torch.float16: 1.0}


def train(job: DpoJob, run: Run) -> None:
    """Optimise the policy on the reward split's pairs directly."""
    settings = job.dpo
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Comparisons, grouped by question, with the reference's log-probabilities; some questions are held out.
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.encoder_of(job.text, tokenizer)
    everything = read(run, job.text, tokenizer, encoder)
    evaluation = pair_tables.read_evaluation(run.inputs["data"] / "evaluation_pairs.parquet", run, encoder)
    reference = _reference(run, "reference.parquet", everything, device)
    questions, held_out = comparisons.hold_out(everything, share=settings.held_out_share, seed=job.seed)
    if not questions or not held_out:
        raise InputError(
            "The reward split has fewer than two questions with pairs: raise data.reward_share or give more data."
        )
    measured = pair_tables.choose_measured(evaluation, held_out, run)
    if measured.unseen:
        reference |= _reference(run, "reference_evaluation.parquet", measured.questions, device)
    training_setup.afford(
        settings,
        run,
        "model",
        job.weights.merged,
        device,
        training_setup.largest(questions, settings.batch_size, run),
    )
    base = training_setup.base(run, "model", job.weights.merged, job.text, device)
    training_setup.share_prompts(
        run, base, [*questions, *held_out, *measured.questions], pad_id=tokenizer.pad_token_id
    )
    collated = {"pad_id": tokenizer.pad_token_id, "device": device, "hidden_size": base.config.hidden_size}
    most = run.machine.micro_batch or 128  # answers at a time where nothing is kept for a backward pass

    # 2. Fresh weights, given ones, or the checkpoint's.
    seeds.seed_step(job.seed, 0)
    fingerprint = models_fingerprint.compute_fingerprint(run.inputs["model"], base)
    tuning = training_setup.tuning(
        settings,
        base,
        "dpo",
        folder=run.inputs["model"],
        fingerprint=fingerprint,
        shard=run.machine.of("dpo").shard,
    )
    training = training_setup.training(settings, run, tuning, num_rows=len(questions), seed=job.seed)

    for step in training.steps():
        # 3. One optimizer step over some questions, each with all its pairs; each rank takes its part of them.
        tuning.train()
        indices = schedules.batch_indices(
            step, num_rows=len(questions), batch_size=settings.batch_size, seed=job.seed
        )
        chosen = [questions[i] for i in indices]
        num_pairs, num_best = sum(len(c.pairs) for c in chosen), max(1, sum(len(c.best) for c in chosen))
        sums, anchor = torch.zeros(4, device=device), 0.0
        for part, counts in distributed.padded_steps(
            comparisons.micro_batches(distributed.rank_slice(chosen), run.machine.micro_batch), chosen[:1]
        ):
            batch, ref = (
                comparisons.collate(part, **collated),
                torch.cat([reference[c.question_id] for c in part]),
            )
            with tuning.active() as policy:
                logp = fsdp.with_full_weights(policy, shared_prompt.log_probs, batch.branches)
                result, nll = (
                    pair_loss(logp, ref, batch, settings),
                    -logp / shared_prompt.num_tokens(batch.branches),
                )
                best_nll = nll[batch.best].sum() / num_best
                (counts * (result.loss.sum() / num_pairs + settings.nll_weight * best_nll)).backward()
            if not counts:
                continue
            anchor += best_nll.item()
            margin = result.chosen_reward - result.rejected_reward
            sums += torch.stack(
                [result.loss.detach().sum(), (margin > 0).sum(), margin.sum(), result.chosen_reward.sum()]
            )
            if (
                step == 0
                and "start" not in run.inputs
                and tuning.is_base_at_start
                and not settings.lora.dropout
            ):
                sanity_checks.check_close(
                    "An untrained policy's and the reference's log-probabilities", logp.detach(), ref, tolerance=TOLERANCE[loading.stored_dtype(base)],
                    cause="the reference stage saw another model, precision or text.",
                )  # fmt: skip
        names = ("loss", "accuracy", "margin", "chosen_reward")
        *totals, anchor = distributed.all_reduce([*sums.tolist(), anchor])
        line = {name: total / num_pairs for name, total in zip(names, totals, strict=True)} | {"nll": anchor}
        line |= {"grad_norm": training.update(line["loss"]), "learning_rate": training.rate(step)}

        # 4. The held-out loss now and then, which says which weights are kept.
        if step + 1 in training.looks:
            tuning.model.eval()
            with tuning.active() as policy:
                line["held_out_loss"] = evaluate(
                    policy, held_out, reference, settings, collated, most, run.phase("held-out answers")
                ).loss
            training.judged(step + 1, line["held_out_loss"])
        run.log(step + 1, training.plan.total, **line)
        training.save(step + 1, every=run.machine.checkpoint_steps)

    # 5. The artifact: the weights that are kept, their held-out loss and accuracy.
    training.conclude()
    training_setup.tell_peak(device)
    tuning.model.eval()
    tuning.save(run.artifact)
    with tuning.active() as policy:
        held = evaluate(policy, held_out, reference, settings, collated, most, run.phase("held-out answers"))
        shown = held
        if measured.unseen:
            shown = evaluate(
                policy,
                measured.questions,
                reference,
                settings,
                collated,
                most,
                run.phase("evaluation answers"),
            )
    check_finite({"the loss of held-out pairs": held.loss, "the loss of evaluation pairs": shown.loss})
    metrics = {
        "dpo.held_out_loss": held.loss,
        "dpo.implicit_accuracy": shown.accuracy._asdict(),
        "dpo.best_step": training.best.step,
    }
    run.warnings += encoder.warnings()
    done = {
        "questions": len(questions),
        "pairs": sum(len(c.pairs) for c in questions),
        "steps": training.plan.total,
    }
    run.finish(metrics | encoder.metrics("dpo"), measured=measured.record, **done)


def _reference(run: Run, file: str, questions: list[Comparison], device: torch.device) -> dict[int, Tensor]:
    """The reference's log-probability of each answer, (A,) float32 by question. Raises InputError where they are of other answers."""
    path = run.inputs["reference"] / file
    table = pq.read_table(path, columns=list(COLUMNS)) if path.exists() else None
    known = [(c.question_id, i, len(answer)) for c in questions for i, answer in enumerate(c.answers)]
    if (
        table is None
        or list(zip(*(table[name].to_pylist() for name in [*COLUMNS][:3]), strict=True)) != known
    ):
        raise InputError(
            "The reference's log-probabilities are of other answers than these: run the stage reference again on this data and model."
        )
    parts = torch.tensor(table["log_prob"].to_pylist(), device=device).split(
        [len(c.answers) for c in questions]
    )
    return {c.question_id: part for c, part in zip(questions, parts, strict=True)}


def pair_loss(logp: Tensor, ref: Tensor, batch: Batch, settings: Dpo) -> DpoLoss:
    """The loss of each pair by log-probabilities of whole answers, (S,)."""
    w, x = batch.chosen, batch.rejected
    if settings.loss == "ipo":
        return losses.ipo_loss(logp[w], logp[x], ref[w], ref[x], beta=settings.beta)
    return losses.dpo_loss(
        logp[w], logp[x], ref[w], ref[x], beta=settings.beta, smoothing=settings.label_smoothing
    )


class HeldOut(NamedTuple):
    loss: float  # mean over the pairs
    accuracy: Interval  # of pairs ordered as the votes do by the implicit reward


@torch.no_grad()
def evaluate(
    policy: PreTrainedModel,
    questions: list[Comparison],
    reference: dict[int, Tensor],
    settings: Dpo,
    collated: dict[str, object],
    most: int = 128,
    told: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """The loss and the implicit reward's order of pairs that are not trained on; at most ``most`` answers at a time."""

    def look(part: list[Comparison]) -> tuple[float, list[float]]:
        batch = comparisons.collate(part, **collated)  # type: ignore[arg-type]
        result = pair_loss(
            fsdp.with_full_weights(policy, shared_prompt.log_probs, batch.branches),
            torch.cat([reference[c.question_id] for c in part]),
            batch,
            settings,
        )
        return result.loss.sum().item(), pair_accuracy.correct(
            result.chosen_reward, result.rejected_reward
        ).tolist()

    lost, right = zip(
        *distributed.map_over_ranks(comparisons.micro_batches(questions, most), look, told=told), strict=True
    )
    correct = torch.tensor([one for some in right for one in some])
    question = torch.tensor([number for number, c in enumerate(questions) for _ in c.pairs])
    return HeldOut(
        sum(lost) / len(correct), pair_accuracy.wider_interval(pair_accuracy.measure(correct, question))
    )


if __name__ == "__main__":
    main(train, DpoJob, among=distributed.process_group)
