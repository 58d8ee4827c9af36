"""Read the files that benchmarks are run on. Flows check them before a run, and the program reads them.

A benchmark is a JSON Lines file; every row has the fields of its first row's kind:
    multiple choice   {"query": text, "choices": [texts], "gold": index of the right choice}
    continuation      {"context": text, "continuation": text} (LAMBADA)
A RewardBench 2 file has rows {"id": text, "prompt": text, "chosen": [texts], "rejected": [texts],
"subset": text}.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tasks.system.errors import InputError

Kind = Literal["multiple_choice", "continuation"]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "continuation": ("context", "continuation"),
}
PREFIX = "benchmark_"  # of the stage's inputs: a file's name, which metrics have, is thus in the key
TIES = "Ties"  # the subset of RewardBench 2 with several right answers to a question


class Document(NamedTuple):
    """A question of a benchmark, as a text and its possible continuations."""

    line: int  # of the file, from 1
    text: str
    choices: list[str]
    gold: int  # index of the right choice


class Benchmark(NamedTuple):
    """A benchmark's kind and its questions, in the order of the file."""

    kind: Kind
    documents: list[Document]


class RewardRow(NamedTuple):
    """A question of RewardBench 2 with right and wrong answers."""

    id: str
    prompt: str
    chosen: list[str]
    rejected: list[str]
    subset: str


def benchmark_name(path: Path) -> str:
    """Return the name of a file's benchmark, for metrics: the file's name without its ending."""
    return re.sub(r"[^\w-]+", "_", path.name.removesuffix(".jsonl"))


def read_benchmark(path: Path) -> Benchmark:
    """Return the questions of a benchmark's file. Raises InputError with the file and the line."""
    kind: Kind | None = None
    documents = []
    for line, row in _read_rows(path):
        kind = kind or _kind_of(row, path, line)
        if missing := [name for name in FIELDS[kind] if name not in row]:
            raise _refusal(path, line, f"has no {missing[0]}, as the rows before it have")
        build = _multiple_choice if kind == "multiple_choice" else _continuation
        documents.append(build(row, path, line))
    if kind is None:
        raise InputError(f"The benchmark {path} has no rows.")
    return Benchmark(kind, documents)


def _kind_of(row: dict[str, Any], path: Path, line: int) -> Kind:
    for kind, names in FIELDS.items():
        if all(name in row for name in names):
            return kind
    wanted = " or ".join("{" + ", ".join(names) + "}" for names in FIELDS.values())
    raise _refusal(path, line, f"has not the fields of a benchmark: {wanted}")


def _multiple_choice(row: dict[str, Any], path: Path, line: int) -> Document:
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not _is_text(query):
        raise _refusal(path, line, "has a query that is not a text")
    if not _are_texts(choices) or len(choices) < 2:
        raise _refusal(path, line, "has choices that are not a list of at least two texts")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise _refusal(path, line, f"has the gold {gold!r}, which is not the index of one of its choices")
    return Document(line, query, choices, gold)


def _continuation(row: dict[str, Any], path: Path, line: int) -> Document:
    if not _is_text(row["context"]) or not _is_text(row["continuation"]):
        raise _refusal(path, line, "has a context or a continuation that is not a text")
    return Document(line, row["context"], [row["continuation"]], 0)


def read_reward_bench(path: Path) -> list[RewardRow]:
    """Return the rows of a RewardBench 2 file. Raises InputError with the file and the line."""
    rows = []
    for line, row in _read_rows(path):
        for name in ("prompt", "subset"):
            if not _is_text(row.get(name)):
                raise _refusal(path, line, f"has no {name} that is a text")
        for name in ("chosen", "rejected"):
            if not _are_texts(row.get(name)):
                raise _refusal(path, line, f"has no {name} that is a list of texts")
        if row["subset"] == TIES and not re.fullmatch(r"(ref|tied):\d+", str(row.get("id"))):
            raise _refusal(path, line, f"is of the subset {TIES} and has no id of the form ref:N or tied:N")
        chosen, rejected = row["chosen"], row["rejected"]
        rows.append(RewardRow(str(row.get("id", line)), row["prompt"], chosen, rejected, row["subset"]))
    if not rows:
        raise InputError(f"The RewardBench 2 file {path} has no rows.")
    return rows


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of every line that is not empty. Raises InputError."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, _parse(text, path, number)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8, as JSON Lines are.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error


def _parse(text: str, path: Path, line: int) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise _refusal(path, line, f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _refusal(path, line, "is not a JSON object")
    return row


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(one) for one in value)


def _refusal(path: Path, line: int, what: str) -> InputError:
    return InputError(f"Line {line} of {path} {what}.")
