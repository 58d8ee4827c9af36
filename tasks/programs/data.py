"""Votes or comparisons -> splits to fine-tune, to train a reward, to explore and to evaluate on.     python -m tasks.programs.data DIR

inputs    source  a dump's .7z, Posts.xml or Posts.csv, these also gzipped, or a folder of several sites'; or JSON lines, JSON lists or parquet, a
                  file or a folder of them
          against0, against1, ...  evaluation sets that are used later, in files of rows or lines
artifact  finetune.parquet          the best answer of each question
          corpus.parquet            every kept answer of the same questions (the built-in base is pretrained on it)
          reward.parquet            comparisons, each with the gap and ranks of its answers and the number of comparisons it was drawn from
          reward_groups.parquet     the same questions with all their answers, as in evaluation.parquet
          rl.parquet                prompts
          evaluation.parquet        questions with all their answers, by id, the scores, the ranks and the index of the best
          evaluation_pairs.parquet  comparisons, columns as in reward.parquet
          quarantine.jsonl          rows that cannot be used: file, row, reason
          card.json                 what was read, kept and dropped and why; histograms; sample pairs

Rows stand in the order of question ids, and every table carries site, links, authors and licences (CC BY-SA asks for them). A comparison that
somebody made stays one; where answers have scores, a higher one wins. What its source calls a test set is evaluated on and nothing else.
Not as in the StackLLaMA article: a question's best answer is fine-tuned on once, not once per pair; no question is in two splits, nor are two that
say nearly the same; equal answers to a question are dropped; all else of its recipe (scores, at most ten pairs) is kept.

Memory does not grow with the source, and every core has work: blocks of rows become segments of records sorted by question (reading.py), ranges of
these become shelves of kept questions, fates are decided on numbers alone (kin.py), and each shelf gives its rows to the tables in turn. How blocks
and ranges were cut, and which process had which, cannot be seen in the result.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.config.data import Data
from tasks.config.dump_files import UNKNOWN_SITE
from tasks.config.jobs import DataJob
from tasks.config.sources import ShellSite, StackExchangeDump
from tasks.dataset import sorted_files, tables
from tasks.dataset.curation import contamination, split_assignment
from tasks.dataset.curation.question_files import SPLITS
from tasks.dataset.curation.split_assignment import SplitAssignment
from tasks.dataset.readers import blocks
from tasks.dataset.readers.blocks import Block
from tasks.dataset.readers.quarantine import Place, Quarantine
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.dataset.sources.user_names import UserNames, read_user_names
from tasks.dataset.splits import is_test
from tasks.dataset.statistics import Statistics
from tasks.programs.data_stage import partitions, read_source, source_warnings, work_folder
from tasks.programs.data_stage.partitions import Partition, TablePart, build_table_part, filter_partition
from tasks.programs.data_stage.worker_pool import WorkerPool, open_worker_pool
from tasks.programs.runtime.program import Run, main
from tasks.system.errors import InputError

PARTITION_RECORDS = 2**14  # records (posts, comparisons) that are objects in memory at a time
BLOCK_SUFFIX = ".block"


class Counts(NamedTuple):
    """What was seen, left out and masked."""

    read: Counter[str]
    dropped: Counter[str]
    hidden: Counter[str]
    tests: Counter[str]  # rows of files that are named as a test set, by file
    seen: RowWarnings  # what was odd about a user's own rows

    @classmethod
    def empty(cls) -> "Counts":
        return cls(Counter(), Counter(), Counter(), Counter(), RowWarnings.empty())


class DataRun(NamedTuple):
    """Where the work is done."""

    job: DataJob
    run: Run
    source: Path
    work: Path  # what is half done
    hands: WorkerPool
    counts: Counts
    size: int  # bytes of the source

    def progress(self, thirds: float, **counts: float) -> None:
        """In bytes of the source; reading is the first third of the way."""
        self.run.log_bytes(int(self.size * thirds / 3), self.size, **counts)


def prepare(job: DataJob, run: Run) -> None:
    """Read, pair and split what the source holds."""
    run.rewind(0)  # steps whose results are noted are told again
    path, asks = run.inputs["source"], run.directory / "asks"
    size, counts = read_source.source_size(job.source, path), Counts.empty()
    work = work_folder.open_folder(job, run)
    try:
        with open_worker_pool(run.machine.threads, work / "notes", asks if asks.exists() else None) as hands:
            _warn_of_unknown_site(job, run, path)
            _prepare(DataRun(job, run, path, work, hands, counts, size))
    except InputError:
        work_folder.clear(work)  # with other input it is other work
        raise
    work_folder.clear(work)


def _warn_of_unknown_site(job: DataJob, run: Run, path: Path) -> None:
    if (
        isinstance(job.source, StackExchangeDump)
        and not job.source.site
        and UNKNOWN_SITE in read_source.sites_of(job.source, path).values()
    ):
        run.warn(
            f"No name says which site {path.name} is of: links and authors are those of {UNKNOWN_SITE}. Set source.site."
        )


def _prepare(desk: DataRun) -> None:
    data, artifact = desk.job.data, desk.run.artifact
    # 1. Whatever the source holds to records by question
    with Quarantine(desk.work / "quarantine.jsonl") as bad:
        found = _read_source(desk, bad)
    bad.check(
        desk.source,
        data.max_bad_share,
        columns=[name for name, _ in desk.counts.seen.refused.most_common(source_warnings.MOST_NAMES)],
    )
    for sentence in source_warnings.warnings(desk.counts.seen, desk.job.source, rows=bad.rows):
        desk.run.warn(sentence)
    # 2. Records to the questions that the rules keep
    shelved = _filter_questions(found, desk)
    # 3. Splits, and what only all questions together can tell
    fates = _assign_splits(shelved, data, desk.counts)
    _refuse_empty(fates, desk)
    # 4. Tables and card
    tally = Statistics()
    rows = _write_tables(list(_iter_table_parts(shelved, fates, desk)), desk, tally)
    (desk.work / "quarantine.jsonl").rename(artifact / "quarantine.jsonl")
    about = _card(desk, tally, bad, fates, rows)
    (artifact / "card.json").write_text(
        json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    desk.run.finish(_metrics(about))


# ------------------------------------------------------------------------------------------------------------------- 1. reading


def _read_source(desk: DataRun, bad: Quarantine) -> list[Path]:
    """Segments of all blocks; rows that cannot be used are told with their place in the file."""
    file, before, found = "", 0, []
    for taken in desk.hands.map(read_source.read_block, _iter_block_tasks(desk), noted=True):
        if taken.file != file:
            file, before = taken.file, 0
        for number, reason in taken.bad:
            bad(Place(taken.file, before + number), reason)
        before += taken.rows
        bad.rows += taken.rows
        desk.counts.read.update(taken.read)
        desk.counts.dropped.update(taken.dropped)
        desk.counts.seen.update(taken.seen)
        if is_test(taken.file) and not isinstance(desk.job.source, ShellSite | StackExchangeDump):
            desk.counts.tests[taken.file] += taken.rows
        found.append(taken.segment)
        taken.segment.with_suffix(BLOCK_SUFFIX).unlink(missing_ok=True)
        desk.progress(taken.bytes / desk.size, **desk.counts.read)
    return found


def _iter_block_tasks(desk: DataRun) -> Iterator[read_source.BlockTask]:
    file, names, source = "", None, desk.job.source
    sites = set(read_source.sites_of(source, desk.source).values())
    for number, (block, site) in enumerate(read_source.iter_blocks(source, desk.source)):
        if site and block.file != file:
            file, names = block.file, _write_user_names(block.path, desk.work / f"names{number:06}", desk)
        segment = desk.work / f"segment{number:06}.jsonl"
        yield read_source.BlockTask(
            _store_block(block, segment, desk.hands), source, site, len(sites) > 1, segment, names
        )


def _store_block(block: Block, path: Path, hands: WorkerPool) -> Block:
    """What is done elsewhere finds its block on disk."""
    return blocks.write_content(block, path.with_suffix(BLOCK_SUFFIX)) if hands.asks else block


def _write_user_names(file: Path, folder: Path, desk: DataRun) -> Path | None:
    """The names of a dump's users, where it has them."""
    users = read_source.iter_user_blocks(file)
    if users is None:
        return None
    folder.mkdir(exist_ok=True)
    UserNames(folder).write(
        desk.hands.map(
            read_user_names,
            (_store_block(block, folder / str(number), desk.hands) for number, block in enumerate(users)),
        )
    )
    for laid in folder.glob(f"*{BLOCK_SUFFIX}"):
        laid.unlink()
    return folder


# ---------------------------------------------------------------------------------------------------------------- 2. questions


def _filter_questions(found: list[Path], desk: DataRun) -> list[Path]:
    """Shelves of the questions that the rules keep; the segments are gone then."""
    count = desk.hands.noted(filter_partition)
    stacks = [] if count is not None else _iter_partitions(found, desk)
    count, shelved = len(stacks) if count is None else count, []
    for made in desk.hands.map(filter_partition, stacks, noted=True):
        shelved.append(made.path)
        desk.counts.dropped.update(made.dropped)
        desk.counts.hidden.update(made.hidden)
        desk.progress(1 + len(shelved) / count)
    for segment in found:
        segment.unlink(missing_ok=True)
    return shelved


def _iter_partitions(found: list[Path], desk: DataRun) -> list[Partition]:
    job, keep, foreign = (
        desk.job,
        partitions.rules_from_settings(desk.job.data),
        _write_ngrams(desk.run, desk.work / "foreign.npz"),
    )
    shelf = "shelf{:06}.jsonl".format
    places = enumerate(sorted_files.partition(found, PARTITION_RECORDS))
    return [
        Partition(slices, job.source, keep, foreign, job.data.alike < 1, desk.work / shelf(place))
        for place, slices in places
    ]


def _write_ngrams(run: Run, path: Path) -> Path | None:
    sets = [
        text
        for name, place in sorted(run.inputs.items())
        if name.startswith("against")
        for text in contamination.read_texts(place)
    ]
    if not sets:
        return None
    contamination.write(contamination.collect_ngrams(sets), path)
    return path


# ------------------------------------------------------------------------------------------------------------------- 3. splits


def _assign_splits(shelved: list[Path], data: Data, counts: Counts) -> SplitAssignment:
    shares = {"finetune": data.finetune_share, "reward": data.reward_share, "rl": data.rl_share}
    shares["evaluation"] = 1 - sum(shares.values())
    distinct, cap = data.duplicates == "drop", data.max_questions_per_author
    return split_assignment.assign_splits(
        shelved, shares, counts.dropped, alike=data.alike, distinct=distinct, per_author=cap
    )


def _refuse_empty(fates: SplitAssignment, desk: DataRun) -> None:
    data, counts = desk.job.data, desk.counts
    if not (fates.comparable & (fates.splits > 0)).any():
        read = (
            " and ".join(f"{count} {what}" for what, count in sorted(counts.read.items(), reverse=True))
            or "nothing"
        )
        kept = int((fates.splits > 0).sum())
        raise InputError(
            f"{desk.source} has no question with two differently scored answers (found {read}; {kept} questions with a usable answer): "
            "give a dump with bodies and votes, or rows with comparisons."
        )
    total = int((fates.splits > 0).sum())
    for number, name in enumerate(SPLITS[1:], 1):
        wanted = (fates.splits == number) & (fates.comparable if name == "reward" else True)
        if wanted.any() or (name == "rl" and not data.rl_share):  # DPO needs no prompts of its own
            continue
        remedy = (
            "lower data.finetune_share, data.reward_share or data.rl_share"
            if name == "evaluation"
            else f"raise data.{name}_share"
        )
        what = "questions with differently scored answers" if name == "reward" else "questions"
        raise InputError(
            f"The {name} split has no {what} (of {total} usable questions in all): {remedy}, or give a dump with more questions."
        )


# ------------------------------------------------------------------------------------------------------------------- 4. tables


def _iter_table_parts(shelved: list[Path], fates: SplitAssignment, desk: DataRun) -> Iterator[TablePart]:
    start, job = 0, desk.job
    for number, path in enumerate(shelved):
        with np.load(path.with_suffix(".npz")) as columns:
            end = start + len(columns["ids"])
        yield TablePart(
            path,
            fates.splits[start:end].tobytes(),
            job.data.max_pairs,
            job.seed,
            desk.work / f"lot{number:06}",
        )
        start = end


def _write_tables(lots: list[TablePart], desk: DataRun, tally: Statistics) -> dict[str, int]:
    """Write every table, part after part; gives their numbers of rows."""
    files = {name: tables.Table(name, desk.run.artifact / f"{name}.parquet") for name in tables.COLUMNS}
    for done, (folder, more) in enumerate(desk.hands.map(build_table_part, lots), 1):
        for name, table in files.items():
            table.add(folder / name)
        shutil.rmtree(folder)
        tally.merge(more)
        if done < len(lots):
            desk.progress(2 + done / len(lots))
    for table in files.values():
        table.close()
    about = {name: tally.counts[name] for name in ("questions", "pairs")}
    desk.progress(3, **about, answers=tally.scores.total())
    return {name: table.rows for name, table in files.items()}


def _card(
    desk: DataRun, tally: Statistics, bad: Quarantine, fates: SplitAssignment, rows: Mapping[str, int]
) -> dict[str, Any]:
    job, counts = desk.job, desk.counts
    counted = np.bincount(fates.splits, minlength=len(SPLITS)).tolist()
    unpaired = int(((fates.splits == SPLITS.index("reward")) & ~fates.comparable).sum())
    counts.dropped["questions of the reward split without two differently scored answers"] += unpaired
    return tally.card() | {
        "kind": job.source.kind,
        "rules": job.data.model_dump(mode="json", exclude={"decontaminate_against"}),
        "read": dict(sorted(counts.read.items())),
        "dropped": {reason: count for reason, count in sorted(counts.dropped.items()) if count},
        "masked": dict(sorted(counts.hidden.items())),
        "quarantined": dict(sorted(bad.reasons.items())),
        "rows_seen": bad.rows,
        **source_warnings.card_columns(counts.seen, counts.tests, rows=bad.rows),
        "other_files": read_source.other_files(job.source, desk.source)[: source_warnings.MOST_NAMES],
        "split_questions": dict(zip(SPLITS[1:], counted[1:], strict=True)),
        "rows": dict(rows),
    }


def _metrics(about: Mapping[str, Any]) -> dict[str, float]:
    kept, rows = about["kept"], about["rows"]
    return {
        "data.questions": kept["questions"],
        "data.answers": kept["answers"],
        "data.pairs": kept["pairs"],
        "data.dropped": sum(about["dropped"].values()),
        "data.quarantined": sum(about["quarantined"].values()),
        "data.longer_wins": about["longer_wins"],
        **({"data.older_wins": about["older_wins"]} if about["older_wins"] is not None else {}),
        "data.finetune_rows": rows["finetune"],
        "data.reward_pairs": rows["reward"],
        "data.rl_prompts": rows["rl"],
        "data.evaluation_questions": rows["evaluation"],
    }


if __name__ == "__main__":
    main(prepare, DataJob)
