"""Let every policy answer held-out questions, and judge the answers.

python -m tasks.programs.winrate DIR

inputs: data, model (the merged SFT model), reward; ppo and dpo, if they were trained
artifact: samples.parquet (questions, answers, scores side by side), results.json, summary.json

Judges are the reward model and, on the built-in site, the gold scorer.
"""

import hashlib
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import WinrateJob
from tasks.dataset import row_sample
from tasks.demo_site import gold
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import ReportProgress, Run, main, to_json
from tasks.rlhf.algorithms import rewards
from tasks.rlhf.batches import prompts, sampling, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.evaluation import intervals, win_rates
from tasks.rlhf.evaluation.answer_scores import Answer, score_answers
from tasks.rlhf.models import fingerprint, loading, lora, reward_model, trainable
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.models.trainable import Active
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite

Scores = dict[str, list[float]]  # of each policy's answers, by the policy's name


def evaluate(job: WinrateJob, run: Run) -> None:
    """Compare the trained policies with the SFT model, each other and the data set's chosen answers."""
    # 1. Questions, the reward model as judge, and the policies. A killed program starts over.
    run.rewind(0)
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    rows = read_questions(run.inputs["data"] / "evaluation.parquet", job.winrate.num_questions)
    judge, policies = load_models(job, run, tokenizer, device)
    encoder = pair_tables.build_encoder(job.text, tokenizer)
    encoded = [encoder.encode_prompt(row["prompt"]) for row in rows]

    # 2. Every policy answers every question; the reward model scores the answers.
    texts = {"chosen": [row["answers"][row["best"]] for row in rows]}
    answers = [encoder.encode_answer(text) for text in texts["chosen"]]
    reward: Scores = {"chosen": judge.scores(encoded, answers, run.phase("scoring chosen answers"))}
    metrics: dict[str, Any] = {}
    sampler = Sampler(job, policies, tokenizer, [row["question_id"] for row in rows], encoded)
    for name in policies:
        answers, kl = sampler.answers(name, run)
        texts[name] = [prompts.decode_answer(tokenizer, ids, template=job.text.template) for ids in answers]
        reward[name] = judge.scores(encoded, answers, run.phase(f"scoring {name}"))
        metrics |= describe_answers(name, answers, kl, sampler.end_ids)

    # 3. Win rates of each pair of policies, by each judge.
    by_judge = {"reward": reward}
    if job.source.kind == "shell-site":
        by_judge["gold"] = {
            name: [gold.gold_score(row["prompt"], text) for row, text in zip(rows, some, strict=True)]
            for name, some in texts.items()
        }
        agreement = gold_agreement(job, run, tokenizer, judge, rows, encoded)
        metrics["reward_accuracy.gold"] = agreement._asdict()
    tallies, win_rate_metrics = compare_policies(by_judge, list(policies))

    # 4. The artifact.
    write_samples(run.artifact / "samples.parquet", rows, texts, by_judge)
    results = {"tallies": tallies, "policies": list(policies), "questions": len(rows)}
    (run.artifact / "results.json").write_text(to_json(results, indent=1))
    run.warnings += encoder.warnings()
    run.finish(metrics | win_rate_metrics | encoder.metrics("winrate"), questions=len(rows))


def read_questions(path: Path, count: int) -> list[dict[str, Any]]:
    """Return at most ``count`` rows of the evaluation split, drawn by their ids, in the table's order."""
    table = pq.read_table(path)
    places = row_sample.draw_sample(table["question_id"].to_pylist(), count)
    rows: list[dict[str, Any]] = table.take(sorted(places)).to_pylist()
    return rows


class Judge(NamedTuple):
    """The reward model, normalised as in PPO."""

    scorer: Scorer
    pad_id: int
    device: torch.device
    batch_size: int

    def scores(
        self, questions: list[list[int]], answers: list[list[int]], report_progress: ReportProgress
    ) -> list[float]:
        """Return the normalised reward of each answer. Raises InputError if one is not finite."""
        pairs: list[Answer] = list(zip(questions, answers, strict=True))
        scores = score_answers(
            self._score,
            pairs,
            pad_id=self.pad_id,
            device=self.device,
            batch_size=self.batch_size,
            report_progress=report_progress,
        )
        return scores.tolist()

    def _score(self, batch: Sequences) -> Tensor:
        scores = reward_model.normalised_rewards(self.scorer, batch)
        check_finite({"the reward model's score": scores}, advice=UNSOUND_MODEL)
        return scores


def load_models(
    job: WinrateJob, run: Run, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Judge, dict[str, Active]]:
    """Return the judge and the policies, adapters on one base.

    Each policy is compared with those before it.
    """
    folder = run.inputs["model"]
    load = partial(loading.load, folder, device=device, precision=job.weights.merged)
    base = load()
    actual, model = fingerprint.compute_fingerprint(folder, base), cast(PreTrainedModel | PeftModel, base)
    if reward_model.is_adapter(run.inputs["reward"]):
        fingerprint.check_fingerprint(run.inputs["reward"] / "adapter", actual, setting="weights.merged")
    model, scorer = reward_model.load(run.inputs["reward"], model, device=device)
    trained: dict[str, Active] = {}
    for name in ("dpo", "ppo"):
        if name in run.inputs:
            model, trained[name] = trainable.load(
                run.inputs[name], model, name, actual=actual, setting="weights.merged", reload_base=load
            )
    sft: Active
    if isinstance(model, PeftModel):
        sft = partial(lora.active, model, None)
    else:
        sft = partial(trainable.unchanged, model)
    judge = Judge(scorer, tokenizer.pad_token_id, device, job.winrate.batch_size)
    return judge, {"sft": sft, **trained}


class Sampler:
    """Samples answers of the policies to the same questions, in batches."""

    def __init__(
        self,
        job: WinrateJob,
        policies: dict[str, Active],
        tokenizer: PreTrainedTokenizerBase,
        question_ids: list[int],
        questions: list[list[int]],
    ) -> None:
        self.seed, self.settings, self.policies = job.seed, job.winrate, policies
        self.max_tokens, self.pad_id = job.text.max_answer_tokens, tokenizer.pad_token_id
        self.end_ids = prompts.end_tokens(tokenizer, job.text.template)
        self.question_ids, self.questions = question_ids, questions

    @torch.no_grad()
    def answers(self, name: str, run: Run) -> tuple[list[list[int]], list[float]]:
        """Return an answer of one policy to each question, and the KL estimate (k1) of each from the SFT
        model, in nats.

        Logs one step per batch, counted over all policies.
        """
        uniform = uniform_numbers(self.seed, name, self.question_ids, self.max_tokens)
        firsts = range(0, len(self.questions), self.settings.batch_size)
        done = [*self.policies].index(name) * len(firsts)
        answers: list[list[int]] = []
        divergences: list[float] = []
        for number, first in enumerate(firsts, 1):
            rows = slice(first, first + self.settings.batch_size)
            new, kl = self._sample(name, self.questions[rows], uniform[rows])
            answers += new
            divergences += kl
            run.log(done + number, len(self.policies) * len(firsts))
        return answers, divergences

    def _sample(
        self, name: str, questions: list[list[int]], uniform: Tensor
    ) -> tuple[list[list[int]], list[float]]:
        temperature = self.settings.temperature
        with self.policies[name]() as policy:
            samples = sampling.sample(
                policy,
                questions,
                max_tokens=self.max_tokens,
                temperature=temperature,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                uniform=uniform,
            )
            answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
            batch = sequences.join(questions, answers, pad_id=self.pad_id, device=policy.device)
            logp = sequences.log_probs(policy, batch, temperature=temperature)
            check_finite({f"{name}'s log-probability of its own answer": logp}, advice=UNSOUND_MODEL)
        if name == "sft":
            return answers, [0.0] * len(answers)
        with self.policies["sft"]() as reference:
            ref_logp = sequences.log_probs(reference, batch, temperature=temperature)
        return answers, rewards.k1(logp - ref_logp).sum(dim=1).tolist()


def uniform_numbers(seed: int, policy: str, question_ids: list[int], num_tokens: int) -> Tensor:
    """Return the numbers that ``policy`` draws its answers by, (Q, num_tokens) float64 in [0, 1).

    They depend on its name and the question alone: not on the other policies, the other questions or the
    device.
    """
    name_seed = int.from_bytes(hashlib.sha256(policy.encode()).digest()[:8])
    rows = []
    for question_id in question_ids:
        generator = torch.Generator().manual_seed(seeds.mix(seed, name_seed, question_id))
        rows.append(torch.rand(num_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def describe_answers(
    name: str, answers: list[list[int]], kl: list[float], end_ids: tuple[int, ...]
) -> dict[str, Any]:
    """Return metrics of a policy's answers: length, share with an end token and, except for the SFT model,
    the KL from it.
    """
    metrics: dict[str, Any] = {
        f"{name}.length": sum(map(len, answers)) / len(answers),
        f"{name}.ended": sum(answer[-1] in end_ids for answer in answers) / len(answers),
    }
    if name != "sft":
        metrics[f"{name}.kl"] = intervals.mean_interval(kl)._asdict()
    return metrics


def compare_policies(
    by_judge: dict[str, Scores], policies: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return tallies and metrics: each judge's mean scores, and the win rate of each policy over those before
    it.
    """
    tallies: dict[str, dict[str, Any]] = {}
    metrics: dict[str, Any] = {}
    for judge, scores in by_judge.items():
        metrics |= {f"{judge}_score.{name}": sum(values) / len(values) for name, values in scores.items()}
        for theirs, ours in combinations(["chosen", *policies], 2):
            tally = win_rates.compare(scores[ours], scores[theirs])
            tallies[f"{judge}.{ours}_vs_{theirs}"] = tally._asdict()
            metrics[f"{judge}_win_rate.{ours}_vs_{theirs}"] = tally.win_rate._asdict()
    return tallies, metrics


def write_samples(
    path: Path, rows: list[dict[str, Any]], texts: dict[str, list[str]], by_judge: dict[str, Scores]
) -> None:
    """Write questions, every policy's answers and every judge's scores side by side."""
    columns: dict[str, list[Any]] = {
        "question_id": [row["question_id"] for row in rows],
        "question": [row["prompt"] for row in rows],
    }
    columns |= {f"{name}.answer": values for name, values in texts.items()}
    for judge, scores in by_judge.items():
        columns |= {f"{name}.{judge}": values for name, values in scores.items()}
    pq.write_table(pa.table(columns), path)


def gold_agreement(
    job: WinrateJob,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    rows: list[dict[str, Any]],
    questions: list[list[int]],
) -> intervals.Interval:
    """Return how often the reward model orders two held-out answers to a question as the gold scorer does."""
    encoder = pair_tables.build_encoder(job.text, tokenizer)
    repeated: list[list[int]] = []
    answers: list[list[int]] = []
    for question, row in zip(questions, rows, strict=True):
        repeated += [question] * len(row["answers"])
        answers += map(encoder.encode_answer, row["answers"])
    scores = iter(judge.scores(repeated, answers, run.phase("scoring all answers")))
    ours = [[next(scores) for _ in row["answers"]] for row in rows]
    truth = [[gold.gold_score(row["prompt"], answer) for answer in row["answers"]] for row in rows]
    return win_rates.ordering_agreement(ours, truth)


if __name__ == "__main__":
    main(evaluate, WinrateJob)
