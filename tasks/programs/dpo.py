"""Train a policy on pairs of answers directly, without a reward model (direct preference optimisation, DPO).

python -m tasks.programs.dpo DIR
torchrun --nproc_per_node 2 -m tasks.programs.dpo DIR        the same on two ranks, equal to rounding

inputs: data, model (the merged SFT model), reference (its log-probabilities);
    start, if training starts from given weights
artifact: adapter/ (peft format), bottleneck/ or model/; samples.jsonl, summary.json

Deviations from Rafailov et al. 2023: all pairs of a question share an optimizer step, the best answers'
negative log-likelihood is added (dpo.nll_weight), and the reference's log-probabilities are computed
beforehand by the stage reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.config.jobs import DpoJob
from tasks.config.sections.dpo import Dpo
from tasks.programs.reference import COLUMNS
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import ReportProgress, Run, main
from tasks.programs.runtime.training_samples import build_sampler
from tasks.programs.token_tables.questions import answer_keys, hold_out, read_evaluation, read_pairs
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.algorithms import losses, sanity_checks, schedules
from tasks.rlhf.algorithms.losses import DpoLoss
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.compute import devices, distributed, fsdp, seeds
from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.models import loading
from tasks.rlhf.models.fingerprint import compute_fingerprint
from tasks.rlhf.models.trainable import Trainable
from tasks.rlhf.training import loop
from tasks.rlhf.training.finite_checks import check_finite
from tasks.system.errors import InputError

Collate = Callable[[Sequence[Comparison]], Batch]
# An untrained policy is the reference; its log-probabilities are computed in batches of other shapes.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 4.0, torch.float16: 1.0}
EVALUATED_ANSWERS = 128  # at a time without gradients, unless machine.micro_batch is set


def train(job: DpoJob, run: Run) -> None:
    """Optimise the policy on the reward split's pairs directly."""
    settings, machine, folder = job.dpo, run.machine, run.inputs["model"]
    device = devices.set_up(machine.device, machine.threads)

    # 1. Comparisons by question, with the reference's log-probabilities; some questions are held out.
    tokenizer = loading.load_tokenizer(folder)
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    everything = read_pairs(run, run.inputs["data"] / "reward.parquet", encoder)
    evaluation = read_evaluation(run, run.inputs["data"] / "evaluation_pairs.parquet", encoder)
    reference = read_reference(run, "reference.parquet", everything, device)
    questions, held_out = hold_out(everything, share=settings.held_out_share, seed=job.seed)
    reported = pair_tables.choose_reported_pairs(evaluation, held_out, run)
    if reported.unseen:
        reference |= read_reference(run, "reference_evaluation.parquet", reported.questions, device)
    micro_batch = training_setup.largest_micro_batch(questions, settings.batch_size, run)
    training_setup.check_memory(settings, run, "model", job.weights.merged, device, micro_batch)
    base = training_setup.load_trained_base(settings, run, "model", job.weights.merged, job.text, device)
    pad_id = tokenizer.pad_token_id
    training_setup.check_prompt_sharing(run, base, everything, reported.questions, pad_id=pad_id)
    collate = partial(comparisons.collate, pad_id=pad_id, device=device, hidden_size=base.config.hidden_size)

    # 2. What is trained: fresh weights, those of the input "start", or the checkpoint's.
    seeds.seed_step(job.seed, 0)
    policy = training_setup.build_trainable(
        settings, base, "dpo", folder=folder, fingerprint=compute_fingerprint(folder, base)
    )
    training = training_setup.start_training(settings, run, policy, num_rows=len(questions), seed=job.seed)
    starts_as_reference = "start" not in run.inputs and policy.is_base_at_start and not settings.lora.dropout

    # 3. Optimizer steps over questions in an order drawn from the seed; now and then the held-out loss.
    def step_gradients(step: int) -> dict[str, float]:
        indices = schedules.batch_indices(
            step, num_rows=len(questions), batch_size=settings.batch_size, seed=job.seed
        )
        return accumulate_gradients(
            policy,
            [questions[i] for i in indices],
            reference,
            settings,
            collate,
            micro_batch=machine.micro_batch,
            tolerance=TOLERANCE[loading.stored_dtype(base)] if step == 0 and starts_as_reference else None,
        )

    def evaluate_pairs(some: Sequence[Comparison], name: str) -> Evaluation:
        policy.model.eval()
        with policy.active() as model:
            return evaluate(
                model,
                some,
                reference,
                settings,
                collate,
                machine.micro_batch or EVALUATED_ANSWERS,
                report_progress=run.phase(name),
            )

    loop.fit(
        training,
        step_gradients,
        lambda: evaluate_pairs(held_out, "held-out answers").loss,
        log=run.log,
        checkpoint_steps=machine.checkpoint_steps,
        interruptions=run.interruptions,
        sample=build_sampler(job, run, tokenizer, policy, total=training.schedule.total),
    )

    # 4. The artifact: the weights that are kept, their held-out loss and accuracy.
    training_setup.print_peak_memory(device)
    policy.save(run.artifact)
    held = shown = evaluate_pairs(held_out, "held-out answers")
    if reported.unseen:
        shown = evaluate_pairs(reported.questions, "evaluation answers")
    check_finite({"the loss of held-out pairs": held.loss, "the loss of evaluation pairs": shown.loss})
    metrics = {
        "dpo.held_out_loss": held.loss,
        "dpo.implicit_accuracy": shown.accuracy._asdict(),
        "dpo.best_step": training.best.step,
    }
    run.warnings += encoder.warnings()
    run.finish(
        metrics | encoder.metrics("dpo"),
        questions=len(questions),
        pairs=sum(len(question.pairs) for question in questions),
        steps=training.schedule.total,
        measured=reported.record,
    )


def read_reference(
    run: Run, file: str, questions: TokenTable[Comparison], device: torch.device
) -> dict[int, Tensor]:
    """Return the reference's log-probability of each answer by question, (A,) float32.

    Raises InputError if the file is of other answers.
    """
    path = run.inputs["reference"] / file
    table = pq.read_table(path, columns=list(COLUMNS)) if path.exists() else None
    expected = answer_keys(questions)
    if table is None or not all(np.array_equal(table[key].to_numpy(), expected[key]) for key in expected):
        raise InputError(
            "The reference's log-probabilities are of other answers than these: "
            "run the stage reference again on this data and model."
        )
    log_probs = torch.tensor(table["log_prob"].to_pylist(), device=device)
    parts = log_probs.split(questions.lengths("answers"))
    return dict(zip(questions.column("question_id"), parts, strict=True))


def accumulate_gradients(
    policy: Trainable,
    questions: list[Comparison],
    reference: dict[int, Tensor],
    settings: Dpo,
    collate: Collate,
    *,
    micro_batch: int,
    tolerance: float | None,
) -> dict[str, float]:
    """Add the gradients of a step's questions, each with all its pairs; each rank computes its part.

    Return metrics of the step.

    With ``tolerance`` the policy is untrained and must have the reference's log-probabilities; raises
    StepZeroError.
    """
    policy.train()
    num_pairs = sum(len(question.pairs) for question in questions)
    num_best = max(1, sum(len(question.best) for question in questions))
    sums, nll = torch.zeros(4, device=policy.model.device), 0.0
    parts = comparisons.micro_batches(distributed.rank_slice(questions), micro_batch)
    for part, counts in distributed.padded_steps(parts, questions[:1]):
        batch = collate(part)
        ref = torch.cat([reference[question.question_id] for question in part])  # (S,)
        with policy.active() as model:
            logp = fsdp.with_full_weights(model, shared_prompt.log_probs, batch.inputs)  # (S,)
            result = pair_loss(logp, ref, batch, settings)
            per_token = -logp / shared_prompt.num_tokens(batch.inputs)
            best_nll = per_token[batch.best].sum() / num_best
            (counts * (result.loss.sum() / num_pairs + settings.nll_weight * best_nll)).backward()
        if not counts:
            continue
        nll += best_nll.item()
        margin = result.chosen_reward - result.rejected_reward
        part_sums = [result.loss.detach().sum(), (margin > 0).sum(), margin.sum(), result.chosen_reward.sum()]
        sums += torch.stack(part_sums)
        if tolerance is not None:
            sanity_checks.check_close(
                "An untrained policy's and the reference's log-probabilities",
                logp.detach(),
                ref,
                tolerance=tolerance,
                cause="the reference stage saw another model, precision or text.",
            )
    *totals, nll = distributed.all_reduce([*sums.tolist(), nll])
    names = ("loss", "accuracy", "margin", "chosen_reward")
    return {name: total / num_pairs for name, total in zip(names, totals, strict=True)} | {"nll": nll}


def pair_loss(logp: Tensor, ref: Tensor, batch: Batch, settings: Dpo) -> DpoLoss:
    """Return the loss of each pair, (P,), from log-probabilities of whole answers, (S,)."""
    w, x = batch.chosen, batch.rejected
    if settings.loss == "ipo":
        return losses.ipo_loss(logp[w], logp[x], ref[w], ref[x], beta=settings.beta)
    return losses.dpo_loss(
        logp[w], logp[x], ref[w], ref[x], beta=settings.beta, smoothing=settings.label_smoothing
    )


class Evaluation(NamedTuple):
    """The policy on pairs that are not trained on."""

    loss: float  # mean over the pairs
    accuracy: Interval  # of pairs ordered as the votes do by the implicit reward


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    questions: Sequence[Comparison],
    reference: dict[int, Tensor],
    settings: Dpo,
    collate: Collate,
    batch_size: int = EVALUATED_ANSWERS,
    *,
    report_progress: ReportProgress | None = None,
) -> Evaluation:
    """Return the loss and the implicit reward's accuracy on all pairs; at most ``batch_size`` answers at a
    time.
    """

    def evaluate_part(part: Sequence[Comparison]) -> tuple[float, list[float]]:
        batch = collate(part)
        logp = fsdp.with_full_weights(model, shared_prompt.log_probs, batch.inputs)
        ref = torch.cat([reference[question.question_id] for question in part])
        result = pair_loss(logp, ref, batch, settings)
        correct = pair_accuracy.correct(result.chosen_reward, result.rejected_reward)
        return result.loss.sum().item(), correct.tolist()

    parts = comparisons.micro_batches(questions, batch_size)
    found = distributed.map_over_ranks(parts, evaluate_part, report_progress=report_progress)
    part_losses, part_correct = zip(*found, strict=True)
    correct = torch.tensor([value for values in part_correct for value in values])
    question = torch.tensor([number for number, c in enumerate(questions) for _ in c.pairs])
    accuracy = pair_accuracy.wider_interval(pair_accuracy.measure(correct, question))
    return Evaluation(sum(part_losses) / len(correct), accuracy)


if __name__ == "__main__":
    main(train, DpoJob, among=distributed.process_group)
