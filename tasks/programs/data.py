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

from tasks.programs import reading
from tasks.programs.config import Data, DataJob, InputError, Source
from tasks.programs.entry import Run, main
from tasks.rlhf import kin, rules, segments, shelves, tables
from tasks.rlhf.contamination import grams, texts_of
from tasks.rlhf.crew import Crew, crew
from tasks.rlhf.kin import Fates
from tasks.rlhf.people import Names, names_in
from tasks.rlhf.quarantine import Place, Quarantine
from tasks.rlhf.questions import count_pairs, pairs_of
from tasks.rlhf.segments import Slice
from tasks.rlhf.shelves import SPLITS
from tasks.rlhf.tally import Tally

RANGE = 2**14  # records (posts, comparisons) that are objects in memory at a time


class Counts(NamedTuple):
    """What was seen, left out and masked."""

    read: Counter[str]
    dropped: Counter[str]
    hidden: Counter[str]


def prepare(job: DataJob, run: Run) -> None:
    """Read, pair and split what the source holds."""
    run.rewind(0)  # it starts anew whenever it starts
    work, path, data = run.directory / "work", run.inputs["source"], job.data
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    size, counts = reading.size_of(job.source, path), Counts(Counter(), Counter(), Counter())
    with crew(run.machine.threads) as hands:
        # 1. Whatever the source holds to records by question
        unusable = work / "quarantine.jsonl"
        with Quarantine(unusable) as bad:
            found = _read(job.source, path, work, hands, counts, bad, run, size)
        bad.check(path, data.max_bad_share)
        # 2. Records to the questions that the rules keep
        keep = _rules(data, run)
        ranges = segments.ranges(found, RANGE)
        stacks = [Stack(slices, job.source, keep, data.alike < 1, work / f"shelf{place:06}.jsonl") for place, slices in enumerate(ranges)]
        shelved = []
        for made in hands.map(shelve, stacks):
            shelved.append(made.path)
            counts.dropped.update(made.dropped)
            counts.hidden.update(made.hidden)
            _progress(run, size, 1 + len(shelved) / len(stacks))
        for segment in found:
            segment.unlink()
        # 3. Splits, and what only all questions together can tell
        fates = _fates(shelved, data, counts)
        _refuse_empty(fates, data, path, counts)
        # 4. Tables and card
        lots = list(_lots(shelved, fates, job, work))
        tally = Tally()
        rows = _fill(hands, lots, run, tally, size)
    unusable.rename(run.artifact / unusable.name)
    shutil.rmtree(work)
    about = _card(job, tally, counts, bad, fates, rows)
    (run.artifact / "card.json").write_text(json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    run.finish(_metrics(about))


# ------------------------------------------------------------------------------------------------------------------- 1. reading


def _read(source: Source, path: Path, work: Path, hands: Crew, counts: Counts, bad: Quarantine, run: Run, size: int) -> list[Path]:
    """Segments of all blocks; rows that cannot be used are told with their place in the file."""
    file, before, found = "", 0, []
    for taken in hands.map(reading.take, _blocks(source, path, work, hands)):
        if taken.file != file:
            file, before = taken.file, 0
        for number, reason in taken.bad:
            bad(Place(taken.file, before + number), reason)
        before += taken.rows
        bad.rows += taken.rows
        counts.read.update(taken.read)
        counts.dropped.update(taken.dropped)
        found.append(taken.segment)
        _progress(run, size, taken.bytes / size, **counts.read)
    return found


def _blocks(source: Source, path: Path, work: Path, hands: Crew) -> Iterator[reading.Task]:
    file, names = "", None
    for number, (block, site) in enumerate(reading.cut(source, path)):
        if site and block.file != file:
            file, names = block.file, _names(path, block.path, work / f"names{number:06}", hands)
        yield reading.Task(block, source, site, path.is_dir(), work / f"segment{number:06}.jsonl", names)


def _names(path: Path, file: Path, folder: Path, hands: Crew) -> Path | None:
    """The names of a dump's users, where it has them."""
    users = reading.users_of(path, file)
    if users is None:
        return None
    Names(folder).write(hands.map(names_in, users))
    return folder


def _progress(run: Run, size: int, thirds: float, **counts: float) -> None:
    """In bytes of the source; reading is the first third of the way."""
    run.log(int(size * thirds), 3 * size, **counts)


# ---------------------------------------------------------------------------------------------------------------- 2. questions


class Stack(NamedTuple):
    """A range of records, and where its questions go."""

    slices: list[Slice]
    source: Source
    keep: rules.Rules
    near: bool
    path: Path


class Shelved(NamedTuple):
    path: Path
    dropped: Counter[str]
    hidden: Counter[str]


def _rules(data: Data, run: Run) -> rules.Rules:
    sets = [text for name, place in sorted(run.inputs.items()) if name.startswith("against") for text in texts_of(place)]
    lengths = (data.min_answer_chars, data.max_answer_chars, data.max_prompt_chars)
    return rules.Rules(*lengths, data.personal, data.languages, grams(sets) if sets else None)


def shelve(stack: Stack) -> Shelved:
    """The questions of a range that the rules keep, on disk."""
    dropped: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    found = reading.questions(stack.source, segments.read(stack.slices), dropped)
    kept = [question for one in found if (question := rules.admitted(one, stack.keep, dropped, hidden))]
    shelves.write(kept, stack.path, near=stack.near)
    return Shelved(stack.path, dropped, hidden)


# ------------------------------------------------------------------------------------------------------------------- 3. splits


def _fates(shelved: list[Path], data: Data, counts: Counts) -> Fates:
    shares = {"finetune": data.finetune_share, "reward": data.reward_share, "rl": data.rl_share}
    shares["evaluation"] = 1 - sum(shares.values())
    distinct, cap = data.duplicates == "drop", data.max_questions_per_author
    return kin.decide(shelved, shares, counts.dropped, alike=data.alike, distinct=distinct, per_author=cap)


def _refuse_empty(fates: Fates, data: Data, path: Path, counts: Counts) -> None:
    if not (fates.comparable & (fates.splits > 0)).any():
        read = " and ".join(f"{count} {what}" for what, count in sorted(counts.read.items(), reverse=True)) or "nothing"
        kept = int((fates.splits > 0).sum())
        raise InputError(
            f"{path} has no question with two differently scored answers (found {read}; {kept} questions with a usable answer): "
            "give a dump with bodies and votes, or rows with comparisons."
        )
    total = int((fates.splits > 0).sum())
    for number, name in enumerate(SPLITS[1:], 1):
        wanted = (fates.splits == number) & (fates.comparable if name == "reward" else True)
        if wanted.any() or (name == "rl" and not data.rl_share):  # DPO needs no prompts of its own
            continue
        remedy = "lower data.finetune_share, data.reward_share or data.rl_share" if name == "evaluation" else f"raise data.{name}_share"
        what = "questions with differently scored answers" if name == "reward" else "questions"
        raise InputError(f"The {name} split has no {what} (of {total} usable questions in all): {remedy}, or give a dump with more questions.")


# ------------------------------------------------------------------------------------------------------------------- 4. tables


class Lot(NamedTuple):
    """A shelf with the splits of its questions, and where their rows go."""

    shelf: Path
    splits: bytes  # a place in SPLITS of each
    max_pairs: int
    seed: int
    folder: Path


def _lots(shelved: list[Path], fates: Fates, job: DataJob, work: Path) -> Iterator[Lot]:
    start = 0
    for number, path in enumerate(shelved):
        with np.load(path.with_suffix(".npz")) as columns:
            end = start + len(columns["ids"])
        yield Lot(path, fates.splits[start:end].tobytes(), job.data.max_pairs, job.seed, work / f"lot{number:06}")
        start = end


def tabulate(lot: Lot) -> tuple[Path, Tally]:
    """The rows of a shelf's questions, a part for every table."""
    tally = Tally()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in tables.COLUMNS}
    for question, split in zip(shelves.read(lot.shelf), lot.splits, strict=True):
        if split:
            pairs, most = pairs_of(question, max_pairs=lot.max_pairs, seed=lot.seed), count_pairs(question)
            tally.add(question, pairs, most)
            for name, row in tables.rows_of(question, SPLITS[split], pairs, most):
                rows[name].append(row)
    lot.folder.mkdir()
    for name, part in rows.items():
        tables.write_part(name, part, lot.folder / name)
    lot.shelf.unlink()
    return lot.folder, tally


def _fill(hands: Crew, lots: list[Lot], run: Run, tally: Tally, size: int) -> dict[str, int]:
    """Write every table, part after part; gives their numbers of rows."""
    files = {name: tables.Table(name, run.artifact / f"{name}.parquet") for name in tables.COLUMNS}
    for done, (folder, more) in enumerate(hands.map(tabulate, lots), 1):
        for name, table in files.items():
            table.add(folder / name)
        shutil.rmtree(folder)
        tally.merge(more)
        if done < len(lots):
            _progress(run, size, 2 + done / len(lots))
    for table in files.values():
        table.close()
    about = {name: tally.counts[name] for name in ("questions", "pairs")}
    _progress(run, size, 3, **about, answers=tally.scores.total())
    return {name: table.rows for name, table in files.items()}


def _card(job: DataJob, tally: Tally, counts: Counts, bad: Quarantine, fates: Fates, rows: Mapping[str, int]) -> dict[str, Any]:
    counted = np.bincount(fates.splits, minlength=len(SPLITS)).tolist()
    unpaired = int(((fates.splits == SPLITS.index("reward")) & ~fates.comparable).sum())
    counts.dropped["questions of the reward split without two differently scored answers"] += unpaired
    return tally.card() | {
        "kind": job.source.kind,
        "rules": job.data.model_dump(mode="json", exclude={"against"}),
        "read": dict(sorted(counts.read.items())),
        "dropped": {reason: count for reason, count in sorted(counts.dropped.items()) if count},
        "masked": dict(sorted(counts.hidden.items())),
        "quarantined": dict(sorted(bad.reasons.items())),
        "rows_seen": bad.rows,
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
