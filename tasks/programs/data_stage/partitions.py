"""Filter the questions of one partition, a range of question ids, and turn them into rows of the tables.

Any worker can do this for any partition: the result depends on the task alone.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.config.sections.data import Data
from tasks.config.sections.sources import Source
from tasks.dataset import columns, sorted_files, tables
from tasks.dataset.curation import contamination, question_files, rules
from tasks.dataset.curation.question_files import SPLITS
from tasks.dataset.ranking import draw_pairs
from tasks.dataset.sorted_files import Slice
from tasks.dataset.statistics import Statistics
from tasks.programs.data_stage import read_source


class Partition(NamedTuple):
    """A range of records, the rules to filter its questions by, and the file that they are written to."""

    slices: list[Slice]
    source: Source
    rules: rules.Rules
    evaluation_ngrams: Path | None
    near_duplicates: bool  # whether to write what near duplicates are found by
    output: Path


class FilterCounts(NamedTuple):
    """Counts of what was dropped and masked in a partition."""

    dropped: Counter[str]
    masked: Counter[str]


def filter_partition(partition: Partition) -> FilterCounts:
    """Write the questions of a partition that the rules keep."""
    dropped: Counter[str] = Counter()
    masked: Counter[str] = Counter()
    active = partition.rules
    if partition.evaluation_ngrams:
        active = active._replace(evaluation_ngrams=contamination.read(partition.evaluation_ngrams))
    records = sorted_files.read(partition.slices)
    questions = read_source.build_questions(partition.source, records, dropped)
    to_text = read_source.text_converter(partition.source)
    kept = rules.apply_rules(questions, active, dropped, masked, to_text=to_text)
    question_files.write(kept, partition.output, near_duplicates=partition.near_duplicates)
    return FilterCounts(dropped, masked)


def rules_from_settings(data: Data) -> rules.Rules:
    """Return the rules that look at one question at a time."""
    return rules.Rules(
        min_answer_chars=data.min_answer_chars,
        max_answer_chars=data.max_answer_chars,
        max_prompt_chars=data.max_prompt_chars,
        personal=data.personal,
        languages=data.languages,
    )


class TablePart(NamedTuple):
    """A file of questions with their splits, and the folder that their rows are written to."""

    questions: Path
    splits: bytes  # of each question an index into SPLITS
    max_pairs: int
    seed: int
    output: Path


def build_table_part(part: TablePart) -> Statistics:
    """Write the rows of a file of questions, one file per table, and return their statistics."""
    questions = columns.read(part.questions)
    splits = np.frombuffer(part.splits, dtype=np.int8)
    statistics, rows = Statistics(), dict[str, tables.Columns]()
    for number, split in enumerate(SPLITS[1:], 1):
        chosen = columns.select(questions, splits == number)
        drawn = draw_pairs(chosen, max_pairs=part.max_pairs, seed=part.seed)
        statistics.merge(Statistics.of(chosen, *drawn))
        rows |= tables.build_tables(chosen, split, *drawn)
    part.output.mkdir(exist_ok=True)
    for name in tables.COLUMNS:
        tables.write_part(name, rows[name], part.output / name)
    return statistics
