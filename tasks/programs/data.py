"""Votes or comparisons -> splits to fine-tune, to train a reward, to explore and to evaluate on.     python -m tasks.programs.data DIR

inputs    source  a dump's .7z, Posts.xml or Posts.csv, these also gzipped; or JSON lines, JSON lists or parquet, a file or a folder of them
artifact  finetune.parquet          the best answer of each question
          corpus.parquet            every kept answer of the same questions (the built-in base is pretrained on it)
          reward.parquet            comparisons
          rl.parquet                prompts
          evaluation.parquet        questions with all their answers, by id, the scores and the index of the best
          evaluation_pairs.parquet  comparisons, columns as in reward.parquet
          quarantine.jsonl          rows that cannot be used: file, row, reason
          card.json                 what was read, kept and dropped and why; histograms; sample pairs

Rows stand in the order of question ids, and every table carries site, links, authors and licences (CC BY-SA asks for them). A comparison that
somebody made stays one; where answers have scores, a higher one wins. What its source calls a test set is evaluated on and nothing else.
Not as in the StackLLaMA article: a question's best answer is fine-tuned on once, not once per pair; no question is in two splits, nor are two that
say nearly the same; equal answers to a question are dropped; all else of its recipe (scores, at most ten pairs) is kept.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.programs.config import Data, DataJob, InputError, Source, StackExchangeDump
from tasks.programs.entry import Run, main
from tasks.programs.source import HhRlhf, OwnRows, ShellSite, StackExchangePaired, StackExchangePreferences
from tasks.rlhf import hh_rlhf, own, published
from tasks.rlhf.posts import Post, read_posts
from tasks.rlhf.quarantine import Quarantine
from tasks.rlhf.questions import Answer, Pair, Question, best, older, pairs_of, usable
from tasks.rlhf.rows import Row, files_of, read_rows
from tasks.rlhf.splits import assign_splits
from tasks.rlhf.stack_exchange import assemble

BUILT_IN_SITE = "shell.example"
NUM_EXAMPLES = 3

TEXT, INTEGER, NUMBER, TEXTS = pa.string(), pa.int32(), pa.float64(), pa.list_(pa.string())
ABOUT_QUESTION = {"site": TEXT, "question_url": TEXT, "question_author": TEXT, "question_licence": TEXT}


def _about(role: str, kind: pa.DataType = TEXT) -> dict[str, pa.DataType]:
    return {f"{role}_url": kind, f"{role}_author": kind, f"{role}_licence": kind}


PROMPT = {"question_id": pa.int64(), "prompt": TEXT}
PAIR = {"chosen": TEXT, "rejected": TEXT, "chosen_score": NUMBER, "rejected_score": NUMBER}
COLUMNS = {
    "finetune": PROMPT | {"answer": TEXT, "score": NUMBER} | ABOUT_QUESTION | _about("answer"),
    "corpus": PROMPT | {"answer": TEXT, "score": NUMBER} | ABOUT_QUESTION | _about("answer"),
    "reward": PROMPT | PAIR | ABOUT_QUESTION | _about("chosen") | _about("rejected"),
    "rl": PROMPT | ABOUT_QUESTION,
    "evaluation": PROMPT | {"answers": TEXTS, "scores": pa.list_(NUMBER), "best": INTEGER} | ABOUT_QUESTION | _about("answer", TEXTS),
    "evaluation_pairs": PROMPT | PAIR | ABOUT_QUESTION | _about("chosen") | _about("rejected"),
}

Fields = dict[str, Any]
Watch = Callable[[int, int], None]
Pairs = Mapping[int, list[Pair]]  # by question id


def prepare(job: DataJob, run: Run) -> None:
    """Read, pair and split what the source holds."""
    run.rewind(0)  # it starts anew whenever it starts
    path = run.inputs["source"]
    read: Counter[str] = Counter()
    dropped: Counter[str] = Counter()

    # 1. Whatever the source holds to questions with answers
    unusable = run.directory / "quarantine.jsonl"
    with Quarantine(unusable) as bad:
        found = _distinct(_read(job.source, path, read, dropped, bad, run.log), dropped)
    bad.check(path, job.data.max_bad_share)
    lengths = {"min_chars": job.data.min_answer_chars, "max_chars": job.data.max_answer_chars}
    questions = [kept for question in found if (kept := usable(question, dropped, **lengths))]

    # 2. Comparisons
    pairs: Pairs = {question.id: pairs_of(question, max_pairs=job.data.max_pairs, seed=job.seed) for question in questions}
    if not any(pairs.values()):
        counts = " and ".join(f"{count} {what}" for what, count in sorted(read.items(), reverse=True)) or "nothing"
        raise InputError(
            f"{path} has no question with two differently scored answers (found {counts}; {len(questions)} questions with a usable answer): "
            "give a dump with bodies and votes, or rows with comparisons."
        )

    # 3. Splits
    splits = _split(questions, job.data)
    _refuse_empty(splits, pairs, job.data)
    dropped["questions of the reward split without two differently scored answers"] = sum(not pairs[q.id] for q in splits["reward"])

    # 4. Tables and card
    tables = {name: list(rows) for name, rows in _tables(splits, pairs).items()}
    for name, rows in tables.items():
        _write_table(rows, COLUMNS[name], run.artifact / f"{name}.parquet")
    unusable.rename(run.artifact / unusable.name)
    card = _card(questions, pairs) | {
        "kind": job.source.kind,
        "read": dict(sorted(read.items())),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "quarantined": dict(sorted(bad.reasons.items())),
        "rows_seen": bad.rows,
        "split_questions": {name: len(members) for name, members in splits.items()},
        "rows": {name: len(rows) for name, rows in tables.items()},
    }
    (run.artifact / "card.json").write_text(json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in files_of(path))
    run.log(size, size, questions=len(questions), answers=card["kept"]["answers"], pairs=card["kept"]["pairs"])
    run.finish(_metrics(card))


def _read(source: Source, path: Path, read: Counter[str], dropped: Counter[str], bad: Quarantine, watch: Watch) -> Iterable[Question]:
    """Every question that the source holds."""
    if isinstance(source, ShellSite | StackExchangeDump):
        site = source.site if isinstance(source, StackExchangeDump) else BUILT_IN_SITE
        return assemble(_posts(read_posts(path, dropped, bad, watch), read), dropped, site=site)
    rows = _rows(read_rows(path, bad, watch), read)
    match source:
        case StackExchangePreferences():
            return published.preferences(rows, bad)
        case StackExchangePaired():
            return published.paired(rows, bad).questions(dropped)
        case HhRlhf():
            return hh_rlhf.gather(rows, dropped, bad, one_turn=source.turns == "single").questions(dropped)
        case OwnRows():
            columns = own.Columns(**source.model_dump(include=set(own.Columns._fields)))
            return own.gather(rows, bad, columns, site=source.site, licence=source.licence).questions(dropped)


def _posts(posts: Iterable[Post], read: Counter[str]) -> Iterator[Post]:
    for post in posts:
        read["answers" if post.parent else "questions"] += 1
        yield post


def _rows(rows: Iterable[Row], read: Counter[str]) -> Iterator[Row]:
    for row in rows:
        read["rows"] += 1
        yield row


def _distinct(questions: Iterable[Question], dropped: Counter[str]) -> list[Question]:
    """By id; of two with the same id the smaller, so that order does not matter."""
    found: dict[int, Question] = {}
    for question in questions:
        if question.id in found:
            dropped["repeated questions"] += 1
            question = min(question, found[question.id])
        found[question.id] = question
    return [found[number] for number in sorted(found)]


def _split(questions: list[Question], data: Data) -> dict[str, list[Question]]:
    shares = {"finetune": data.finetune_share, "reward": data.reward_share, "rl": data.rl_share}
    shares["evaluation"] = 1 - sum(shares.values())
    splits: dict[str, list[Question]] = {name: [] for name in shares}
    given = {q.id: q.split for q in questions if q.split}
    if len(given) == len(questions):  # a test set alone is split like any other set
        given = {}
    chosen = assign_splits([(q.id, q.prompt) for q in questions], shares, given, alike=data.alike)
    for question, name in zip(questions, chosen, strict=True):
        splits[name].append(question)
    return splits


def _refuse_empty(splits: Mapping[str, list[Question]], pairs: Pairs, data: Data) -> None:
    total = sum(map(len, splits.values()))
    for name, members in splits.items():
        usable = [q for q in members if pairs[q.id]] if name == "reward" else members
        if usable or (name == "rl" and not data.rl_share):  # DPO needs no prompts of its own
            continue
        remedy = "lower data.finetune_share, data.reward_share or data.rl_share" if name == "evaluation" else f"raise data.{name}_share"
        what = "questions with differently scored answers" if name == "reward" else "questions"
        raise InputError(f"The {name} split has no {what} (of {total} usable questions in all): {remedy}, or give a dump with more questions.")


def _tables(splits: Mapping[str, list[Question]], pairs: Pairs) -> dict[str, Iterator[Fields]]:
    return {
        "finetune": (_answered(q, q.answers[best(q.answers)]) for q in splits["finetune"]),
        "corpus": (_answered(q, answer) for q in splits["finetune"] for answer in q.answers),
        "reward": (_pair(q, q.answers[i], q.answers[j]) for q in splits["reward"] for i, j in pairs[q.id]),
        "rl": (_prompt(q) for q in splits["rl"]),
        "evaluation": (_ranked(q) for q in splits["evaluation"]),
        "evaluation_pairs": (_pair(q, q.answers[i], q.answers[j]) for q in splits["evaluation"] for i, j in pairs[q.id]),
    }


def _prompt(question: Question) -> Fields:
    row = {"question_id": question.id, "prompt": question.prompt, "site": question.site, "question_url": question.url}
    return row | {"question_author": question.author, "question_licence": question.licence}


def _source(role: str, answer: Answer) -> Fields:
    return {f"{role}_url": answer.url, f"{role}_author": answer.author, f"{role}_licence": answer.licence}


def _answered(question: Question, answer: Answer) -> Fields:
    return _prompt(question) | {"answer": answer.text, "score": answer.score} | _source("answer", answer)


def _pair(question: Question, chosen: Answer, rejected: Answer) -> Fields:
    texts = {"chosen": chosen.text, "rejected": rejected.text, "chosen_score": chosen.score, "rejected_score": rejected.score}
    return _prompt(question) | texts | _source("chosen", chosen) | _source("rejected", rejected)


def _ranked(question: Question) -> Fields:
    """All answers in the order of their ids, so that a place in the list says nothing about quality."""
    answers = question.answers
    sources = [_source("answer", answer) for answer in answers]
    row = {"answers": [a.text for a in answers], "scores": [a.score for a in answers], "best": best(answers)}
    return _prompt(question) | row | {name: [source[name] for source in sources] for name in sources[0]}


def _write_table(rows: list[Fields], columns: Mapping[str, pa.DataType], path: Path) -> None:
    """Equal rows give equal bytes: nothing of the writer is left to the library's defaults of the day."""
    table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows], schema=pa.schema(columns.items()))
    pq.write_table(table, path, version="2.6", compression="zstd", compression_level=3, use_dictionary=True, row_group_size=65_536)


def _card(questions: list[Question], pairs: Pairs) -> dict[str, Any]:
    """What the whole set, all splits together, is like."""
    answers = [answer for question in questions for answer in question.answers]
    compared = [(q, q.answers[i], q.answers[j]) for q in questions for i, j in pairs[q.id]]
    dated = [pair for pair in compared if pair[1].created or pair[1].votes or pair[2].votes]  # elsewhere ids say nothing about age
    examples = [compared[len(compared) * k // NUM_EXAMPLES] for k in range(min(NUM_EXAMPLES, len(compared)))]
    licences = Counter(post.licence for posts in (questions, answers) for post in posts)
    return {
        "site": ", ".join(sorted({question.site for question in questions})),
        "sites": dict(sorted(Counter(question.site for question in questions).items())),
        "kept": {"questions": len(questions), "answers": len(answers), "pairs": len(compared)},
        "questions_with_pairs": sum(map(bool, pairs.values())),
        "scores": [{"score": points, "count": count} for points, count in sorted(Counter(a.score for a in answers).items())],
        "answer_chars": _histogram([len(answer.text) for answer in answers]),
        "prompt_chars": _histogram([len(question.prompt) for question in questions]),
        "longer_wins": sum(len(good.text) > len(bad.text) for _, good, bad in compared) / len(compared),
        "older_wins": sum(older(good, bad) for _, good, bad in dated) / len(dated) if dated else None,
        "licences": dict(sorted(licences.items())),
        "examples": [_pair(question, chosen, rejected) for question, chosen, rejected in examples],
    }


def _histogram(sizes: Iterable[int]) -> list[dict[str, int]]:
    """Counts in bins that double in width."""
    counts = Counter(size.bit_length() for size in sizes)
    return [{"from": 1 << bits - 1, "below": 1 << bits, "count": counts[bits]} for bits in sorted(counts)]


def _metrics(card: Mapping[str, Any]) -> dict[str, float]:
    kept, rows = card["kept"], card["rows"]
    return {
        "data.questions": kept["questions"],
        "data.answers": kept["answers"],
        "data.pairs": kept["pairs"],
        "data.dropped": sum(card["dropped"].values()),
        "data.quarantined": sum(card["quarantined"].values()),
        "data.longer_wins": card["longer_wins"],
        **({"data.older_wins": card["older_wins"]} if card["older_wins"] is not None else {}),
        "data.finetune_rows": rows["finetune"],
        "data.reward_pairs": rows["reward"],
        "data.rl_prompts": rows["rl"],
        "data.evaluation_questions": rows["evaluation"],
        "data.evaluation_pairs": rows["evaluation_pairs"],
    }


if __name__ == "__main__":
    main(prepare, DataJob)
