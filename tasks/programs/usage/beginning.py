"""Read the beginning of a source, to show what is in it."""

import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tasks.config.commands.usage import LookJob
from tasks.dataset import columns, sorted_files
from tasks.dataset.columns import Questions
from tasks.dataset.curation import rules
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.programs.data_stage import read_source
from tasks.programs.data_stage.partitions import rules_from_settings
from tasks.programs.data_stage.read_source import BlockTask

NUM_BLOCKS = 2  # of about 16 MB each: in a dump, answers stand near their questions


class Reading(NamedTuple):
    """What the first blocks of a source hold."""

    questions: Questions
    num_rows: int
    read: Counter[str]
    dropped: Counter[str]
    masked: Counter[str]
    bad: Counter[str]  # rows that cannot be used, by reason
    warnings: RowWarnings


def read_beginning(job: LookJob, source: Path, work: Path) -> Reading:
    """Read the first blocks of a source, and apply the rules that look at one question. Raises InputError."""
    reading = Reading(
        columns.from_rows([]), 0, Counter(), Counter(), Counter(), Counter(), RowWarnings.empty()
    )
    sites = read_source.sites_of(job.source, source)
    outputs, num_rows = [], 0
    for number, (block, name) in enumerate(islice(read_source.iter_blocks(job.source, source), NUM_BLOCKS)):
        task = BlockTask(block, job.source, name, len(set(sites.values())) > 1, work / f"{number}.block")
        result = read_source.read_block(task)
        num_rows += result.rows
        reading.read.update(result.read)
        reading.dropped.update(result.dropped)
        reading.bad.update(reason for _, reason in result.bad)
        reading.warnings.update(result.warnings)
        outputs.append(task.output)
    slices = [part for parts in sorted_files.partition(outputs, sys.maxsize, sys.maxsize) for part in parts]
    if not slices:
        return reading._replace(num_rows=num_rows)
    questions = read_source.build_questions(job.source, sorted_files.read(slices), reading.dropped)
    kept = rules.apply_rules(
        questions,
        rules_from_settings(job.data),
        reading.dropped,
        reading.masked,
        to_text=read_source.text_converter(job.source),
    )
    return reading._replace(num_rows=num_rows, questions=kept)
