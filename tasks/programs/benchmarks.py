"""Measure what alignment costs: perplexity of held-out answers, and benchmarks, of every model of the run.

python -m tasks.programs.benchmarks DIR

inputs: data, base, model (the merged SFT model); ppo and dpo, if they were trained; the file of each
    benchmark as benchmark_NAME; reward and reward_bench, if RewardBench 2 is run
artifact:
    results.json            every figure, a row per benchmark
    perplexity.parquet      each model's loss of each held-out answer
    documents.parquet       each model's answer to each document of each benchmark
    reward_bench.parquet    the reward model's scores of each row of RewardBench 2
    summary.json

All differences are paired: the models read the same documents.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.config.benchmark_files import Document, read_reward_bench
from tasks.config.jobs import BenchmarksJob
from tasks.config.policies import TUNED
from tasks.programs.runtime import (
    benchmark_report,
    benchmark_tasks,
    pair_tables,
    policies,
    table_rows,
)
from tasks.programs.runtime.benchmark_tasks import Task
from tasks.programs.runtime.policies import Models
from tasks.programs.runtime.program import ReportProgress, Run, main, to_json
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import devices, free_memory
from tasks.rlhf.evaluation import harness, perplexity
from tasks.rlhf.evaluation.answer_scores import Answer, score_answers
from tasks.rlhf.evaluation.harness import Result
from tasks.rlhf.evaluation.perplexity import Texts
from tasks.rlhf.models import loading, reward_model
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite


class Unit(NamedTuple):
    """What is computed at a time, and kept if the program is killed: a model's answers to one benchmark."""

    model: str
    what: str
    compute: Callable[[Models, ReportProgress], Any]  # returns a JSON value

    @property
    def key(self) -> str:
        """Return the name of its result."""
        return f"{self.model} {self.what}"


def measure(job: BenchmarksJob, run: Run) -> None:
    """Measure the base, the SFT model and each trained policy on the same texts."""
    # 1. Held-out answers, benchmarks and RewardBench 2.
    settings = job.benchmarks
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    chats = table_rows.read_chats(run.inputs["data"] / "evaluation.parquet")
    encoder = pair_tables.build_encoder(job.text, tokenizer, chats)
    rows = benchmark_tasks.read_answers(run.inputs["data"] / "evaluation.parquet", settings.num_texts)
    texts = benchmark_tasks.encode_answers(rows, encoder)
    tasks = benchmark_tasks.read_tasks(run.inputs, settings)
    rewarded = read_reward_bench(run.inputs["reward_bench"]) if "reward" in run.inputs else []
    reward_encoder = pair_tables.build_encoder(job.text, tokenizer, {})  # its prompts are texts
    rewarded_texts = benchmark_tasks.encode_reward_rows(rewarded, reward_encoder)

    # 2. Every model computes every unit that a killed program has not finished.
    models = ["base", "sft", *(name for name in TUNED if name in run.inputs)]
    units = [unit for model in models for unit in model_units(model, texts, tasks, tokenizer, job=job)]
    if rewarded:
        compute = partial(score_rewards, rewarded_texts, tokenizer.pad_token_id, settings.batch_size)
        units.append(Unit("reward", "reward_bench", compute))
    results = run_units(units, job, run, device)

    # 3. Figures and the artifact.
    losses = {model: torch.tensor(results[f"{model} perplexity"], dtype=torch.float64) for model in models}
    answers = [
        (task, {model: [Result(*one) for one in results[f"{model} {task.label}"]] for model in models})
        for task in tasks
    ]
    figures = benchmark_report.perplexity_rows(losses, texts)
    ids = [row["question_id"] for row in rows]
    benchmark_report.write_losses(run.artifact / "perplexity.parquet", ids, losses, texts)
    for task, by_model in answers:
        figures += benchmark_report.benchmark_rows(task, by_model)
        benchmark_report.warn_of_cut_documents(task, by_model["base"], run)
    if tasks:
        benchmark_report.write_answers(run.artifact / "documents.parquet", answers)
    metrics = {name: value for row in figures for name, value in benchmark_report.row_metrics(row).items()}
    if rewarded:
        scores = benchmark_tasks.split_scores(rewarded, results["reward reward_bench"])
        metrics |= benchmark_report.reward_bench_metrics(scores)
        benchmark_report.write_scores(run.artifact / "reward_bench.parquet", scores)
    (run.artifact / "results.json").write_text(to_json({"models": models, "rows": figures}, indent=1))
    run.warnings += benchmark_report.warnings(figures) + reward_encoder.warnings()
    run.finish(metrics | encoder.metrics("benchmarks"), texts=len(rows))


def model_units(
    model: str, texts: Texts, tasks: list[Task], tokenizer: PreTrainedTokenizerBase, *, job: BenchmarksJob
) -> Iterator[Unit]:
    """Yield what a model computes: the perplexity, then each benchmark."""
    batch_size = job.benchmarks.batch_size
    yield Unit(model, "perplexity", partial(measure_losses, model, texts, tokenizer, batch_size))
    for task in tasks:
        yield Unit(model, task.label, partial(answer_documents, model, task, tokenizer, batch_size))


def measure_losses(
    model: str,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    models: Models,
    report_progress: ReportProgress,
) -> list[float]:
    """Return a model's loss of each held-out text, in nats. Raises InputError if one is not finite."""
    with models.active[model]() as computing:
        losses = perplexity.text_losses(
            computing,
            texts,
            pad_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            report_progress=report_progress,
        )
    check_finite({f"the loss of held-out answers under {model}": losses}, advice=UNSOUND_MODEL)
    return losses.tolist()


def answer_documents(
    model: str,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    models: Models,
    report_progress: ReportProgress,
) -> list[Result]:
    """Return a model's answer to each document. Raises InputError if a log-likelihood is not finite."""
    with models.active[model]() as computing:
        results = harness.evaluate(
            computing,
            tokenizer,
            [_as_dict(document) for document in task.documents],
            kind=task.kind,
            examples=[_as_dict(document) for document in task.examples],
            num_fewshot=task.num_fewshot,
            batch_size=batch_size,
            report_progress=report_progress,
        )
    found = torch.tensor([value for result in results for value in result.log_likelihoods])
    check_finite({f"the log-likelihood of {task.label} under {model}": found}, advice=UNSOUND_MODEL)
    return results


def _as_dict(document: Document) -> harness.Document:
    return {"text": document.text, "choices": document.choices, "gold": document.gold}


def score_rewards(
    texts: list[Answer], pad_id: int, batch_size: int, models: Models, report_progress: ReportProgress
) -> list[float]:
    """Return the reward of each answer. Raises InputError if one is not finite."""
    scorer = models.scorer
    assert scorer is not None

    def score(batch: Sequences) -> Tensor:
        rewards = reward_model.rewards(scorer, batch)
        check_finite({"the reward model's score": rewards}, advice=UNSOUND_MODEL)
        return rewards

    return score_answers(
        score,
        texts,
        pad_id=pad_id,
        device=scorer.members[0].head.weight.device,
        batch_size=batch_size,
        report_progress=report_progress,
    ).tolist()


def run_units(units: list[Unit], job: BenchmarksJob, run: Run, device: torch.device) -> dict[str, Any]:
    """Return the result of each unit by its key; finished ones are in the checkpoint.

    The base is computed before the other models are loaded: two of them may not fit into the memory.
    """
    checkpoint = checkpoints.latest(run.checkpoints)
    results: dict[str, Any] = checkpoint.state if checkpoint else {}
    run.rewind(len(results))
    models, loaded = Models({}, None), ""
    for unit in units:
        if unit.key in results:
            continue
        wanted = "base" if unit.model == "base" else "tuned"
        if wanted != loaded:
            models, loaded = Models({}, None), wanted
            free_memory.release(device)  # of the base
            if wanted == "base":
                models = policies.load_base(run, job.weights.base, device)
            else:
                models = policies.load_tuned(run, job.weights.merged, device)
        results[unit.key] = unit.compute(models, run.phase(f"{unit.what} of {unit.model}"))
        run.log(len(results), len(units))
        checkpoints.save(run.checkpoints, len(results), {}, results)
    return results


if __name__ == "__main__":
    main(measure, BenchmarksJob)
