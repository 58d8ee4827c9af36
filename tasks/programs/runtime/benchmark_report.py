"""Turn what the models answered into figures: rates, paired differences, tables of documents, warnings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.programs.runtime.benchmark_tasks import Task
from tasks.programs.runtime.program import Run
from tasks.rlhf.evaluation import perplexity, reward_bench
from tasks.rlhf.evaluation.harness import Result
from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.evaluation.perplexity import Texts
from tasks.rlhf.evaluation.reward_bench import RowScores
from tasks.rlhf.judging import paired

Estimate = dict[str, Any]  # value, low, high and n
SHOWN = 0.05  # a difference with a smaller p-value is shown to be one
NAMES = {"base": "the base", "sft": "the SFT model", "dpo": "DPO", "ppo": "PPO"}
MUCH_CUT = 0.1  # share of a benchmark's documents


class Tax(TypedDict):
    """How much worse a model is than another one on the same documents; below 0 it is better."""

    ours: str
    theirs: str
    estimate: Estimate  # points of accuracy, or per cent of perplexity
    p: float | None  # McNemar's, of an accuracy
    is_shown: bool  # to be worse: a difference that is more than chance


class Row(TypedDict):
    """One measure of every model."""

    name: str  # in metrics: arc_easy.5shot.acc_norm
    measure: str  # perplexity, bits_per_byte, acc or acc_norm
    values: dict[str, Estimate]  # by model
    taxes: list[Tax]


def compared(models: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of models that are compared: each trained one with the SFT model and the base."""
    trained = [name for name in models if name not in ("base", "sft")]
    with_sft = [(name, "sft") for name in trained]
    return [*with_sft, *((name, "base") for name in ("sft", *trained))]


def perplexity_rows(losses: Mapping[str, Tensor], texts: Texts) -> list[Row]:
    """Return perplexity and bits per byte of the held-out texts. losses (N,) by model."""
    taxes = []
    for ours, theirs in compared([*losses]):
        estimate = perplexity.perplexity_increase(losses[ours], losses[theirs], texts.tokens)
        taxes.append(_build_tax(ours, theirs, estimate._asdict(), is_shown=estimate.low > 0))
    per_token = {name: perplexity.perplexity(some, texts.tokens)._asdict() for name, some in losses.items()}
    per_byte = {name: perplexity.bits_per_byte(some, texts.bytes)._asdict() for name, some in losses.items()}
    return [
        Row(name="perplexity", measure="perplexity", values=per_token, taxes=taxes),
        Row(name="bits_per_byte", measure="bits_per_byte", values=per_byte, taxes=[]),
    ]


def benchmark_rows(task: Task, answers: Mapping[str, Sequence[Result]]) -> list[Row]:
    """Return the accuracies of every model on a benchmark."""
    right = {name: torch.tensor([one.acc for one in some]) for name, some in answers.items()}
    rows = [_accuracy_row(task.label, "acc", right)]
    if task.kind == "multiple_choice":
        by_length = {name: torch.tensor([one.acc_norm for one in some]) for name, some in answers.items()}
        rows.append(_accuracy_row(f"{task.label}.acc_norm", "acc_norm", by_length))
    return rows


def _accuracy_row(name: str, measure: str, right: Mapping[str, Tensor]) -> Row:
    """Return a row of accuracies; right (N,), 0 or 1, by model."""
    values = {model: wilson(some.sum().item(), len(some))._asdict() for model, some in right.items()}
    taxes = []
    for ours, theirs in compared([*right]):
        loss, p = paired_loss(right[ours], right[theirs])
        taxes.append(_build_tax(ours, theirs, loss, p=p, is_shown=loss["value"] > 0 and p < SHOWN))
    return Row(name=name, measure=measure, values=values, taxes=taxes)


def paired_loss(ours: Tensor, theirs: Tensor) -> tuple[Estimate, float]:
    """Return by how many points ``ours`` is less often right than ``theirs``, and McNemar's p. (N,), (N,)."""
    loss = paired.paired_difference(theirs.double().numpy(), ours.double().numpy())
    points = {"value": 100 * loss.value, "low": 100 * loss.low, "high": 100 * loss.high, "n": loss.n}
    only_theirs, only_ours = int((theirs > ours).sum()), int((ours > theirs).sum())
    return points, paired.mcnemar(only_theirs, only_ours)


def _build_tax(ours: str, theirs: str, estimate: Estimate, *, p: float | None = None, is_shown: bool) -> Tax:
    return Tax(ours=ours, theirs=theirs, estimate=estimate, p=p, is_shown=is_shown)


def reward_bench_metrics(rows: Sequence[RowScores]) -> dict[str, Any]:
    """Return the reward model's score of each subset of RewardBench 2, and their mean."""
    subsets = reward_bench.subset_scores(rows)
    if not subsets:
        return {}
    metrics = {f"reward_bench.{name.replace(' ', '_')}": one._asdict() for name, one in subsets.items()}
    return metrics | {"reward_bench.total": reward_bench.total_score(subsets)}


def row_metrics(row: Row) -> dict[str, Any]:
    """Return a row's figures by their metrics' names."""
    name = row["name"]
    prefix = name if row["measure"] in ("perplexity", "bits_per_byte") else f"benchmark.{name}"
    metrics: dict[str, Any] = {f"{prefix}.{model}": value for model, value in row["values"].items()}
    for tax in row["taxes"]:
        pair = f"{name}.{tax['ours']}_vs_{tax['theirs']}"
        metrics[f"tax.{pair}"] = tax["estimate"]
        if tax["p"] is not None:
            metrics[f"mcnemar.{pair}"] = tax["p"]
    return metrics


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on each policy that is shown to be worse than the SFT model on a benchmark."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for tax in row["taxes"]:
            if tax["p"] is not None and tax["theirs"] == "sft" and tax["is_shown"]:
                value, low, high, _ = tax["estimate"].values()
                text = f"{row['name']} by {value:.1f} points ({low:.1f} to {high:.1f})"
                found.setdefault(tax["ours"], []).append(text)
    return [
        f"{NAMES.get(name, name)} is shown to be worse than the SFT model on {'; '.join(some)}: raise the KL "
        "penalty, or train for fewer steps."
        for name, some in found.items()
    ]


def warn_of_cut_documents(task: Task, answers: Sequence[Result], run: Run) -> None:
    """Warn if many of a benchmark's documents are longer than the model's context."""
    cut = sum(one.is_cut for one in answers)
    if cut > MUCH_CUT * len(answers):
        run.warn(
            f"{cut:,} of {len(answers):,} documents of {task.label} are longer than the model's context and "
            "lost their beginnings: lower benchmarks.num_fewshot, or leave this benchmark out."
        )


def write_losses(path: Path, question_ids: Sequence[int], losses: Mapping[str, Tensor], texts: Texts) -> None:
    """Write each model's loss of each held-out text, in nats."""
    columns: dict[str, Any] = {
        "question_id": pa.array(question_ids, pa.int64()),
        "tokens": pa.array(texts.tokens.long().tolist(), pa.int64()),
        "bytes": pa.array(texts.bytes.long().tolist(), pa.int64()),
    }
    columns |= {model: pa.array(some.tolist(), pa.float64()) for model, some in losses.items()}
    pq.write_table(pa.table(columns), path)


ANSWERS = {
    "model": pa.string(),
    "benchmark": pa.string(),
    "num_fewshot": pa.int32(),
    "line": pa.int64(),
    "gold": pa.int32(),
    "log_likelihoods": pa.list_(pa.float64()),
    "acc": pa.float64(),
    "acc_norm": pa.float64(),
    "is_cut": pa.bool_(),
}


def write_answers(path: Path, answers: Sequence[tuple[Task, Mapping[str, Sequence[Result]]]]) -> None:
    """Write every model's answer to every document; ``line`` is that of the benchmark's file."""
    rows = [
        {
            "model": model,
            "benchmark": task.name,
            "num_fewshot": task.num_fewshot,
            "line": document.line,
            "gold": document.gold,
            **result._asdict(),
        }
        for task, by_model in answers
        for model, results in by_model.items()
        for document, result in zip(task.documents, results, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(ANSWERS.items())), path)


def write_scores(path: Path, rows: Sequence[RowScores]) -> None:
    """Write the reward model's scores of each row of RewardBench 2."""
    scores = pa.list_(pa.float64())
    schema = pa.schema({"id": pa.string(), "subset": pa.string(), "chosen": scores, "rejected": scores})
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema), path)
