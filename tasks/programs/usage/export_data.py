"""Write a run's data in the formats of TRL: SFT, preferences and prompts.

python -m tasks.programs.usage.export_data DIR

inputs: data
artifact: sft/ (prompt, completion), preference/ (prompt, chosen, rejected) and prompts/ (prompt), each with
    a file for every split, and README.md, by which `datasets.load_dataset(FOLDER, "sft")` finds them

Texts are as the run's policies read them: with text.template=chat lists of messages, which TRL renders with
the model's chat template, else strings that are rendered already. Data with conversations is always written
as messages: an exported policy has a chat template that renders them as training did.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.config.commands.usage import ExportDataJob, Template
from tasks.programs.runtime import table_rows
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.batches import prompts

ROWS = 8192  # read and written at a time
SOURCES = ("url", "author", "author_name", "licence")  # columns that name the source of a text

Row = dict[str, Any]
Convert = Callable[[Row, Template], Row]


class Part(NamedTuple):
    """A split of a data set: the data stage's table, and how its rows become TRL's."""

    kind: str
    split: str
    table: str
    convert: Convert


def export_data(job: ExportDataJob, run: Run) -> None:
    """Write every table that the run has."""
    counts: dict[str, dict[str, int]] = {}
    tables = sorted(run.inputs["data"].glob("*.parquet"))
    template = "chat" if table_rows.has_chats(*tables) else job.text.template
    for part in PARTS:
        source = run.inputs["data"] / f"{part.table}.parquet"
        if source.exists():
            target = run.artifact / part.kind / f"{part.split}.{job.form}"
            target.parent.mkdir(exist_ok=True)
            rows = read_rows(source, part.convert, template)
            write = write_parquet if job.form == "parquet" else write_jsonl
            counts.setdefault(part.kind, {})[part.split] = write(rows, target)
    (run.artifact / "README.md").write_text(describe(job, template, counts))


def supervised(row: Row, template: Template) -> Row:
    """Return {prompt, completion} of a question and its best answer."""
    texts = {"prompt": prompt(row, template), "completion": answer(row["answer"], template)}
    return texts | {"score": row["score"]} | _about(row, "answer")


def supervised_of_ranked(row: Row, template: Template) -> Row:
    """Return {prompt, completion} of a question with all its answers."""
    best = row["best"]
    names = [f"answer_{name}" for name in SOURCES]
    chosen = {name: row[name][best] for name in names}
    return supervised(
        {**row, "answer": row["answers"][best], "score": row["scores"][best], **chosen}, template
    )


def preference(row: Row, template: Template) -> Row:
    """Return {prompt, chosen, rejected} of a pair of answers."""
    texts = {side: answer(row[side], template) for side in ("chosen", "rejected")}
    scores = {name: row[name] for name in ("chosen_score", "rejected_score")}
    return {"prompt": prompt(row, template), **texts, **scores, **_about(row, "chosen", "rejected")}


def prompt_only(row: Row, template: Template) -> Row:
    """Return {prompt} of a question."""
    return {"prompt": prompt(row, template), **_about(row)}


PARTS = (
    Part("sft", "train", "finetune", supervised),
    Part("sft", "test", "evaluation", supervised_of_ranked),
    Part("preference", "train", "reward", preference),
    Part("preference", "test", "evaluation_pairs", preference),
    Part("prompts", "train", "rl", prompt_only),
)


def _about(row: Row, *roles: str) -> Row:
    """Return the columns that attribute a row's texts to their authors."""
    names = [f"{role}_{name}" for role in ("question", *roles) for name in SOURCES]
    return {name: row[name] for name in ("question_id", "site", *names)}


def prompt(row: Row, template: Template) -> str | list[dict[str, str]]:
    """Return a row's question or conversation as TRL takes it."""
    if template == "chat":
        return row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    before, *after = prompts.PLAIN[template]
    return f"{before}{row['prompt']}{''.join(after)}"


def answer(text: str, template: Template) -> str | list[dict[str, str]]:
    """Return an answer as TRL takes it; TRL adds the end token."""
    return [{"role": "assistant", "content": text.strip()}] if template == "chat" else f" {text.strip()}"


def read_rows(table: Path, convert: Convert, template: Template) -> Iterator[list[Row]]:
    """Yield the converted rows of a table in batches."""
    for batch in pq.ParquetFile(table).iter_batches(ROWS):
        yield [convert(row, template) for row in batch.to_pylist()]


def write_parquet(batches: Iterator[list[Row]], path: Path) -> int:
    """Write rows as parquet; return their number."""
    count, writer = 0, None
    for rows in batches:
        table = pa.Table.from_pylist(rows, writer.schema if writer else None)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        count += len(rows)
    if writer:
        writer.close()
    return count


def write_jsonl(batches: Iterator[list[Row]], path: Path) -> int:
    """Write rows as JSON lines; return their number."""
    count = 0
    with path.open("wb") as file:
        for rows in batches:
            file.writelines(orjson.dumps(row) + b"\n" for row in rows)
            count += len(rows)
    return count


def describe(job: ExportDataJob, template: Template, counts: dict[str, dict[str, int]]) -> str:
    """Return a data set card in the Hugging Face format, which names the files."""
    lines = ["---", "configs:"]
    for kind, splits in counts.items():
        lines += [f"- config_name: {kind}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {kind}/{split}.{job.form}"]
    lines += ["---", "", f"# Data of {job.about}", ""]
    lines += ["| configuration | split | rows |", "|---|---|---|"]
    lines += [f"| {kind} | {split} | {n} |" for kind, splits in counts.items() for split, n in splits.items()]
    form = f"have the format of text.template={template}"
    if template != job.text.template:  # conversations
        form = "are messages, which an exported policy's chat template renders as in training"
    lines += [
        "",
        f"Prompts and answers {form}. The columns `*_url`, "
        "`*_author` and `*_licence` attribute each text; keep them where the licence asks for attribution.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(export_data, ExportDataJob)
