"""Test the finished reward model on best answers of the fine-tuning split.

Normalise it, store probes, and hold worthless answers against real ones.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import RewardJob
from tasks.dataset import row_sample
from tasks.programs.runtime import table_rows
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute.seeds import mix
from tasks.rlhf.evaluation import hard_negatives, red_team, reward_evaluation
from tasks.rlhf.evaluation.answer_scores import Answer, score_answers
from tasks.rlhf.evaluation.red_team import AttackResult
from tasks.rlhf.models import reward_model
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.rlhf.thresholds import FOOLED
from tasks.rlhf.training.finite_checks import check_finite

REFERENCE_ANSWERS = 512  # best answers whose rewards set the normalisation
PROBES = 8  # of them, stored with their scores so that users of the model can check that it computes the same
BATCH_SIZE = 64  # answers at a time
MEASURES = "measures.json"


def read_answers(job: RewardJob, run: Run, encoder: Encoder) -> tuple[list[Answer], list[Answer]]:
    """Return the answers that set the normalisation, and those that worthless ones are held against.

    Questions are drawn by their ids, and ``encoder`` gets the messages of those that are conversations. The
    second all have an end token: PPO scores no others.
    """
    table, columns = run.inputs["data"] / "finetune.parquet", ["prompt", "answer", "messages"]
    ids = pq.read_table(table, columns=["question_id"])["question_id"].to_pylist()
    count = max(REFERENCE_ANSWERS, job.reward.red_team_answers)
    rows = table_rows.read_rows(table, row_sample.draw_sample(ids, count), columns)
    encoder.chats = table_rows.chats_of(rows)
    report_progress = run.phase("tokenising reference answers")
    answers: list[Answer] = []
    for number, row in enumerate(rows, 1):
        answers.append((encoder.encode_prompt(row["prompt"]), encoder.encode_answer(row["answer"])))
        report_progress(number, len(rows))
    end_ids = prompts.end_tokens(encoder.tokenizer, encoder.template)
    ended = [(prompt, answer) for prompt, answer in answers if answer[-1] in end_ids]
    reference = ended if len(ended) > 1 else answers
    return reference[:REFERENCE_ANSWERS], ended[: job.reward.red_team_answers]


def reference_rewards(
    model: Scorer, answers: list[Answer], pad_id: int, device: torch.device, *, run: Run, phase: str
) -> Tensor:
    """Return the reward of each answer, (N,) float32. Raises InputError if one is not finite."""
    rewards = score_answers(
        partial(reward_model.rewards, model),
        answers,
        pad_id=pad_id,
        device=device,
        batch_size=BATCH_SIZE,
        report_progress=run.phase(phase),
    )
    check_finite({f"the reward of {phase}": rewards})
    return rewards


def mean_and_std(rewards: Tensor) -> tuple[float, float]:
    """Return the normalisation that some rewards (N,) set; the deviation of a single one is 1."""
    return rewards.mean().item(), max(rewards.std().item(), 1e-6) if len(rewards) > 1 else 1.0


def standardise_members(
    model: Scorer, reference: list[Answer], pad_id: int, device: torch.device, run: Run
) -> Scorer:
    """Return an ensemble whose members' rewards have one origin and one scale.

    A single model stays unchanged.
    """
    if len(model.members) == 1:
        return model
    members = []
    for member in model.members:
        alone = model._replace(members=(member,))
        phase = "reference answers of each member"
        mean, std = mean_and_std(reference_rewards(alone, reference, pad_id, device, run=run, phase=phase))
        members.append(member._replace(mean=mean, std=std))
    return model._replace(members=tuple(members))


def normalise(
    model: Scorer, answers: list[Answer], pad_id: int, device: torch.device, run: Run
) -> dict[str, float]:
    """Write the mean and deviation of the rewards of reference answers, and probes, to reward.json.

    Return them as metrics.
    """
    rewards = reference_rewards(model, answers, pad_id, device, run=run, phase="reference answers")
    mean, std = mean_and_std(rewards)
    probes = [
        {"prompt": prompt, "answer": answer, "score": score}
        for (prompt, answer), score in zip(answers[:PROBES], rewards.tolist(), strict=False)
    ]
    record = {
        "mean": mean,
        "std": std,
        "probes": probes,
        "members": len(model.members),
        "caution": model.uncertainty_penalty,
        "apart": [(member.mean, member.std) for member in model.members],
    }
    run.note(reward_model.RECORD, record)
    return {"reward.mean": mean, "reward.std": std}


def normalise_held_out(
    spare: Sequence[Member], answers: list[Answer], pad_id: int, device: torch.device, run: Run
) -> None:
    """Write the mean and deviation of the rewards of the member that PPO never sees, if any."""
    for member in spare:
        alone = Scorer((member,), 0.0)
        rewards = reference_rewards(alone, answers, pad_id, device, run=run, phase="reference answers")
        mean, std = mean_and_std(rewards)
        run.note(reward_model.RECORD, {reward_model.HELD_OUT: {"mean": mean, "std": std}})


def attack(
    model: Scorer, ended: list[Answer], encoder: Encoder, device: torch.device, run: Run
) -> dict[str, Any]:
    """Compare the rewards of worthless answers with those of real ones.

    Record and warn of what they show, return it as metrics.
    """
    verdicts: dict[str, AttackResult] = {}
    metrics: dict[str, Any] = {}
    if len(ended) > 1:
        prompt_ids, answer_ids = map(list, zip(*ended, strict=True))
        worthless = red_team.build_all_attacks(
            prompt_ids,
            answer_ids,
            tokenizer=encoder.tokenizer,
            template=encoder.template,
            max_answer_tokens=encoder.max_answer_tokens,
        )
        texts = list(ended)
        for answers in worthless.values():
            texts += zip(prompt_ids, answers, strict=True)
        pad_id = encoder.tokenizer.pad_token_id
        rewards = reference_rewards(model, texts, pad_id, device, run=run, phase="attacks")
        real, *others = rewards.split(len(ended))
        attacked = dict(zip(worthless, others, strict=True))
        verdicts = red_team.evaluate_attacks(real, attacked)
        elsewhere = red_team.correlation_with_unrelated(real, attacked["unrelated"])
        run.note(MEASURES, {"elsewhere": reward_evaluation.to_json(elsewhere)})
        metrics["reward.elsewhere_correlation"] = elsewhere._asdict()
    _warn(verdicts, run)
    run.note(MEASURES, {"attacks": reward_evaluation.to_json(verdicts)})
    run.note(reward_model.RECORD, {"fooled": [name for name, verdict in verdicts.items() if verdict.failed]})
    worst = max((verdict.wins for verdict in verdicts.values()), default=None)
    return metrics | {"reward.worst_attack": worst._asdict() if worst else 0.0}


def measure_copying(
    model: Scorer, ended: list[Answer], encoder: Encoder, device: torch.device, run: Run
) -> dict[str, Any]:
    """Compare real answers with the same ones with a wrong name copied from the question; return the metric.

    It is no attack: such an answer is nearly right, so no limit and no gate holds for it. Nothing is measured
    if fewer than two answers copy a name.
    """
    pairs = _copy_wrong_names(ended, encoder)
    if len(pairs) < 2:
        return {}
    texts = [real for real, _ in pairs] + [wrong for _, wrong in pairs]
    pad_id = encoder.tokenizer.pad_token_id
    rewards = reference_rewards(model, texts, pad_id, device, run=run, phase="answers with a wrong name")
    real, wrong = rewards.split(len(pairs))
    result = red_team.evaluate_attacks(real, {"wrong_name": wrong})["wrong_name"]
    figures = {"wins": result.wins, "margin": result.margin}
    run.note(MEASURES, {"copying": {"wrong_name": reward_evaluation.to_json(figures)}})
    return {"reward.wrong_name": result.wins._asdict()}


def _copy_wrong_names(ended: list[Answer], encoder: Encoder) -> list[tuple[Answer, Answer]]:
    """Return the real answers that copy a name, each with the answer that has another name in its place."""
    tokenizer, template = encoder.tokenizer, encoder.template
    texts = [hard_negatives.decode_texts(tokenizer, *answer, template=template) for answer in ended]
    names = hard_negatives.find_names(texts)
    pairs = []
    for number, (answer, text) in enumerate(zip(ended, texts, strict=True)):
        wrong = hard_negatives.encode_with_wrong_name(
            tokenizer,
            text,
            names,
            draw=mix(number),
            template=template,
            max_answer_tokens=encoder.max_answer_tokens,
        )
        if wrong is not None:
            pairs.append((answer, (answer[0], wrong)))
    return pairs


def _warn(verdicts: Mapping[str, AttackResult], run: Run) -> None:
    limit = f"{FOOLED:.0%}"
    if fooled := [name for name, verdict in verdicts.items() if verdict.failed]:
        run.warn(
            f"The reward model is fooled: answers that are worth nothing ({', '.join(fooled)}) out-score "
            f"more than {limit} of "
            "the real ones, and PPO finds such answers. Train on more pairs, or set "
            "ppo.allow_exploitable=false to stop before PPO."
        )
    if unclear := [name for name, verdict in verdicts.items() if verdict.unclear]:
        count = next(iter(verdicts.values())).wins.n
        run.warn(
            f"Whether answers that are worth nothing ({', '.join(unclear)}) out-score more than {limit} of "
            "the real ones, "
            f"{count:,} answers cannot tell: raise reward.red_team_answers (the reward model is trained "
            "again), or give more data."
        )
