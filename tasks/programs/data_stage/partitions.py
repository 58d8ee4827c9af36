"""What is done with a range of a source's questions, by whichever process is free: kept on a shelf, and later turned into rows of the tables."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tasks.config.data import Data
from tasks.config.sources import Source
from tasks.dataset import sorted_files, tables
from tasks.dataset.curation import contamination, question_files, rules
from tasks.dataset.curation.question_files import SPLITS
from tasks.dataset.question import count_pairs, draw_pairs
from tasks.dataset.sorted_files import Slice
from tasks.dataset.statistics import Statistics
from tasks.programs.data_stage import read_source


class Partition(NamedTuple):
    """A range of records, and where its questions go."""

    slices: list[Slice]
    source: Source
    keep: rules.Rules
    foreign: Path | None  # word runs of evaluation sets
    near: bool
    path: Path


class FilteredPartition(NamedTuple):
    path: Path
    dropped: Counter[str]
    hidden: Counter[str]


def filter_partition(stack: Partition) -> FilteredPartition:
    """The questions of a range that the rules keep, on disk."""
    dropped: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    keep = stack.keep._replace(foreign=contamination.read(stack.foreign)) if stack.foreign else stack.keep
    found = read_source.build_questions(stack.source, sorted_files.read(stack.slices), dropped)
    kept = [question for one in found if (question := rules.apply_rules(one, keep, dropped, hidden))]
    question_files.write(kept, stack.path, near=stack.near)
    return FilteredPartition(stack.path, dropped, hidden)


def rules_from_settings(data: Data) -> rules.Rules:
    return rules.Rules(
        data.min_answer_chars, data.max_answer_chars, data.max_prompt_chars, data.personal, data.languages
    )


class TablePart(NamedTuple):
    """A shelf with the splits of its questions, and where their rows go."""

    shelf: Path
    splits: bytes  # a place in SPLITS of each
    max_pairs: int
    seed: int
    folder: Path


def build_table_part(lot: TablePart) -> tuple[Path, Statistics]:
    """The rows of a shelf's questions, a part for every table."""
    tally = Statistics()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in tables.COLUMNS}
    for question, split in zip(question_files.read(lot.shelf), lot.splits, strict=True):
        if split:
            pairs, most = draw_pairs(question, max_pairs=lot.max_pairs, seed=lot.seed), count_pairs(question)
            tally.add(question, pairs, most)
            for name, row in tables.build_rows(question, SPLITS[split], pairs, most):
                rows[name].append(row)
    lot.folder.mkdir(exist_ok=True)
    for name, part in rows.items():
        tables.write_part(name, part, lot.folder / name)
    return lot.folder, tally
