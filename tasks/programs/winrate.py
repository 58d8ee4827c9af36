"""Lets every policy answer the held-out questions and counts who wins, by the reward model and, on the built-in site, by the gold scorer.

python -m tasks.programs.winrate DIR        inputs: data, model, reward, and ppo and dpo where they were trained
artifact: samples.parquet (questions, answers, scores side by side), results.json, summary.json
"""

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import WinrateJob
from tasks.dataset import row_sample
from tasks.demo_site import gold
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run, main, to_json
from tasks.rlhf.algorithms import rewards
from tasks.rlhf.batches import prompts, sampling, sequences
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.evaluation import intervals, win_rates
from tasks.rlhf.models import fingerprint, loading, lora, reward_model, trainable
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.models.trainable import Active
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite

Encoded = list[tuple[list[int], list[int]]]  # prompt and answer ids


class Judge(NamedTuple):
    """The reward model, normalised as in PPO."""

    scorer: Scorer
    pad_id: int
    device: torch.device

    @torch.no_grad()
    def scores(self, answers: Encoded, batch_size: int, told: Callable[[int, int], None]) -> list[float]:
        """Normalised reward of each (prompt, answer)."""
        scored = [0.0] * len(answers)
        by_length = sorted(
            range(len(answers)), key=lambda i: len(answers[i][0]) + len(answers[i][1])
        )  # little padding
        for first in range(0, len(answers), batch_size):
            rows = by_length[first : first + batch_size]
            batch = sequences.join(
                [answers[i][0] for i in rows],
                [answers[i][1] for i in rows],
                pad_id=self.pad_id,
                device=self.device,
            )
            found = reward_model.normalised(self.scorer, batch)
            check_finite({"the reward model's score": found}, advice=UNSOUND_MODEL)
            for row, value in zip(rows, found.tolist(), strict=True):
                scored[row] = value
            told(first + len(rows), len(answers))
        return scored


def evaluate(job: WinrateJob, run: Run) -> None:
    """Compare the trained policies with the SFT model, each other and the data set's chosen answers."""
    run.rewind(0)  # it starts anew whenever it starts
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    table = pq.read_table(run.inputs["data"] / "evaluation.parquet")
    rows = table.take(
        sorted(row_sample.draw(table["question_id"].to_pylist(), job.winrate.num_questions))
    ).to_pylist()
    judge, policies = _load(job, run, tokenizer, device)
    encoder = pair_tables.build_encoder(job.text, tokenizer)
    encoded = [encoder.prompt(row["prompt"]) for row in rows]
    total = len(policies) * -(-len(rows) // job.winrate.batch_size)

    # 1. Every policy answers every question.
    texts: dict[str, list[str]] = {"chosen": [row["answers"][row["best"]] for row in rows]}
    chosen = [(p, encoder.answer(a)) for p, a in zip(encoded, texts["chosen"], strict=True)]
    reward: dict[str, list[float]] = {
        "chosen": judge.scores(chosen, job.winrate.batch_size, run.phase("scoring chosen answers"))
    }
    metrics: dict[str, Any] = {}
    for position, name in enumerate(policies):
        uniform = uniform_numbers(
            job.seed, name, [row["question_id"] for row in rows], job.text.max_answer_tokens
        )
        answers, kl = _answer(
            job, run, policies, name, tokenizer, encoded, uniform, position=position, total=total
        )
        texts[name] = [prompts.decode_answer(tokenizer, a, template=job.text.template) for a in answers]
        reward[name] = judge.scores(
            list(zip(encoded, answers, strict=True)), job.winrate.batch_size, run.phase(f"scoring {name}")
        )
        metrics |= _describe(name, answers, kl, prompts.end_tokens(tokenizer, job.text.template))

    # 2. Who wins.
    questions = [row["prompt"] for row in rows]
    judged = {"reward": reward}
    if job.source.kind == "shell-site":
        judged["gold"] = {
            name: [gold.gold_score(q, a) for q, a in zip(questions, answers, strict=True)]
            for name, answers in texts.items()
        }
        metrics["reward_accuracy.gold"] = _gold_agreement(job, run, tokenizer, judge, rows, encoded)._asdict()
    tallies = {}
    for by, scored in judged.items():
        metrics |= {f"{by}_score.{name}": sum(values) / len(values) for name, values in scored.items()}
        for theirs, ours in combinations(["chosen", *policies], 2):
            tally = win_rates.compare(scored[ours], scored[theirs])
            tallies[f"{by}.{ours}_vs_{theirs}"] = tally._asdict()
            metrics[f"{by}_win_rate.{ours}_vs_{theirs}"] = tally.win_rate._asdict()

    # 3. The artifact.
    ids = [row["question_id"] for row in rows]
    columns: dict[str, list[Any]] = {"question_id": ids, "question": questions} | {
        f"{name}.answer": values for name, values in texts.items()
    }
    columns |= {f"{name}.{by}": values for by, scored in judged.items() for name, values in scored.items()}
    pq.write_table(pa.table(columns), run.artifact / "samples.parquet")
    (run.artifact / "results.json").write_text(
        to_json({"tallies": tallies, "policies": list(policies), "questions": len(rows)}, indent=1)
    )
    run.warnings += encoder.warnings()
    run.finish(metrics | encoder.metrics("winrate"), questions=len(rows))


def _load(
    job: WinrateJob, run: Run, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Judge, dict[str, Active]]:
    """The judge and the policies, adapters all on one base; policies in the order in which each is compared with those before it."""
    folder = run.inputs["model"]
    again = partial(loading.load, folder, device=device, precision=job.weights.merged)
    base = again()
    actual, model = fingerprint.fingerprint(folder, base), cast(PreTrainedModel | PeftModel, base)
    if reward_model.is_adapter(run.inputs["reward"]):
        fingerprint.check(run.inputs["reward"] / "adapter", actual, setting="weights.merged")
    model, judge = reward_model.load(run.inputs["reward"], model, device=device)
    policies: dict[str, Active] = {}
    for name in ("dpo", "ppo"):
        if name in run.inputs:
            model, policies[name] = trainable.load(
                run.inputs[name], model, name, actual=actual, setting="weights.merged", again=again
            )
    bare: Active = (
        partial(lora.active, model, None)
        if isinstance(model, PeftModel)
        else partial(trainable.unchanged, model)
    )
    return Judge(judge, tokenizer.pad_token_id, device), {"sft": bare, **policies}


@torch.no_grad()
def _answer(
    job: WinrateJob,
    run: Run,
    policies: dict[str, Active],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    uniform: torch.Tensor,
    *,
    position: int,
    total: int,
) -> tuple[list[list[int]], list[float]]:
    """Sampled answers of one policy and the KL estimate (k1) of each from the SFT model, in nats."""
    settings, pad = job.winrate, tokenizer.pad_token_id
    ends = prompts.end_tokens(tokenizer, job.text.template)
    answers: list[list[int]] = []
    divergences: list[float] = []
    per_policy = total // len(policies)
    for number, first in enumerate(range(0, len(encoded), settings.batch_size)):
        some = slice(first, first + settings.batch_size)
        questions = encoded[some]
        with policies[name]() as policy:
            samples = sampling.sample(
                policy,
                questions,
                max_tokens=job.text.max_answer_tokens,
                temperature=settings.temperature,
                end_ids=ends,
                pad_id=pad,
                uniform=uniform[some],
            )
            new = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
            batch = sequences.join(questions, new, pad_id=pad, device=policy.device)
            logp = sequences.log_probs(policy, batch, temperature=settings.temperature)
            check_finite({f"{name}'s log-probability of its own answer": logp}, advice=UNSOUND_MODEL)
        if name == "sft":
            divergences += [0.0] * len(new)
        else:
            with policies["sft"]() as reference:
                divergences += (
                    rewards.k1(logp - sequences.log_probs(reference, batch, temperature=settings.temperature))
                    .sum(dim=1)
                    .tolist()
                )
        answers += new
        run.log(position * per_policy + number + 1, total)
    return answers, divergences


def uniform_numbers(seed: int, policy: str, question_ids: list[int], num_tokens: int) -> torch.Tensor:
    """Return the numbers that ``policy`` draws its answers by, (Q, num_tokens) float64 in [0, 1).

    They depend on its name and the question alone: not on the other policies, the other questions or the device.
    """
    named = int.from_bytes(hashlib.sha256(policy.encode()).digest()[:8])
    rows = []
    for question_id in question_ids:
        generator = torch.Generator().manual_seed(seeds.mix(seed, named, question_id))
        rows.append(torch.rand(num_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _describe(name: str, answers: list[list[int]], kl: list[float], ends: tuple[int, ...]) -> dict[str, Any]:
    shape = {
        f"{name}.length": sum(map(len, answers)) / len(answers),
        f"{name}.ended": sum(a[-1] in ends for a in answers) / len(answers),
    }
    if name == "sft":
        return shape
    return shape | {f"{name}.kl": intervals.mean_interval(kl)._asdict()}


def _gold_agreement(
    job: WinrateJob,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    rows: list[dict[str, Any]],
    encoded: list[list[int]],
) -> intervals.Share:
    """How often the reward model orders two held-out answers to a question as the gold scorer does."""
    encoder = pair_tables.build_encoder(job.text, tokenizer)
    flat = [
        (prompt, encoder.answer(answer))
        for prompt, row in zip(encoded, rows, strict=True)
        for answer in row["answers"]
    ]
    scored = iter(judge.scores(flat, job.winrate.batch_size, run.phase("scoring all answers")))
    judged = [[next(scored) for _ in row["answers"]] for row in rows]
    return win_rates.ordering_agreement(
        judged, [[gold.gold_score(row["prompt"], a) for a in row["answers"]] for row in rows]
    )


if __name__ == "__main__":
    main(evaluate, WinrateJob)
