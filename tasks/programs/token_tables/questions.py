"""Read questions with their answers and pairs as token ids, and hold some of them out."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.cache import Rows, Source, load_tokens
from tasks.programs.token_tables.token_table import TokenTable, to_lists
from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.truncation import Encoder
from tasks.system.errors import InputError

NUMBERS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "question_id": pa.int64(), "prompt": NUMBERS, "answers": pa.list_(NUMBERS), "chosen": NUMBERS,
        "rejected": NUMBERS, "gaps": pa.list_(pa.float64()), "older": pa.list_(pa.bool_()),
    }
)  # fmt: skip


def read_pairs(run: Run, table: Path, encoder: Encoder) -> TokenTable[Comparison]:
    """Return the reward split's pairs by question. Raises InputError if there are none."""
    found = _read(run, table, encoder, phase="tokenising")
    if not encoder.cut.pairs:
        raise InputError("The reward split has no pairs: raise data.reward_share or give more data.")
    return _check_any(found, encoder)


def read_rankings(run: Run, table: Path, encoder: Encoder, *, most_answers: int) -> TokenTable[Comparison]:
    """Return every pair of each question's answers; of more than ``most_answers`` that many are used.

    Raises InputError if there are none.
    """
    source = Source(
        table=table,
        columns=comparisons.RANKING_COLUMNS,
        group_by=None,
        encode=partial(_encode_rankings, most_answers=most_answers),
        module=__name__,
        encoders="tasks.rlhf.batches.comparisons",
        settings={"most_answers": most_answers},
    )
    return _check_any(load_tokens(run, source, encoder, decode, phase="tokenising"), encoder)


def read_evaluation(run: Run, table: Path, encoder: Encoder) -> TokenTable[Comparison]:
    """Return the evaluation split's questions whose pairs differ after truncation; none if the data has no
    such table.
    """
    return _read(run, table, encoder, phase="tokenising evaluation pairs")


def _read(run: Run, table: Path, encoder: Encoder, *, phase: str) -> TokenTable[Comparison]:
    if not table.exists():
        return TokenTable([], decode)
    source = Source(
        table=table,
        columns=comparisons.PAIR_COLUMNS,
        group_by="question_id",
        encode=_encode_pairs,
        module=__name__,
        encoders="tasks.rlhf.batches.comparisons",
        settings={},
    )
    return load_tokens(run, source, encoder, decode, phase=phase)


def _check_any(found: TokenTable[Comparison], encoder: Encoder) -> TokenTable[Comparison]:
    if encoder.cut.pairs and not found:
        raise InputError(
            f"All {encoder.cut.pairs:,} pairs of the reward split have two answers that are equal once cut "
            f"at text.max_answer_tokens={encoder.max_answer_tokens}: raise it, so that there is something to "
            "learn."
        )
    return found


def text_lengths(questions: TokenTable[Comparison]) -> NDArray[np.int64]:
    """Return the number of tokens of each question's prompt with all its answers."""
    lengths, num_answers = questions.nested_lengths("answers")
    up_to = np.append(0, np.cumsum(lengths))
    last = np.cumsum(num_answers)
    return np.asarray(questions.lengths("prompt")) + up_to[last] - up_to[last - num_answers]


def answer_keys(questions: TokenTable[Comparison]) -> dict[str, NDArray[np.int64]]:
    """Return the question's id, the number in its question and the number of tokens of each answer."""
    lengths, num_answers = questions.nested_lengths("answers")
    first = np.cumsum(num_answers) - num_answers
    ids = np.asarray(questions.column("question_id"), dtype=np.int64)
    return {
        "question_id": np.repeat(ids, num_answers),
        "answer": np.arange(len(lengths)) - np.repeat(first, num_answers),
        "tokens": lengths,
    }


def hold_out(
    questions: TokenTable[Comparison], *, share: float, seed: int
) -> tuple[TokenTable[Comparison], TokenTable[Comparison]]:
    """Split into questions to train on and held-out ones. Raises InputError if one of them is empty."""
    trained, held_out = comparisons.hold_out(questions.column("question_id"), share=share, seed=seed)
    if not trained or not held_out:
        raise InputError(
            "The reward split has fewer than two questions with pairs: raise data.reward_share or give more "
            "data."
        )
    return questions.select(trained), questions.select(held_out)


def _encode_pairs(encoder: Encoder, rows: Rows) -> pa.RecordBatch:
    return to_batch(comparisons.encode_with(encoder, comparisons.from_pairs(rows)))


def _encode_rankings(encoder: Encoder, rows: Rows, *, most_answers: int) -> pa.RecordBatch:
    texts = comparisons.from_rankings(rows, most_answers=most_answers)
    return to_batch(comparisons.encode_with(encoder, texts))


def to_batch(questions: Iterable[Comparison]) -> pa.RecordBatch:
    """Return questions as columns."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for question in questions:
        columns["question_id"].append(question.question_id)
        columns["prompt"].append(question.prompt)
        columns["answers"].append(question.answers)
        columns["chosen"].append([chosen for chosen, _ in question.pairs])
        columns["rejected"].append([rejected for _, rejected in question.pairs])
        columns["gaps"].append(question.gaps)
        columns["older"].append(question.older)
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def decode(batch: pa.RecordBatch) -> list[Comparison]:
    """Return the questions of columns."""
    chosen, rejected = to_lists(batch["chosen"]), to_lists(batch["rejected"])
    pairs = [[*zip(*both, strict=True)] for both in zip(chosen, rejected, strict=True)]
    prompts, answers, gaps, older = (to_lists(batch[name]) for name in ("prompt", "answers", "gaps", "older"))
    return [*map(Comparison, batch["question_id"].to_pylist(), prompts, answers, pairs, gaps, older)]
