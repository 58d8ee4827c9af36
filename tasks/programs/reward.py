"""Trains the reward model: adapter and scalar head on the merged SFT model (or all of its weights), from pairs of answers or whole rankings.

python -m tasks.programs.reward DIR        inputs: data, model, and start where weights are given to start from
torchrun --nproc_per_node 2 -m tasks.programs.reward DIR        the same by two processes, each step to rounding
artifact: adapter/ (a SEQ_CLS adapter; adapter-1/ and on are the ensemble's others), or model/ and score.safetensors; reward.json (normalisation,
temperature, probes), measures.json (the probe, accuracy by gap and length, calibration, attacks), summary.json
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.config.jobs import RewardJob
from tasks.config.stages import Reward
from tasks.programs.runtime import pair_tables, reward_tests, training_setup
from tasks.programs.runtime.program import Run, main
from tasks.programs.runtime.reward_tests import MEASURES, Encoded
from tasks.rlhf.algorithms import losses, schedules
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, distributed, fsdp, seeds
from tasks.rlhf.evaluation import pair_accuracy, probe_start, reward_evaluation
from tasks.rlhf.models import fingerprint, loading, lora, reward_model
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.rlhf.models.trainable import Trainable
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.finite_checks import check_finite
from tasks.system.errors import InputError


def train(job: RewardJob, run: Run) -> None:
    """Train the reward model on the reward split."""
    settings = job.reward
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Comparisons, grouped by question; some questions are held out.
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.encoder_of(job.text, tokenizer)
    questions, held_out = _comparisons(job, run, encoder)
    evaluation = pair_tables.read_evaluation(run.inputs["data"] / "evaluation_pairs.parquet", run, encoder)
    measured = pair_tables.choose_measured(evaluation, held_out, run)
    ahead = comparisons.age_bias(questions) if settings.age_bias else 0.0
    training_setup.afford(
        settings,
        run,
        "model",
        job.weights.merged,
        device,
        training_setup.largest(questions, settings.batch_size, run),
        members=settings.members,
    )
    base = training_setup.base(run, "model", job.weights.merged, job.text, device)
    training_setup.share_prompts(
        run, base, [*questions, *held_out, *measured.questions], pad_id=tokenizer.pad_token_id
    )
    most = run.machine.micro_batch or 128  # answers at a time where nothing is kept for a backward pass
    collate = partial(
        comparisons.collate, pad_id=tokenizer.pad_token_id, device=device, hidden_size=base.config.hidden_size
    )

    # 2. Adapters and heads, or the checkpoint's.
    seeds.seed_step(job.seed, 0)
    tuning, model = _members(job, run, base)
    told: dict[str, Any] | None = None
    if settings.probe and checkpoints.latest(run.checkpoints) is None:
        tuning.model.eval()
        pair_loss = probe_start.PairLoss(settings.margin, settings.weigh, ahead)
        features = partial(probe_start.answer_features, collate=collate, most=most, phase=run.phase)
        told = probe_start.initialise_heads(
            model,
            questions,
            held_out,
            features,
            pair_loss=pair_loss,
            measured=measured.questions,
            seed=job.seed,
        )
    training = training_setup.training(settings, run, tuning, num_rows=len(questions), seed=job.seed)
    if told:
        training.told = told
        training.judged(0, told["held_out_loss"])
        run.rewind(-1)
        run.log(0, training.plan.total, held_out_loss=told["held_out_loss"])
        training.save(0, every=run.machine.checkpoint_steps)

    for step in training.steps():
        # 3. One optimizer step: each answer of a question goes through each member once, all its pairs share the step; each rank its questions.
        tuning.train()
        sums = {"loss": 0.0, "accuracy": 0.0}
        for number, member in enumerate(model.members):
            seed = (
                seeds.mix(job.seed, number) if number else job.seed
            )  # members see the questions in different orders
            chosen = [
                questions[i]
                for i in schedules.batch_indices(
                    step, num_rows=len(questions), batch_size=settings.batch_size, seed=seed
                )
            ]
            num_pairs = sum(len(c.pairs) for c in chosen)
            for part, counts in distributed.padded_steps(
                comparisons.micro_batches(distributed.rank_slice(chosen), run.machine.micro_batch), chosen[:1]
            ):
                batch = collate(part)
                with member.active() as base:
                    score = fsdp.with_full_weights(base, shared_prompt.scores, member.head, batch.branches)
                    loss = counts * ranking_loss(
                        score, batch, settings, ahead=ahead, num_pairs=num_pairs, num_questions=len(chosen)
                    )
                    loss.backward()
                sums["loss"] += loss.item()
                sums["accuracy"] += (
                    counts * (score[batch.chosen] > score[batch.rejected]).sum().item() / num_pairs
                )
        line = {
            name: total / len(model.members)
            for name, total in zip(sums, distributed.all_reduce([*sums.values()]), strict=True)
        }
        line |= {"grad_norm": training.update(line["loss"]), "learning_rate": training.rate(step)}

        # 4. The held-out loss now and then, which says which weights are kept.
        if step + 1 in training.looks:
            tuning.model.eval()
            rewards = answer_rewards(
                model._replace(caution=0.0), held_out, collate, most, told=run.phase("held-out answers")
            )
            line["held_out_loss"] = reward_evaluation.held_out_loss(
                reward_evaluation.pairs_of(held_out), rewards, ahead=ahead
            )
            training.judged(step + 1, line["held_out_loss"])
        run.log(step + 1, training.plan.total, **line)
        training.save(step + 1, every=run.machine.checkpoint_steps)

    # 5. The artifact: the weights that are kept, normalisation and probes, and what can be said of the model.
    training.conclude()
    training_setup.tell_peak(device)
    tuning.model.eval()
    tuning.save(run.artifact)
    reference, attacked = reward_tests.read(job, run, pair_tables.encoder_of(job.text, tokenizer))
    model = _comparable(model, reference, tokenizer.pad_token_id, device, run)
    held_rewards, held_pairs = (
        answer_rewards(model, held_out, collate, most, told=run.phase("held-out answers")),
        reward_evaluation.pairs_of(held_out),
    )
    metrics = {
        "reward.held_out_loss": reward_evaluation.held_out_loss(held_pairs, held_rewards, ahead=ahead),
        "reward.best_step": training.best.step,
    }
    if settings.probe:
        run.note(MEASURES, {"probe": training.told})
        metrics |= probe_start.metrics(training.told)
    together = reward_evaluation.fit_baseline_rules(reward_evaluation.pairs_of(questions))
    rewards, of = held_rewards, held_pairs
    if measured.unseen:
        rewards, of = (
            answer_rewards(model, measured.questions, collate, most, told=run.phase("evaluation answers")),
            reward_evaluation.pairs_of(measured.questions),
        )
    check_finite(
        {"the reward of held-out answers": held_rewards, "the reward of evaluation answers": rewards}
    )
    calibrated = reward_evaluation.calibrate(
        of,
        rewards,
        fitted_on=reward_evaluation.margins(held_pairs, held_rewards) if measured.unseen else None,
    )
    metrics |= _report(of, rewards, ahead, together, calibrated, run)
    run.note(MEASURES, {"measured": measured.record})
    metrics |= reward_tests.normalise(model, reference, tokenizer.pad_token_id, device, run)
    metrics |= reward_tests.attack(model, attacked, encoder, device, run) | encoder.metrics("reward")
    run.warnings += encoder.warnings()
    pairs_trained = sum(len(c.pairs) for c in questions)
    run.finish(
        metrics,
        questions=len(questions),
        pairs=pairs_trained,
        steps=training.plan.total,
        measured=measured.record,
    )


def _comparisons(job: RewardJob, run: Run, encoder: Encoder) -> tuple[list[Comparison], list[Comparison]]:
    """Questions to train on, and held-out ones. Raises InputError."""
    settings = job.reward
    if settings.comparisons == "pairs":
        texts = pair_tables.texts_of(run.inputs["data"] / "reward.parquet")
    else:
        rows = pq.read_table(
            run.inputs["data"] / "reward_groups.parquet", columns=comparisons.RANKING_COLUMNS
        ).to_pylist()
        texts = comparisons.from_rankings(rows, most_answers=settings.max_answers)
    training, held_out = comparisons.hold_out(
        pair_tables.encode(run, texts, encoder), share=settings.held_out_share, seed=job.seed
    )
    if not training or not held_out:
        raise InputError(
            "The reward split has fewer than two questions with pairs: raise data.reward_share or give more data."
        )
    return training, held_out


def _members(job: RewardJob, run: Run, base: PreTrainedModel) -> tuple[Trainable, Scorer]:
    """What is trained, all members together, and the reward model that it makes."""
    folder, shard = run.inputs["model"], run.machine.of("reward").shard
    begin = partial(
        training_setup.tuning,
        folder=folder,
        fingerprint=fingerprint.compute_fingerprint(folder, base),
        shard=shard,
    )
    tunings: list[Trainable] = []
    members: list[Member] = []
    for number in range(job.reward.members):
        seeds.seed_step(seeds.mix(job.seed, number) if number else job.seed, 0)
        under = tunings[-1].model if tunings else base
        tunings.append(begin(job.reward, under, f"reward{number or ''}"))
        head = lora.new_head(base.config.hidden_size).to(base.device)
        head.bias.requires_grad_(False)  # pairs say nothing about an offset
        members.append(Member(tunings[-1].active, head))
    groups: list[dict[str, nn.Parameter]] = []
    for number, (tuning, member) in enumerate(zip(tunings, members, strict=True)):
        assert isinstance(member.head.weight, nn.Parameter)
        groups.append({**tuning.parameters, f"score{number or ''}.weight": member.head.weight})
    parameters = {name: parameter for group in groups for name, parameter in group.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)  # a new adapter freezes those before it

    def save(artifact: Path, **_: object) -> None:
        for number, (tuning, member) in enumerate(zip(tunings, members, strict=True)):
            tuning.save(artifact, number=number, score=member.head.weight)

    return tunings[-1]._replace(parameters=parameters, save=save, apart=tuple(map(tuple, groups))), Scorer(
        tuple(members), job.reward.uncertainty_penalty
    )


def ranking_loss(
    score: Tensor, batch: Batch, settings: Reward, *, num_pairs: int, num_questions: int, ahead: float = 0.0
) -> Tensor:
    """Loss of some pairs as a part of the step's: over all ``num_pairs`` of it, or each question's mean over its ``num_questions``. score (S,).

    ``ahead`` is what the older answer of a pair has before its reward.
    """
    chosen, rejected = score[batch.chosen], score[batch.rejected]
    loss = losses.pairwise_loss(chosen, rejected, settings.margin * batch.gap - ahead * batch.older)
    if settings.centring:
        loss = loss + settings.centring * losses.centring_penalty(chosen, rejected)
    return loss.sum() / num_pairs if settings.weigh == "pairs" else (loss * batch.share).sum() / num_questions


def answer_rewards(
    model: Scorer,
    questions: list[Comparison],
    collate: Callable[[list[Comparison]], Batch],
    most: int = 128,
    *,
    told: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The reward of every answer of some questions, (S,) float32; ``most`` answers at a time."""
    parts = comparisons.micro_batches(questions, most)
    return torch.cat(
        distributed.map_over_ranks(
            parts, lambda part: reward_model.rewards(model, collate(part).branches).cpu(), told=told
        )
    )


def _report(
    judged: reward_evaluation.Pairs,
    rewards: Tensor,
    ahead: float,
    together: Tensor,
    calibrated: reward_evaluation.Calibration,
    run: Run,
) -> dict[str, Any]:
    """Return metrics of the pairs that are reported on; all that was measured goes to measures.json."""
    found = reward_evaluation.accuracies(judged, rewards, ahead=ahead, together=together)
    run.note(
        MEASURES,
        {"accuracy": reward_evaluation.to_json(found), "calibration": reward_evaluation.to_json(calibrated)},
    )
    run.note(reward_model.RECORD, {"temperature": calibrated.temperature, "head_start": ahead})
    votes = pair_accuracy.wider_interval(found["votes"])
    if votes.low <= 0.5:
        run.warn(
            f"The reward model orders {votes.value:.0%} of {votes.n} pairs that it did not learn from as the votes do, which is not distinguishable "
            "from guessing: a policy trained against it learns noise. Train it longer or on more pairs."
        )
    for rule, told in (("longer_wins", "the longer answer wins"), ("older_wins", "the older answer wins")):
        if f"over_{rule}" in found and found[f"over_{rule}"].high < 0:
            run.warn(
                f'The reward model orders pairs that it did not learn from worse than the rule "{told}" does: train it longer, on more pairs, or '
                "on a larger base."
            )
    if calibrated.reason:
        run.warn(
            f"No temperature was fitted to the reward model's margins, because {calibrated.reason}; probabilities are taken as they are."
        )
    rules = ("longer_wins", "older_wins", "rules_together")
    named = [
        "votes",
        "length_matched",
        "knowing_age",
        *(f"{beside}{rule}" for beside in ("", "over_", "knowing_age_over_") for rule in rules),
    ]
    metrics: dict[str, Any] = {
        f"reward_accuracy.{name}": reward_evaluation.single_interval(found[name])._asdict()
        for name in named
        if name in found
    }
    metrics |= {"reward.length_correlation": found["reward_and_length"]._asdict()}
    metrics |= {
        "reward.ece": calibrated.after,
        "reward.ece_uncalibrated": calibrated.before,
        "reward.ece_floor": calibrated.floor,
    }
    return metrics | ({} if calibrated.reason else {"reward.temperature": calibrated.temperature})


def _comparable(model: Scorer, reference: Encoded, pad_id: int, device: torch.device, run: Run) -> Scorer:
    """An ensemble whose members' rewards have one origin and one scale; a single model stays as it is."""
    if len(model.members) == 1:
        return model
    members = []
    for member in model.members:
        alone = model._replace(members=(member,))
        scores = reward_tests.reference_rewards(
            alone, reference, pad_id, device, run=run, phase="reference answers of each member"
        )
        members.append(
            member._replace(
                mean=scores.mean().item(), std=max(scores.std().item(), 1e-6) if len(scores) > 1 else 1.0
            )
        )
    return model._replace(members=tuple(members))


if __name__ == "__main__":
    main(train, RewardJob, among=distributed.process_group)
