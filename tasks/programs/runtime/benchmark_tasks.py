"""Choose the texts that every model is measured on: held-out answers, and documents of benchmarks."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

from tasks.config.benchmark_files import PREFIX, Benchmark, Document, Kind, RewardRow, read_benchmark
from tasks.config.sections.benchmarks import Benchmarks
from tasks.dataset import row_sample
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.evaluation.answer_scores import Answer
from tasks.rlhf.evaluation.perplexity import Texts
from tasks.rlhf.evaluation.reward_bench import RowScores
from tasks.system.errors import InputError


class Task(NamedTuple):
    """A benchmark with a number of solved examples before each question."""

    name: str
    kind: Kind
    num_fewshot: int
    documents: list[Document]
    examples: list[Document]

    @property
    def label(self) -> str:
        """Return the name for metrics: arc_easy, or arc_easy.5shot."""
        return f"{self.name}.{self.num_fewshot}shot" if self.num_fewshot else self.name


def read_answers(path: Path, count: int) -> list[dict[str, Any]]:
    """Return at most ``count`` questions of the evaluation split, which no stage trains on, drawn by id.

    Raises InputError if it has none.
    """
    table = pq.read_table(path, columns=["question_id", "prompt", "answers", "best"])
    if not table.num_rows:
        raise InputError(
            "The evaluation split has no questions whose answers' perplexity could be measured: lower "
            "data.finetune_share, data.reward_share or data.rl_share, or give more data."
        )
    places = row_sample.draw_sample(table["question_id"].to_pylist(), count)
    rows: list[dict[str, Any]] = table.take(sorted(places)).to_pylist()
    return rows


def encode_answers(rows: list[dict[str, Any]], encoder: Encoder) -> Texts:
    """Return each question with its best answer, whose tokens are counted but for the end token."""
    ends = prompts.end_tokens(encoder.tokenizer, encoder.template)
    parts: list[Answer] = []
    num_bytes = []
    for row in rows:
        text = row["answers"][row["best"]].strip()
        ids = encoder.encode_answer(text)
        if ids[-1] in ends:
            ids = ids[:-1]
        else:  # cut to text.max_answer_tokens
            text = prompts.decode_answer(encoder.tokenizer, ids, template=encoder.template)
        parts.append((encoder.encode_prompt(row["prompt"]), ids))
        num_bytes.append(len(text.encode()))
    tokens = torch.tensor([len(ids) for _, ids in parts], dtype=torch.float64)
    return Texts(parts, tokens, torch.tensor(num_bytes, dtype=torch.float64))


def read_tasks(inputs: dict[str, Path], settings: Benchmarks) -> list[Task]:
    """Return every benchmark among the inputs with every number of examples, in the order of their names.

    Raises InputError if a file is malformed or too short.
    """
    files = {name.removeprefix(PREFIX): path for name, path in inputs.items() if name.startswith(PREFIX)}
    return [
        build_task(name, benchmark, num_fewshot, settings)
        for name, benchmark in ((name, read_benchmark(path)) for name, path in sorted(files.items()))
        for num_fewshot in settings.num_fewshot
    ]


def build_task(name: str, benchmark: Benchmark, num_fewshot: int, settings: Benchmarks) -> Task:
    """Draw a benchmark's examples and documents by their lines, so that no example is counted.

    The documents are the same for every number of examples. Raises InputError if none is left.
    """
    num_examples = settings.num_examples if max(settings.num_fewshot) else 0
    lines = [document.line for document in benchmark.documents]
    drawn = row_sample.draw_sample(lines, len(lines))
    if len(drawn) <= num_examples:
        raise InputError(
            f"The benchmark {name} has {len(drawn)} questions, of which benchmarks.num_examples keeps "
            f"{num_examples} for examples: lower it, or set benchmarks.num_fewshot to [0]."
        )
    places = sorted(drawn[num_examples:][: settings.max_documents])
    documents = [benchmark.documents[place] for place in places]
    examples = [benchmark.documents[place] for place in drawn[:num_examples]]
    return Task(name, benchmark.kind, num_fewshot, documents, examples if num_fewshot else [])


def encode_reward_rows(rows: list[RewardRow], encoder: Encoder) -> list[Answer]:
    """Return every answer of RewardBench 2 with its prompt, as reward models read them: cut to the limits."""
    return [
        (encoder.encode_prompt(row.prompt), encoder.encode_answer(answer))
        for row in rows
        for answer in (*row.chosen, *row.rejected)
    ]


def split_scores(rows: list[RewardRow], scores: list[float]) -> list[RowScores]:
    """Return the scores of the encoded answers by row."""
    rest = iter(scores)
    return [
        RowScores(row.id, row.subset, [next(rest) for _ in row.chosen], [next(rest) for _ in row.rejected])
        for row in rows
    ]
