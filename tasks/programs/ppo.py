"""Train a policy with policy gradients against the reward model: PPO, RLOO or GRPO (``ppo.algorithm``).

python -m tasks.programs.ppo DIR

inputs: data, model (the merged SFT model), reward; text, if a file of it is mixed in; start, a policy to go
    on from
artifact: adapter/ (the policy), critic/ (a SEQ_CLS adapter; of PPO alone), samples.jsonl, summary.json

A KL penalty holds the policy near the SFT model. Policy, reference, critic and reward model are adapters of
one copy of it. RLOO and GRPO have no critic: an answer is compared with others to the same prompt.

Deviations from Ouyang et al. 2022: LoRA instead of full weights, advantages whitened over the rollout batch
and not per mini-batch, a pretraining mix (PPO-ptx) only if ``ppo.ptx`` asks for it.
"""

import random
from functools import partial

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from tasks.config.jobs import PpoJob
from tasks.config.sections.ppo import Ppo
from tasks.dataset import row_sample
from tasks.programs.ppo_stage.estimate_advantages import estimate_advantages
from tasks.programs.ppo_stage.guard_report import write_report
from tasks.programs.ppo_stage.guards import Guards
from tasks.programs.ppo_stage.independent_score import build_score
from tasks.programs.ppo_stage.load_models import TOLERANCE, load_models, load_policy
from tasks.programs.ppo_stage.pretraining_mix import load_text_mix
from tasks.programs.ppo_stage.reward_mix import UNTOUCHED, RewardMix, load_reward_mix
from tasks.programs.ppo_stage.rollout_checks import RolloutChecks
from tasks.programs.ppo_stage.step_metrics import ROLLOUT_FIGURES, rollout_figures, step_metrics, text_metrics
from tasks.programs.ppo_stage.text_guard import describe_rollout
from tasks.programs.ppo_stage.update_policy import update_policy
from tasks.programs.runtime import pair_tables, table_rows, training_setup
from tasks.programs.runtime.program import Run, main
from tasks.programs.runtime.training_samples import TrainingSampler
from tasks.programs.token_tables.prompts import Prompt, find_chats, read_rl_split
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.algorithms import rewards, schedules
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, distributed, seeds
from tasks.rlhf.models import loading, lora
from tasks.rlhf.training.finite_checks import check_finite, check_weights
from tasks.rlhf.training.ppo_state import create_optimizers, restore_state, save_state
from tasks.rlhf.training.rollouts import (
    PPO_DIVERGED,
    PpoModels,
    Rollout,
    check_rollout,
    gather_rollout,
    kl_estimates,
    roll_out,
)
from tasks.system import torchrun
from tasks.system.errors import InputError

ENOUGH_ENDED = 0.5  # share of the sampled answers


def train(job: PpoJob, run: Run) -> None:
    """Optimise the policy against the reward model."""
    settings, machine = job.ppo, run.machine
    device = devices.set_up(machine.device, machine.threads)

    if settings.rollouts < distributed.world():
        raise InputError(
            f"ppo.rollouts={settings.rollouts} cannot be shared by {distributed.world()} processes: "
            "raise it, or start fewer."
        )

    # 1. Prompts; policy = reference = SFT model, critic = reward model; or the checkpoint's. A policy to
    # go on from is loaded once the SFT model has been checked and measured.
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    questions, held_out = read_questions(job, run, encoder)
    models = load_models(job, run, device)
    optimizers = create_optimizers(models)
    start, state, good = restore_state(run.checkpoints, models, optimizers)
    mix = load_reward_mix(job, run, encoder, models, state, device)
    tolerance = TOLERANCE[models.model.dtype]
    frozen = [*models.frozen, *mix.frozen()]
    checks = RolloutChecks(job, models, encoder, frozen, state, tolerance=tolerance)
    kl_coefficient = state.get("kl_coefficient", settings.kl_coefficient)
    distributed.check_equal(start, "checkpoints")
    run.rewind(start)
    score = build_score(job, run, models, encoder, mix, held_out, state)
    guards = Guards(settings, models, state, good, score)
    text = load_text_mix(job, run, tokenizer, models, state)
    if "start" in run.inputs and start == 0:
        rollout = sample_rollout(job, models, questions, encoder, mix, step=0, is_checked=True, device=device)
        checks.check(rollout, 0)
        guards.start(describe_rollout(rollout, encoder))
        load_policy(run.inputs["start"], models)
        checks.expect_trained()
    sampler = start_sampler(job, run, tokenizer, models, mix)
    sampler(start)

    for step in run.interruptions.during(range(start, settings.steps), distributed.all_reduce):
        # 2. Sample an answer to each prompt of the batch and score it; is it still sound text?
        rollout = sample_rollout(
            job, models, questions, encoder, mix, step=step, is_checked=step == start, device=device
        )
        checks.check(rollout, step + 1)
        kl = kl_estimates(rollout)
        statistics, figures = describe_rollout(rollout, encoder), rollout_figures(rollout, kl)
        if alarm := guards.check(step + 1, statistics, figures):
            kl_coefficient = guards.raise_weight(kl_coefficient)
            if alarm.action in ("roll_back", "stop"):  # nothing is learnt from this batch
                guards.restore(optimizers)
                sampler(step + 1, is_last=alarm.action == "stop")
                figures |= {"kl_coefficient": kl_coefficient, **text_metrics(statistics), **guards.metrics}
                run.log(step + 1, settings.steps, **figures, **mix.metrics())
                if alarm.action == "stop":
                    break
                continue

        # 3. Rewards at every token, advantages, returns.
        advantages, returns = estimate_advantages(rollout, settings, kl_coefficient=kl_coefficient)
        check_finite(
            {"the advantage": advantages[rollout.batch.response_mask]}, step=step + 1, advice=PPO_DIVERGED
        )

        # 4. Several passes over the batch, each in a fresh order.
        rate = schedules.learning_rate(
            step, peak=settings.learning_rate, total=settings.steps, warmup=0, shape="linear"
        )
        optimizers.set_learning_rate(rate)
        updates = update_policy(
            models,
            optimizers,
            rollout,
            advantages,
            returns,
            settings,
            step=step + 1,
            kl_coefficient=kl_coefficient,
            micro_batch=machine.micro_batch,
            tolerance=tolerance if step == start else None,
            text=text,
        )
        check_weights(models.trained, step=step + 1)

        # 5. Now and then a sample; metrics, the controller of the KL penalty, a checkpoint.
        sampler(step + 1)
        metrics = step_metrics(
            rollout, returns, updates, kl=kl, kl_coefficient=kl_coefficient, group_size=settings.group_size
        )
        guards.observe(metrics)
        metrics |= {**mix.metrics(), **text_metrics(statistics), **guards.metrics}
        run.log(step + 1, settings.steps, **metrics)
        kl_coefficient = adapt_kl_coefficient(kl_coefficient, kl["kl"], settings)
        if run.interruptions.wants_checkpoint() or (step + 1) % max(1, machine.checkpoint_steps // 10) == 0:
            state = {"kl_coefficient": kl_coefficient, **guards.state(), **mix.state(), **checks.state()}
            state |= {"text_norms": text.norms} if text else {}
            save_state(run.checkpoints, step + 1, models, optimizers, state, good=guards.good)

    # 6. The artifact: the last weights or the best ones; frozen weights must be unchanged.
    guards.finish(settings.steps)
    checks.check_end()
    distributed.barrier()  # the first rank may still be writing metrics and the checkpoint
    save_artifact(run, models)
    warn_of_missing_ends(run, max_answer_tokens=job.text.max_answer_tokens)
    run.warnings += [*encoder.warnings(), *mix.warnings(), *checks.warnings()]
    scores = write_report(guards, run, settings.steps)
    last = guards.good_figures if guards.has_returned else run.last()
    shown = {f"ppo.rollout_{name}": last[name] for name in ROLLOUT_FIGURES}
    run.finish(shown | scores | encoder.metrics("ppo"), prompts=len(questions))


def start_sampler(
    job: PpoJob,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    models: PpoModels,
    mix: RewardMix,
) -> TrainingSampler:
    """Return the sampler of the policy's answers for people."""
    return TrainingSampler(
        job,
        run,
        tokenizer,
        policy=partial(lora.active, models.model, "policy"),
        reference=partial(lora.active, models.model, None),
        score=mix,
        total=job.ppo.steps,
        is_sharded=training_setup.is_sharded(run, "ppo"),
    )


def sample_rollout(
    job: PpoJob,
    models: PpoModels,
    questions: TokenTable[Prompt],
    encoder: Encoder,
    mix: RewardMix,
    *,
    step: int,
    is_checked: bool,
    device: torch.device,
) -> Rollout:
    """Return the answers of step ``step`` (from 0), of which each rank samples a part.

    Raises InputError if a figure of them is not finite.
    """
    settings, most = job.ppo, job.text.max_answer_tokens
    seeds.seed_step(job.seed, step + 1)
    uniform = torch.rand(settings.rollouts, most, dtype=torch.float64)  # those of a row on any rank
    indices = schedules.batch_indices(
        step, num_rows=len(questions), batch_size=settings.rollouts // settings.group_size, seed=job.seed
    )
    rows = distributed.rank_slice([i for i in indices for _ in range(settings.group_size)])
    asked = [questions[i] for i in rows]
    own = roll_out(
        models,
        [prompt.ids for prompt in asked],
        uniform=distributed.rank_slice(uniform),
        max_tokens=most,
        temperature=settings.temperature,
        end_ids=prompts.end_tokens(encoder.tokenizer, job.text.template),
        pad_id=encoder.tokenizer.pad_token_id,
        score_rule=UNTOUCHED,
        device=device,
        is_checked=is_checked,
        engine_seed=None if settings.sampler == "plain" else seeds.mix(job.seed, step + 1, torchrun.rank()),
    )
    rollout = gather_rollout(mix.rescore(own, [prompt.question for prompt in asked], find_chats(asked)))
    check_rollout(rollout, step + 1)
    return rollout


def adapt_kl_coefficient(coefficient: float, kl: float, settings: Ppo) -> float:
    """Return the weight of the KL penalty for the next step: adapted to ``kl_target``, if one is set."""
    if settings.kl_target is None:
        return coefficient
    return rewards.adapt_kl_coefficient(
        coefficient,
        kl,
        target=settings.kl_target,
        horizon=settings.kl_horizon,
        num_rollouts=settings.rollouts,
    )


def save_artifact(run: Run, models: PpoModels) -> None:
    """Write the policy, and the critic if there is one. Of several processes the first writes."""
    if not distributed.is_first():
        return
    lora.save(models.model, "policy", run.artifact / "adapter", base=models.base)
    if models.value_head is not None:
        score = models.value_head.weight
        lora.save(models.model, "critic", run.artifact / "critic", base=models.base, score=score)


def warn_of_missing_ends(run: Run, *, max_answer_tokens: int) -> None:
    """Warn if most sampled answers were cut off, so that the reward model never scored them."""
    if (ended := run.mean("ended")) < ENOUGH_ENDED:
        run.warn(
            f"Only {ended:.0%} of the sampled answers ended within text.max_answer_tokens = "
            f"{max_answer_tokens}; every other "
            "one got ppo.missing_eos_reward instead of a score. Raise text.max_answer_tokens or fine-tune "
            "longer."
        )


def read_questions(
    job: PpoJob, run: Run, encoder: Encoder
) -> tuple[TokenTable[Prompt], list[tuple[int, str]]]:
    """Return the RL split's questions in an order drawn from the seed, and those, as id and text, that are
    left out for the independent score.

    ``encoder`` gets the messages of the latter that are conversations. Raises InputError if there are none.
    """
    table = run.inputs["data"] / "rl.parquet"
    ids = pq.read_table(table, columns=["question_id"])["question_id"].to_pylist()
    count = job.ppo.score.prompts if job.ppo.score.by else 0
    if count > len(ids) // 2:
        raise InputError(
            f"ppo.score.prompts={count} would leave PPO less than half of the {len(ids)} prompts of "
            "the rl split: lower it, raise data.rl_share, or set ppo.score.by to null."
        )
    places = sorted(row_sample.draw_sample(ids, count))
    held_out = table_rows.read_rows(table, places, ["question_id", "prompt", "messages"])
    encoder.chats = table_rows.chats_of(held_out)
    rows = sorted(set(range(len(ids))) - set(places))
    if not rows:
        raise InputError("The rl split has no prompts: raise data.rl_share or give more data.")
    random.Random(job.seed).shuffle(rows)
    questions = read_rl_split(run, encoder, rows=rows)
    return questions, [(row["question_id"], row["prompt"]) for row in held_out]


if __name__ == "__main__":
    main(train, PpoJob, among=distributed.process_group)
