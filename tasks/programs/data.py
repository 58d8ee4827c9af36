"""Turn votes or comparisons into splits for fine-tuning, reward training, PPO prompts and evaluation.

python -m tasks.programs.data DIR

inputs    source  a dump's .7z, Posts.xml or Posts.csv, these also gzipped, or a folder of several sites';
                  or JSON lines, JSON lists or parquet, a file or a folder of them
          against0, against1, ...  evaluation sets that are used later, in files of rows or lines
artifact  finetune.parquet          the best answer of each question
          corpus.parquet            every kept answer of the same questions, to pretrain the built-in base on
          reward.parquet            comparisons, each with the gap and ranks of its answers and the number of
                                    comparisons it was drawn from
          reward_groups.parquet     the same questions with all their answers, as in evaluation.parquet
          rl.parquet                prompts
          evaluation.parquet        questions with all their answers, by id, the scores, the ranks and the
                                    index of the best
          evaluation_pairs.parquet  comparisons, columns as in reward.parquet
          quarantine.jsonl          rows that cannot be used: file, row, reason
          card.json                 what was read, kept and dropped and why; histograms; sample pairs

Rows are in the order of question ids, and every table carries site, links, authors and licences (CC BY-SA
requires them). A comparison in the source stays a comparison; if answers have scores, the higher score wins.
What the source calls a test set is used for evaluation only.

Differences from the StackLLaMA article: a question's best answer is used once for fine-tuning, not once per
pair; no question is in two splits, nor are near duplicates; equal answers to a question are dropped. The rest
of the recipe (scores, at most ten pairs per question) is kept.

Memory grows by numbers of the questions alone, and every core has work. Blocks of rows become files of
records sorted by question (read_source.py); these are cut into partitions, ranges of question ids, and each
partition is filtered into a file of questions (partitions.py); splits are assigned from numbers alone
(split_assignment.py); each file of questions adds its rows to the tables in turn. The result does not depend
on how blocks and partitions were cut, nor on which process worked on which.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

from tasks.config.dump_files import UNKNOWN_SITE
from tasks.config.jobs import DataJob
from tasks.config.sections.data import Data
from tasks.config.sections.sources import ShellSite, StackExchangeDump
from tasks.dataset import sorted_files, tables
from tasks.dataset.curation import contamination, split_assignment
from tasks.dataset.curation.split_assignment import SplitAssignment
from tasks.dataset.readers import blocks
from tasks.dataset.readers.blocks import Block
from tasks.dataset.readers.quarantine import Place, Quarantine
from tasks.dataset.readers.user_names import UserNames
from tasks.dataset.splits import is_test
from tasks.dataset.statistics import Statistics
from tasks.programs.data_stage import card, partitions, read_source, source_warnings, work_folder
from tasks.programs.data_stage.data_run import NUM_STEPS, Counts, DataRun
from tasks.programs.data_stage.executors import open_parts
from tasks.programs.data_stage.partitions import (
    FilterCounts,
    Partition,
    TablePart,
    build_table_part,
    filter_partition,
)
from tasks.programs.data_stage.parts import counts_path, read_counts, read_outputs
from tasks.programs.data_stage.read_source import BlockCounts, BlockTask, NamesTask
from tasks.programs.data_stage.split_checks import check_splits
from tasks.programs.runtime.program import Run, main
from tasks.system.errors import DiskFailure, InputError

PARTITION_RECORDS = 2**14  # records (posts, comparisons) that a process has in memory at a time
PARTITION_BYTES = 2**26  # of their texts
BLOCK_SUFFIX = ".block"


def prepare(job: DataJob, run: Run) -> None:
    """Read the source, filter its questions, assign splits and write the tables."""
    run.rewind(0)  # steps whose parts are there are logged again
    source = run.inputs["source"]
    size = read_source.source_size(job.source, source)
    work = work_folder.open_folder(job, run)
    try:
        with open_parts(run) as parts:
            _warn_of_unknown_site(job, run, source)
            data_run = DataRun(
                job=job,
                run=run,
                source=source,
                work=work,
                parts=parts,
                counts=Counts.empty(),
                size=size,
            )
            _prepare(data_run)
    except DiskFailure:
        raise  # with free space the same command goes on
    except InputError:
        work_folder.clear(work)  # the user will change the input, and with it the work
        raise
    work_folder.clear(work)


def _warn_of_unknown_site(job: DataJob, run: Run, path: Path) -> None:
    if not isinstance(job.source, StackExchangeDump) or job.source.site:
        return
    if UNKNOWN_SITE in read_source.sites_of(job.source, path).values():
        run.warn(
            f"No name says which site {path.name} is of: links and authors are those of {UNKNOWN_SITE}. "
            "Set source.site."
        )


def _prepare(data_run: DataRun) -> None:
    artifact, warnings = data_run.run.artifact, data_run.counts.warnings
    # 1. Read the source into records by question
    with Quarantine(data_run.work / "quarantine.jsonl") as quarantine:
        record_files = _read_blocks(data_run, quarantine)
    refused_columns = [name for name, _ in warnings.refused.most_common(source_warnings.MOST_NAMES)]
    quarantine.check(data_run.source, data_run.job.data.max_bad_share, columns=refused_columns)
    for sentence in source_warnings.warnings(warnings, data_run.job.source, rows=quarantine.rows):
        data_run.run.warn(sentence)
    # 2. Filter the questions by the rules that look at one question at a time
    question_paths = _filter_questions(record_files, data_run)
    # 3. Find near duplicates and assign splits, which needs all questions together
    assignment = _assign_splits(question_paths, data_run.job.data, data_run.counts)
    check_splits(assignment, data_run)
    # 4. Write the tables and the card
    statistics = Statistics()
    parts = list(_iter_table_parts(question_paths, assignment, data_run))
    rows = _write_tables(parts, data_run, statistics)
    (data_run.work / "quarantine.jsonl").rename(artifact / "quarantine.jsonl")
    content = card.build_card(data_run, statistics, quarantine, assignment, rows)
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (artifact / "card.json").write_text(text, encoding="utf-8")
    data_run.run.finish(card.build_metrics(content))


# ------------------------------------------------------------------------------------ 1. read the source


def _read_blocks(data_run: DataRun, quarantine: Quarantine) -> list[Path]:
    """Return the sorted files of records of all blocks. Rows that cannot be used go to the quarantine."""
    counts, source = data_run.counts, data_run.job.source
    file, rows_before, record_files = "", 0, []
    done = data_run.work / "records.done"
    for output in data_run.parts.make(read_source.read_block, _iter_block_tasks(data_run), done=done):
        block = read_counts(output, BlockCounts)
        if block.file != file:
            file, rows_before = block.file, 0
        for number, reason in block.bad:
            quarantine(Place(block.file, rows_before + number), reason)
        rows_before += block.rows
        quarantine.rows += block.rows
        counts.read.update(block.read)
        counts.dropped.update(block.dropped)
        counts.warnings.update(block.warnings)
        if is_test(block.file) and not isinstance(source, ShellSite | StackExchangeDump):
            counts.tests[block.file] += block.rows
        record_files.append(output)
        output.with_suffix(BLOCK_SUFFIX).unlink(missing_ok=True)
        data_run.log_progress(block.bytes / data_run.size, **counts.read)
    return record_files


def _iter_block_tasks(data_run: DataRun) -> Iterator[BlockTask]:
    file, names, source = "", None, data_run.job.source
    sites = set(read_source.sites_of(source, data_run.source).values())
    for number, (block, site) in enumerate(read_source.iter_blocks(source, data_run.source)):
        if site and block.file != file:
            file = block.file
            names = _write_user_names(block.path, data_run.work / f"names{number:06}", data_run)
        output = data_run.work / f"records{number:06}.arrow"
        yield BlockTask(
            block=_store_content(block, output),
            source=source,
            site=site,
            several_sites=len(sites) > 1,
            output=output,
            names=names,
        )


def _store_content(block: Block, output: Path) -> Block:
    """Move the content to a file from which a worker makes ``output``, unless that is made."""
    is_made = counts_path(output).exists()
    return block if is_made else blocks.store_content(block, output.with_suffix(BLOCK_SUFFIX))


def _write_user_names(file: Path, folder: Path, data_run: DataRun) -> Path | None:
    """Write the names of a dump's users to a folder and return it; None if the dump has no table of users.

    It is called between the blocks of posts, and its parts are made by the same executor.
    """
    user_blocks = read_source.iter_user_blocks(file)
    if user_blocks is None:
        return None
    folder.mkdir(exist_ok=True)
    outputs = ((block, folder / f"{number}.names") for number, block in enumerate(user_blocks))
    tasks = (NamesTask(_store_content(block, output), output) for block, output in outputs)
    made = data_run.parts.make(read_source.read_names, tasks, done=folder / "done")
    UserNames(folder).write(orjson.loads(output.read_bytes()) for output in made)
    for path in folder.glob(f"*{BLOCK_SUFFIX}"):
        path.unlink()
    return folder


# --------------------------------------------------------------------------------- 2. filter the questions


def _filter_questions(record_files: list[Path], data_run: DataRun) -> list[Path]:
    """Return files of the questions that the rules keep, and delete the files of records."""
    done = data_run.work / "questions.done"
    tasks = [] if done.exists() else _build_partitions(record_files, data_run)
    count = len(read_outputs(done) if done.exists() else tasks)
    question_paths: list[Path] = []
    for output in data_run.parts.make(filter_partition, tasks, done=done):
        counts = read_counts(output, FilterCounts)
        question_paths.append(output)
        data_run.counts.dropped.update(counts.dropped)
        data_run.counts.masked.update(counts.masked)
        data_run.log_progress(1 + len(question_paths) / count)
    for path in record_files:
        path.unlink(missing_ok=True)
    return question_paths


def _build_partitions(record_files: list[Path], data_run: DataRun) -> list[Partition]:
    job = data_run.job
    ranges = sorted_files.partition(record_files, PARTITION_RECORDS, PARTITION_BYTES)
    ngrams = _write_ngrams(data_run.run, data_run.work / "evaluation_ngrams.npz")
    rules = partitions.rules_from_settings(job.data)
    return [
        Partition(
            slices=slices,
            source=job.source,
            rules=rules,
            evaluation_ngrams=ngrams,
            near_duplicates=job.data.alike < 1,
            output=data_run.work / f"questions{number:06}.arrow",
        )
        for number, slices in enumerate(ranges)
    ]


def _write_ngrams(run: Run, path: Path) -> Path | None:
    """Write the n-grams of the evaluation sets and return the file; None if no sets are given."""
    sets = [place for name, place in sorted(run.inputs.items()) if name.startswith("against")]
    if not sets:
        return None
    texts = (text for place in sets for text in contamination.read_texts(place))
    contamination.write(contamination.collect_ngrams(texts), path)
    return path


# --------------------------------------------------------------------------------------- 3. assign splits


def _assign_splits(question_paths: list[Path], data: Data, counts: Counts) -> SplitAssignment:
    shares = {"finetune": data.finetune_share, "reward": data.reward_share, "rl": data.rl_share}
    shares["evaluation"] = 1 - sum(shares.values())
    return split_assignment.assign_splits(
        question_paths,
        shares,
        counts.dropped,
        alike=data.alike,
        distinct=data.duplicates == "drop",
        per_author=data.max_questions_per_author,
    )


# -------------------------------------------------------------------------------------- 4. write the tables


def _iter_table_parts(
    question_paths: list[Path], assignment: SplitAssignment, data_run: DataRun
) -> Iterator[TablePart]:
    start, job = 0, data_run.job
    for number, path in enumerate(question_paths):
        with np.load(path.with_suffix(".npz")) as columns:
            end = start + len(columns["ids"])
        yield TablePart(
            questions=path,
            splits=assignment.splits[start:end].tobytes(),
            max_pairs=job.data.max_pairs,
            seed=job.seed,
            output=data_run.work / f"tables{number:06}",
        )
        start = end


def _write_tables(parts: list[TablePart], data_run: DataRun, statistics: Statistics) -> dict[str, int]:
    """Write every table, part after part. Return the number of rows of each."""
    artifact = data_run.run.artifact
    files = {name: tables.Table(name, artifact / f"{name}.parquet") for name in tables.COLUMNS}
    for done, folder in enumerate(data_run.parts.make(build_table_part, parts), 1):
        for name, table in files.items():
            table.add(folder / name)
        statistics.merge(read_counts(folder, Statistics))
        counts_path(folder).unlink()
        shutil.rmtree(folder)
        if done < len(parts):
            data_run.log_progress(2 + done / len(parts))
    for table in files.values():
        table.close()
    counts = {name: statistics.counts[name] for name in ("questions", "pairs")}
    data_run.log_progress(NUM_STEPS, **counts, answers=statistics.scores.total())
    return {name: table.rows for name, table in files.items()}


if __name__ == "__main__":
    main(prepare, DataJob)
