"""Write small data sets, run the data program on them, and read its tables."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.config.jobs import DataJob
from tasks.dataset.question import Question
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.row_files import Place, Row, read_rows
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.programs.data import prepare
from tasks.programs.runtime.program import Run


def write_noisy_posts(path: Path, count: int) -> Path:
    """Write a Posts.xml in random order: some questions are equal, answers vary in length and votes."""
    rng, rows = random.Random(5), []
    for number in range(count):
        words = " ".join(
            rng.choice(["alpha", "beta", "gamma", "delta", "how", "why"]) + str(rng.randrange(40))
            for _ in range(30)
        )
        body = words if number % 10 else "the same question again"
        rows.append(
            f'<row Id="{1 + 10 * number}" PostTypeId="1" Score="1" OwnerUserId="{number % 7}" Title="T" '
            f'Body="{body}" />'
        )
        for k in range(1, 2 + rng.randrange(5)):
            ids = f'Id="{1 + 10 * number + k}" PostTypeId="2" ParentId="{1 + 10 * number}"'
            votes = rng.randrange(-2, 30)
            rows.append(f'<row {ids} Score="{votes}" Body="{"x " * rng.randrange(1, 60)}{k}" />')
    rng.shuffle(rows)
    path.write_text("<posts>\n" + "\n".join(rows) + "\n</posts>")
    return path


def table_digests(artifact: Path) -> dict[str, str]:
    """Return the SHA-256 of each table of a data artifact."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in artifact.iterdir()
        if path.suffix == ".parquet"
    }


def write_posts(
    path: Path, num_questions: int, num_answers: int = 4, votes: tuple[int, ...] = (9, 3, 0, -2)
) -> Path:
    """Write a Posts.xml of questions whose answers differ in votes."""
    lines, id = ["<posts>"], 0
    for number in range(num_questions):
        id += 1
        question = id
        title = f"How to do {number}?"
        lines.append(
            f'<row Id="{id}" PostTypeId="1" Score="1" Title="{title}" Body="&lt;p&gt;{title}&lt;/p&gt;" />'
        )
        for k in range(num_answers):
            id += 1
            lines.append(
                f'<row Id="{id}" PostTypeId="2" ParentId="{question}" Score="{votes[k % len(votes)]}" '
                f'Body="&lt;p&gt;Way {k}.&lt;/p&gt;" />'
            )
    path.write_text("\n".join([*lines, "</posts>"]))
    return path


def read_all(path: Path) -> tuple[list[Row], Quarantine]:
    """Return all rows of a file, and what was wrong with the others."""
    quarantine = Quarantine()
    return list(read_rows(path, quarantine)), quarantine


def as_rows(*fields: dict[str, Any], file: str = "f.jsonl") -> list[Row]:
    """Return rows with these fields, as if read from a file."""
    return [Row(Place(file, number), one) for number, one in enumerate(fields, 1)]


def questions_of(gathered: AnswerGroups) -> list[Question]:
    """Return the questions that a source's rows were grouped into."""
    return list(gathered.questions(Counter()))


def run_data_program(
    path: Path, folder: Path, source: dict[str, Any], **data: Any
) -> tuple[Path, dict[str, Any]]:
    """Run the data program on a source in this process; return its artifact and its data card."""
    folder.mkdir(parents=True)
    job = {"seed": 0, "source": source | {"path": str(path)}, "data": data}
    (folder / "job.json").write_text(
        json.dumps({"stage": "data", "job": job, "inputs": {"source": str(path)}})
    )
    run = Run(folder)
    prepare(DataJob.model_validate(run.record), run)
    return run.artifact, json.loads((run.artifact / "card.json").read_text())


def read_table(artifact: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of one of the data stage's tables."""
    return pq.read_table(artifact / f"{name}.parquet").to_pylist()


def chat_message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
