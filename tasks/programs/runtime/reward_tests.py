"""The finished reward model on best answers of the fine-tuning split: its normalisation and probes, and worthless answers held against real ones."""

from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import RewardJob
from tasks.dataset import row_sample
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import prompts, sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import distributed
from tasks.rlhf.evaluation import red_team, reward_evaluation
from tasks.rlhf.evaluation.red_team import AttackResult
from tasks.rlhf.models import reward_model
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.thresholds import FOOLED
from tasks.rlhf.training.finite_checks import check_finite

REFERENCE_ANSWERS = 512  # best answers whose reward gives the normalisation
PROBES = (
    8  # of them, whose scores are stored so that users of the adapter can check that it computes the same
)
ROWS = 64  # answers at a time
MEASURES = "measures.json"

Encoded = list[tuple[list[int], list[int]]]  # prompt and answer ids


def read(job: RewardJob, run: Run, encoder: Encoder) -> tuple[Encoded, Encoded]:
    """Return the answers that normalise, and those that are attacked, which all end; some questions drawn by their ids."""
    table = pq.read_table(
        run.inputs["data"] / "finetune.parquet", columns=["question_id", "prompt", "answer"]
    )
    wanted = max(REFERENCE_ANSWERS, job.reward.red_team_answers)
    rows = table.take(row_sample.draw_sample(table["question_id"].to_pylist(), wanted)).to_pylist()
    told, everything = run.phase("tokenising reference answers"), []
    for number, row in enumerate(rows, 1):
        everything.append((encoder.prompt(row["prompt"]), encoder.answer(row["answer"])))
        told(number, len(rows))
    ends = prompts.end_tokens(encoder.tokenizer, encoder.template)
    ended = [(p, a) for p, a in everything if a[-1] in ends]  # PPO scores no other
    enough = ended if len(ended) > 1 else everything
    return enough[:REFERENCE_ANSWERS], ended[: job.reward.red_team_answers]


def reference_rewards(
    model: Scorer, answers: Encoded, pad_id: int, device: torch.device, *, run: Run, phase: str
) -> Tensor:
    """Reward of each (prompt, answer), (N,) float32. Raises InputError if one is not finite."""

    def score(part: Encoded) -> Tensor:
        prompt_ids, answer_ids = map(list, zip(*part, strict=True))
        return reward_model.rewards(
            model, sequences.join(prompt_ids, answer_ids, pad_id=pad_id, device=device)
        ).cpu()

    order = sorted(range(len(answers)), key=lambda place: sum(map(len, answers[place])))  # little padding
    parts = [
        [answers[place] for place in order[first : first + ROWS]] for first in range(0, len(order), ROWS)
    ]
    found = torch.cat(distributed.map_over_ranks(parts, score, told=run.phase(phase)))
    check_finite({f"the reward of {phase}": found})
    return found[torch.tensor(order).argsort()]


def normalise(
    model: Scorer, answers: Encoded, pad_id: int, device: torch.device, run: Run
) -> dict[str, float]:
    """Store the mean and deviation of the rewards of reference answers, and probes; return them as metrics."""
    scores = reference_rewards(model, answers, pad_id, device, run=run, phase="reference answers")
    probes = [
        {"prompt": p, "answer": a, "score": s}
        for (p, a), s in zip(answers[:PROBES], scores.tolist(), strict=False)
    ]
    mean, std = scores.mean().item(), max(scores.std().item(), 1e-6) if len(scores) > 1 else 1.0
    record: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "probes": probes,
        "members": len(model.members),
        "caution": model.caution,
    }
    run.note(reward_model.RECORD, record | {"apart": [(member.mean, member.std) for member in model.members]})
    return {"reward.mean": mean, "reward.std": std}


def attack(model: Scorer, ended: Encoded, encoder: Encoder, device: torch.device, run: Run) -> dict[str, Any]:
    """Hold worthless answers against real ones, store and warn of what they show; return it as metrics."""
    verdicts: dict[str, AttackResult] = {}
    metrics: dict[str, Any] = {}
    if len(ended) > 1:
        prompt_ids, answer_ids = map(list, zip(*ended, strict=True))
        bad = red_team.build_all_attacks(
            prompt_ids,
            answer_ids,
            tokenizer=encoder.tokenizer,
            template=encoder.template,
            max_answer_tokens=encoder.max_answer_tokens,
        )
        texts = [*ended, *(pair for some in bad.values() for pair in zip(prompt_ids, some, strict=True))]
        pad_id = encoder.tokenizer.pad_token_id
        scores = reference_rewards(model, texts, pad_id, device, run=run, phase="attacks")
        real, *others = scores.split(len(ended))
        attacked = dict(zip(bad, others, strict=True))
        verdicts = red_team.evaluate_attacks(real, attacked)
        elsewhere = red_team.correlation_with_unrelated(real, attacked["unrelated"])
        run.note(MEASURES, {"elsewhere": reward_evaluation.to_json(elsewhere)})
        metrics["reward.elsewhere_correlation"] = elsewhere._asdict()
    _warn(verdicts, run)
    run.note(MEASURES, {"attacks": reward_evaluation.to_json(verdicts)})
    run.note(reward_model.RECORD, {"fooled": [name for name, verdict in verdicts.items() if verdict.failed]})
    worst = max((verdict.wins for verdict in verdicts.values()), default=None)
    return metrics | {"reward.worst_attack": worst._asdict() if worst else 0.0}


def _warn(verdicts: dict[str, AttackResult], run: Run) -> None:
    limit = f"{FOOLED:.0%}"
    if fooled := [name for name, verdict in verdicts.items() if verdict.failed]:
        run.warn(
            f"The reward model is fooled: answers that are worth nothing ({', '.join(fooled)}) out-score more than {limit} of "
            "the real ones, and PPO finds such answers. Train on more pairs, or set ppo.allow_exploitable=false to stop before PPO."
        )
    if unclear := [name for name, verdict in verdicts.items() if verdict.unclear]:
        count = next(iter(verdicts.values())).wins.n
        run.warn(
            f"Whether answers that are worth nothing ({', '.join(unclear)}) out-score more than {limit} of the real ones, "
            f"{count:,} answers cannot tell: raise reward.red_team_answers (the reward model is trained again), or give more data."
        )
