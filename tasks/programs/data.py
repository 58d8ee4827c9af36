"""Posts with votes -> splits to fine-tune, to train a reward, to explore and to evaluate on.     python -m tasks.programs.data DIR

inputs    posts   Posts.xml, Posts.csv or either gzipped
artifact  finetune.parquet          the best answer of each question
          corpus.parquet            every kept answer of the same questions (the built-in base is pretrained on it)
          reward.parquet            comparisons
          rl.parquet                prompts
          evaluation.parquet        questions with all their answers, by id, the scores and the index of the best
          evaluation_pairs.parquet  comparisons, columns as in reward.parquet
          card.json                 what was read, kept and dropped and why; histograms; sample pairs

Rows stand in the order of question ids, and every table carries site, links, authors and licences (CC BY-SA asks for them).
Not as in the StackLLaMA article: a question's best answer is fine-tuned on once, not once per pair; no question is in two splits, nor are two of
equal text; equal answers to a question are dropped; all else of its recipe (scores, at most ten pairs) is kept.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.programs.config import Data, DataJob, InputError, StackExchangeDump
from tasks.programs.entry import Run, main
from tasks.rlhf.posts import Post, read_posts
from tasks.rlhf.splits import assign_splits
from tasks.rlhf.stack_exchange import Answer, Question, assemble, best, comparisons, older

BUILT_IN_SITE = "shell.example"
NUM_EXAMPLES = 3

TEXT, INTEGER, TEXTS = pa.string(), pa.int32(), pa.list_(pa.string())
ABOUT_QUESTION = {"site": TEXT, "question_url": TEXT, "question_author": TEXT, "question_licence": TEXT}


def _about(role: str, kind: pa.DataType = TEXT) -> dict[str, pa.DataType]:
    return {f"{role}_url": kind, f"{role}_author": kind, f"{role}_licence": kind}


PROMPT = {"question_id": pa.int64(), "prompt": TEXT}
PAIR = {"chosen": TEXT, "rejected": TEXT, "chosen_score": INTEGER, "rejected_score": INTEGER}
COLUMNS = {
    "finetune": PROMPT | {"answer": TEXT, "score": INTEGER} | ABOUT_QUESTION | _about("answer"),
    "corpus": PROMPT | {"answer": TEXT, "score": INTEGER} | ABOUT_QUESTION | _about("answer"),
    "reward": PROMPT | PAIR | ABOUT_QUESTION | _about("chosen") | _about("rejected"),
    "rl": PROMPT | ABOUT_QUESTION,
    "evaluation": PROMPT | {"answers": TEXTS, "scores": pa.list_(INTEGER), "best": INTEGER} | ABOUT_QUESTION | _about("answer", TEXTS),
    "evaluation_pairs": PROMPT | PAIR | ABOUT_QUESTION | _about("chosen") | _about("rejected"),
}

Row = dict[str, Any]
Pairs = Mapping[int, list[tuple[int, int]]]  # by question id: indices of the better and the worse answer


def prepare(job: DataJob, run: Run) -> None:
    """Score, pair and split the posts of a Stack Exchange dump."""
    run.rewind(0)  # it starts anew whenever it starts
    path = run.inputs["posts"]
    site = job.source.site if isinstance(job.source, StackExchangeDump) else BUILT_IN_SITE
    read: Counter[str] = Counter()
    dropped: Counter[str] = Counter()

    # 1. Posts to questions with scored answers
    posts = _counted(read_posts(path, dropped, run.log), read)
    lengths = {"min_answer_chars": job.data.min_answer_chars, "max_answer_chars": job.data.max_answer_chars}
    questions = list(assemble(posts, dropped, site=site, **lengths))

    # 2. Comparisons
    pairs: Pairs = {
        question.id: comparisons([a.score for a in question.answers], max_pairs=job.data.max_pairs, seed=job.seed, question_id=question.id)
        for question in questions
    }
    if not any(pairs.values()):
        found = f"{read['questions']} questions and {read['answers']} answers; {len(questions)} questions with a usable answer"
        raise InputError(f"{path} has no question with two differently scored answers (found {found}): give a dump with bodies and votes.")

    # 3. Splits
    splits = _split(questions, job.data)
    _refuse_empty(splits, pairs, job.data)
    dropped["questions of the reward split without two differently scored answers"] = sum(not pairs[q.id] for q in splits["reward"])

    # 4. Tables and card
    tables = {name: list(rows) for name, rows in _tables(splits, pairs, site).items()}
    for name, rows in tables.items():
        _write_table(rows, COLUMNS[name], run.artifact / f"{name}.parquet")
    card = _card(questions, pairs, site) | {
        "read": dict(sorted(read.items())),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "split_questions": {name: len(members) for name, members in splits.items()},
        "rows": {name: len(rows) for name, rows in tables.items()},
    }
    (run.artifact / "card.json").write_text(json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    size = path.stat().st_size
    run.log(size, size, questions=len(questions), answers=card["kept"]["answers"], pairs=card["kept"]["pairs"])
    run.finish(_metrics(card))


def _counted(posts: Iterable[Post], read: Counter[str]) -> Iterator[Post]:
    for post in posts:
        read["answers" if post.parent else "questions"] += 1
        yield post


def _split(questions: list[Question], data: Data) -> dict[str, list[Question]]:
    shares = {"finetune": data.finetune_share, "reward": data.reward_share, "rl": data.rl_share}
    shares["evaluation"] = 1 - sum(shares.values())
    splits: dict[str, list[Question]] = {name: [] for name in shares}
    for question, name in zip(questions, assign_splits([(q.id, q.prompt) for q in questions], shares), strict=True):
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


def _tables(splits: Mapping[str, list[Question]], pairs: Pairs, site: str) -> dict[str, Iterator[Row]]:
    return {
        "finetune": (_answered(q, q.answers[best(q.answers)], site) for q in splits["finetune"]),
        "corpus": (_answered(q, answer, site) for q in splits["finetune"] for answer in q.answers),
        "reward": (_pair(q, q.answers[i], q.answers[j], site) for q in splits["reward"] for i, j in pairs[q.id]),
        "rl": (_prompt(q, site) for q in splits["rl"]),
        "evaluation": (_ranked(q, site) for q in splits["evaluation"]),
        "evaluation_pairs": (_pair(q, q.answers[i], q.answers[j], site) for q in splits["evaluation"] for i, j in pairs[q.id]),
    }


def _prompt(question: Question, site: str) -> Row:
    row = {"question_id": question.id, "prompt": question.prompt, "site": site, "question_url": f"https://{site}/q/{question.id}"}
    return row | {"question_author": question.author, "question_licence": question.licence}


def _source(role: str, answer: Answer, site: str) -> Row:
    return {f"{role}_url": f"https://{site}/a/{answer.id}", f"{role}_author": answer.author, f"{role}_licence": answer.licence}


def _answered(question: Question, answer: Answer, site: str) -> Row:
    return _prompt(question, site) | {"answer": answer.text, "score": answer.score} | _source("answer", answer, site)


def _pair(question: Question, chosen: Answer, rejected: Answer, site: str) -> Row:
    texts = {"chosen": chosen.text, "rejected": rejected.text, "chosen_score": chosen.score, "rejected_score": rejected.score}
    return _prompt(question, site) | texts | _source("chosen", chosen, site) | _source("rejected", rejected, site)


def _ranked(question: Question, site: str) -> Row:
    """All answers in the order of their ids, so that a place in the list says nothing about quality."""
    answers = question.answers
    sources = [_source("answer", answer, site) for answer in answers]
    row = {"answers": [a.text for a in answers], "scores": [a.score for a in answers], "best": best(answers)}
    return _prompt(question, site) | row | {name: [source[name] for source in sources] for name in sources[0]}


def _write_table(rows: list[Row], columns: Mapping[str, pa.DataType], path: Path) -> None:
    """Equal rows give equal bytes: nothing of the writer is left to the library's defaults of the day."""
    table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows], schema=pa.schema(columns.items()))
    pq.write_table(table, path, version="2.6", compression="zstd", compression_level=3, use_dictionary=True, row_group_size=65_536)


def _card(questions: list[Question], pairs: Pairs, site: str) -> dict[str, Any]:
    """What the whole set, all splits together, is like."""
    answers = [answer for question in questions for answer in question.answers]
    compared = [(q, q.answers[i], q.answers[j]) for q in questions for i, j in pairs[q.id]]
    examples = [compared[len(compared) * k // NUM_EXAMPLES] for k in range(min(NUM_EXAMPLES, len(compared)))]
    licences = Counter(post.licence for posts in (questions, answers) for post in posts)
    return {
        "site": site,
        "kept": {"questions": len(questions), "answers": len(answers), "pairs": len(compared)},
        "questions_with_pairs": sum(map(bool, pairs.values())),
        "scores": [{"score": points, "count": count} for points, count in sorted(Counter(a.score for a in answers).items())],
        "answer_chars": _histogram([len(answer.text) for answer in answers]),
        "prompt_chars": _histogram([len(question.prompt) for question in questions]),
        "longer_wins": sum(len(good.text) > len(bad.text) for _, good, bad in compared) / len(compared),
        "older_wins": sum(older(good, bad) for _, good, bad in compared) / len(compared),
        "licences": dict(sorted(licences.items())),
        "examples": [_pair(question, chosen, rejected, site) for question, chosen, rejected in examples],
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
        "data.longer_wins": card["longer_wins"],
        "data.older_wins": card["older_wins"],
        "data.finetune_rows": rows["finetune"],
        "data.reward_pairs": rows["reward"],
        "data.rl_prompts": rows["rl"],
        "data.evaluation_questions": rows["evaluation"],
        "data.evaluation_pairs": rows["evaluation_pairs"],
    }


if __name__ == "__main__":
    main(prepare, DataJob)
