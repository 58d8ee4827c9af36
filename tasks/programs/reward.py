"""Train the reward model on pairs of answers or whole rankings.

python -m tasks.programs.reward DIR
torchrun --nproc_per_node 2 -m tasks.programs.reward DIR        the same on two ranks, equal to rounding

inputs: data, model (the merged SFT model); start, if training starts from given weights; mixture, in rounds:
        votes and comparisons in place of data's pairs
artifact:
    adapter/       a SEQ_CLS adapter; an ensemble's others are adapter-1/ and so on. With tune=full instead
                   model/ and score.safetensors
    reward.json    normalisation, temperature, probes
    measures.json  linear probe, accuracy by gap and length, calibration, attacks, wrong names copied
    summary.json

Deviations from Ouyang et al. 2022: an adapter instead of all weights (tune=full trains these), and pairs
drawn by the data stage instead of whole rankings (comparisons=rankings takes these).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.config.jobs import RewardJob
from tasks.config.sections.reward import Reward
from tasks.programs.runtime import pair_tables, reward_report, reward_tests, training_setup
from tasks.programs.runtime.program import ReportProgress, Run, main
from tasks.programs.runtime.reward_tests import MEASURES
from tasks.programs.token_tables.hard_negatives import Hardened, add_hard_negatives
from tasks.programs.token_tables.questions import hold_out, read_evaluation, read_pairs, read_rankings
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.algorithms import losses, schedules
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, distributed, fsdp, seeds
from tasks.rlhf.evaluation import probe_start, reward_evaluation
from tasks.rlhf.models import fingerprint, loading, lora, reward_model
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.rlhf.models.trainable import Trainable
from tasks.rlhf.training import loop
from tasks.rlhf.training.finite_checks import check_finite
from tasks.rlhf.training.loop import Training

Collate = Callable[[Sequence[Comparison]], Batch]
EVALUATED_ANSWERS = 128  # at a time without gradients, unless machine.micro_batch is set


def train(job: RewardJob, run: Run) -> None:
    """Train the reward model on the reward split."""
    settings, machine = job.reward, run.machine
    device = devices.set_up(machine.device, machine.threads)

    # 1. Comparisons, grouped by question; some questions are held out.
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    voted, held_out = read_comparisons(job, run, encoder)
    questions, made = add_hard_comparisons(job, run, voted, encoder)
    evaluation = read_evaluation(run, run.inputs["data"] / "evaluation_pairs.parquet", encoder)
    reported = pair_tables.choose_reported_pairs(evaluation, held_out, run)
    age_bias = comparisons.age_bias(voted) if settings.age_bias else 0.0
    micro_batch = training_setup.largest_micro_batch(questions, settings.batch_size, run)
    training_setup.check_memory(
        settings, run, "model", job.weights.merged, device, micro_batch, members=settings.num_trained
    )
    base = training_setup.load_trained_base(settings, run, "model", job.weights.merged, job.text, device)
    pad_id = tokenizer.pad_token_id
    training_setup.check_prompt_sharing(run, base, questions, held_out, reported.questions, pad_id=pad_id)
    collate = partial(comparisons.collate, pad_id=pad_id, device=device, hidden_size=base.config.hidden_size)

    # 2. Adapters and heads: fresh, from a linear probe, those of the input "start", or the checkpoint's.
    seeds.seed_step(job.seed, 0)
    trainable, model, spare = build_members(job, run, base)
    training = training_setup.start_training(settings, run, trainable, num_rows=len(questions), seed=job.seed)
    batch_size = machine.micro_batch or EVALUATED_ANSWERS
    if settings.probe and not training.initial_metrics:
        trainable.model.eval()
        training.initial_metrics = probe_start.initialise_heads(
            model,
            questions,
            held_out,
            partial(probe_start.answer_features, collate=collate, batch_size=batch_size, phase=run.phase),
            pair_loss=probe_start.PairLoss(settings.margin, settings.weigh, age_bias),
            reported=reported.questions,
            seed=job.seed,
            spare=spare,
        )
        record_probe(training, run)

    # 3. Optimizer steps over questions in an order drawn from the seed; now and then the held-out loss.
    def step_gradients(step: int) -> dict[str, float]:
        trainable.train()
        draw = partial(schedules.batch_indices, step, num_rows=len(questions), batch_size=settings.batch_size)
        chosen = []
        for number, member in enumerate(
            [*model.members, *spare]
        ):  # each sees the questions in an order of its own
            seed = seeds.mix(job.seed, number) if number else job.seed
            chosen.append((member, [questions[i] for i in draw(seed=seed)]))
        return accumulate_gradients(
            chosen, settings, collate, micro_batch=machine.micro_batch, age_bias=age_bias
        )

    def rewards_of(some: Sequence[Comparison], name: str, of: Scorer) -> Tensor:
        trainable.model.eval()
        return answer_rewards(of, some, collate, batch_size, report_progress=run.phase(name))

    held_out_pairs = reward_evaluation.pairs_of(held_out)

    def held_out_loss() -> float:
        rewards = rewards_of(held_out, "held-out answers", model._replace(uncertainty_penalty=0.0))
        return reward_evaluation.held_out_loss(held_out_pairs, rewards, age_bias=age_bias)

    loop.fit(
        training,
        step_gradients,
        held_out_loss,
        log=run.log,
        checkpoint_steps=machine.checkpoint_steps,
        interruptions=run.interruptions,
    )

    # 4. The artifact: the weights that are kept, normalisation and probes, and measurements of the model.
    training_setup.print_peak_memory(device)
    trainable.model.eval()
    trainable.save(run.artifact)
    reference, attacked = reward_tests.read_answers(
        job, run, pair_tables.build_encoder(job.text, tokenizer, {})
    )
    model = reward_tests.standardise_members(model, reference, pad_id, device, run)
    held_out_rewards = rewards = rewards_of(held_out, "held-out answers", model)
    pairs, fitted_on = held_out_pairs, None
    if reported.unseen:
        pairs = reward_evaluation.pairs_of(reported.questions)
        rewards = rewards_of(reported.questions, "evaluation answers", model)
        fitted_on = reward_evaluation.margins(held_out_pairs, held_out_rewards)
    loss = reward_evaluation.held_out_loss(held_out_pairs, held_out_rewards, age_bias=age_bias)
    check_finite(
        {"the reward of held-out answers": held_out_rewards, "the reward of evaluation answers": rewards}
    )
    metrics: dict[str, Any] = {"reward.held_out_loss": loss, "reward.best_step": training.best.step}
    if settings.probe:
        run.note(MEASURES, {"probe": training.initial_metrics})
        metrics |= probe_start.metrics(training.initial_metrics)
    metrics |= reward_report.report_accuracy(
        pairs,
        rewards,
        run,
        age_bias=age_bias,
        baseline=reward_evaluation.fit_baseline_rules(reward_evaluation.pairs_of(voted)),
        calibrated=reward_evaluation.calibrate(pairs, rewards, fitted_on=fitted_on),
    )
    run.note(MEASURES, {"measured": reported.record})
    metrics |= reward_tests.normalise(model, reference, pad_id, device, run)
    reward_tests.normalise_held_out(spare, reference, pad_id, device, run)
    metrics |= reward_tests.attack(model, attacked, encoder, device, run) | encoder.metrics("reward")
    metrics |= reward_tests.measure_copying(model, attacked, encoder, device, run)
    metrics |= reward_report.report_made(made, run) if settings.hard_negatives.share else {}
    run.warnings += encoder.warnings()
    run.finish(
        metrics,
        questions=len(questions),
        pairs=sum(len(question.pairs) for question in questions),
        steps=training.schedule.total,
        measured=reported.record,
    )


def add_hard_comparisons(
    job: RewardJob, run: Run, voted: TokenTable[Comparison], encoder: Encoder
) -> Hardened:
    """Return the training questions with the comparisons that the settings have made without people."""
    progress = run.phase("making hard comparisons")
    hard = job.reward.hard_negatives
    return add_hard_negatives(voted, encoder, hard, seed=job.seed, report_progress=progress)


def read_comparisons(
    job: RewardJob, run: Run, encoder: Encoder
) -> tuple[TokenTable[Comparison], TokenTable[Comparison]]:
    """Return questions to train on, and held-out ones. Raises InputError if there are too few."""
    settings = job.reward
    if settings.comparisons == "pairs":
        votes, mixture = run.inputs["data"] / "reward.parquet", run.inputs.get("mixture")
        questions = read_pairs(run, mixture / "reward.parquet" if mixture else votes, encoder)
    else:
        table = run.inputs["data"] / "reward_groups.parquet"
        questions = read_rankings(run, table, encoder, most_answers=settings.max_answers)
    return hold_out(questions, share=settings.held_out_share, seed=job.seed)


def build_members(
    job: RewardJob, run: Run, base: PreTrainedModel
) -> tuple[Trainable, Scorer, tuple[Member, ...]]:
    """Return what is trained, all members together, the reward model that they make, and the member that is
    held out of it, if any.
    """
    folder = run.inputs["model"]
    base_fingerprint = fingerprint.compute_fingerprint(folder, base)
    adapters: list[Trainable] = []
    members: list[Member] = []
    for number in range(job.reward.num_trained):
        seeds.seed_step(seeds.mix(job.seed, number) if number else job.seed, 0)
        below = adapters[-1].model if adapters else base
        name = f"reward{number or ''}"
        adapters.append(
            training_setup.build_trainable(
                job.reward, below, name, folder=folder, fingerprint=base_fingerprint
            )
        )
        head = lora.new_head(base.config.hidden_size).to(base.device)
        head.bias.requires_grad_(False)  # pairs say nothing about an offset
        members.append(Member(adapters[-1].active, head))
    groups: list[dict[str, nn.Parameter]] = []
    for number, (adapter, member) in enumerate(zip(adapters, members, strict=True)):
        assert isinstance(member.head.weight, nn.Parameter)
        groups.append({**adapter.parameters, f"score{number or ''}.weight": member.head.weight})
    parameters = {name: parameter for group in groups for name, parameter in group.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)  # attaching an adapter freezes those before it

    def save(artifact: Path, **_: object) -> None:
        for number, (adapter, member) in enumerate(zip(adapters, members, strict=True)):
            adapter.save(artifact, number=number, score=member.head.weight)

    names = tuple(map(tuple, groups))
    together = adapters[-1]._replace(parameters=parameters, save=save, clipped_separately=names)
    count = job.reward.members
    scorer = Scorer(tuple(members[:count]), job.reward.uncertainty_penalty)
    return together, scorer, tuple(members[count:])


def record_probe(training: Training, run: Run) -> None:
    """Record the linear probe that the heads start from as the evaluation of step 0, and save a checkpoint of
    it.
    """
    loss = training.initial_metrics["held_out_loss"]
    training.record_evaluation(0, loss)
    run.rewind(-1)
    run.log(0, training.schedule.total, held_out_loss=loss)
    training.save(0, every=run.machine.checkpoint_steps)


def accumulate_gradients(
    chosen: list[tuple[Member, list[Comparison]]],
    settings: Reward,
    collate: Collate,
    *,
    micro_batch: int,
    age_bias: float,
) -> dict[str, float]:
    """Add the gradients of each member for its questions of a step; each rank computes its part.

    Return loss and accuracy of the step.

    Each answer is computed once, however many pairs it is in, and all pairs of a question share the step.
    """
    loss_value, accuracy = 0.0, 0.0
    for member, questions in chosen:
        num_pairs = sum(len(question.pairs) for question in questions)
        parts = comparisons.micro_batches(distributed.rank_slice(questions), micro_batch)
        for part, counts in distributed.padded_steps(parts, questions[:1]):
            batch = collate(part)
            with member.active() as base:
                score = fsdp.with_full_weights(base, shared_prompt.scores, member.head, batch.inputs)  # (S,)
                loss = counts * ranking_loss(
                    score,
                    batch,
                    settings,
                    num_pairs=num_pairs,
                    num_questions=len(questions),
                    age_bias=age_bias,
                )
                loss.backward()
            loss_value += loss.item()
            accuracy += counts * (score[batch.chosen] > score[batch.rejected]).sum().item() / num_pairs
    loss_value, accuracy = distributed.all_reduce([loss_value, accuracy])
    return {"loss": loss_value / len(chosen), "accuracy": accuracy / len(chosen)}


def ranking_loss(
    score: Tensor,
    batch: Batch,
    settings: Reward,
    *,
    num_pairs: int,
    num_questions: int,
    age_bias: float = 0.0,
) -> Tensor:
    """Return the loss of a batch's pairs as a part of the step's; score (S,).

    The step's loss is the mean over its ``num_pairs``, or over its ``num_questions`` of each question's mean.
    ``age_bias`` is added to the reward of the older answer of a pair.
    """
    chosen, rejected = score[batch.chosen], score[batch.rejected]
    margin = settings.margin * batch.gap - age_bias * batch.age_sign
    loss = losses.pairwise_loss(chosen, rejected, margin)
    if settings.centring:
        loss = loss + settings.centring * losses.centring_penalty(chosen, rejected)
    return (
        loss.sum() / num_pairs if settings.weigh == "pairs" else (loss * batch.weight).sum() / num_questions
    )


def answer_rewards(
    model: Scorer,
    questions: Sequence[Comparison],
    collate: Collate,
    batch_size: int = EVALUATED_ANSWERS,
    *,
    report_progress: ReportProgress | None = None,
) -> Tensor:
    """Return the reward of every answer, (S,) float32; ``batch_size`` answers at a time."""

    def rewards(part: Sequence[Comparison]) -> Tensor:
        return reward_model.rewards(model, collate(part).inputs).cpu()

    parts = comparisons.micro_batches(questions, batch_size)
    return torch.cat(distributed.map_over_ranks(parts, rewards, report_progress=report_progress))


if __name__ == "__main__":
    main(train, RewardJob, among=distributed.process_group)
