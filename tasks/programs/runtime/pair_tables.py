"""The pairs of the reward split, to train and to choose weights on, and those of the evaluation split, to report on."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from tasks.config.models import Text
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.comparisons import Comparison, Texts
from tasks.rlhf.batches.truncation import Encoder
from tasks.system.errors import InputError

FEWEST_QUESTIONS = 20  # with fewer evaluation questions an interval says next to nothing


class Measured(NamedTuple):
    """The questions whose pairs are reported on, and whether the weights were chosen without them."""

    questions: list[Comparison]
    unseen: bool

    @property
    def record(self) -> dict[str, Any]:
        """What a stage's summary says of them."""
        split = "evaluation" if self.unseen else "held-out"
        return {
            "split": split,
            "questions": len(self.questions),
            "pairs": sum(len(c.pairs) for c in self.questions),
        }


def encoder_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return an encoder with the limits of the settings, which counts what it cuts."""
    lengths = {"max_prompt_tokens": text.max_prompt_tokens, "max_answer_tokens": text.max_answer_tokens}
    return Encoder(tokenizer, template=text.template, **lengths)


def texts_of(table: Path) -> dict[int, Texts]:
    """Return a table's pairs by question; none where the data has no such table."""
    return (
        comparisons.from_pairs(pq.read_table(table, columns=comparisons.PAIR_COLUMNS).to_pylist())
        if table.exists()
        else {}
    )


def encode(run: Run, texts: dict[int, Texts], encoder: Encoder) -> list[Comparison]:
    """Return the questions as token ids, and tell of the progress. Raises InputError where no pair is left of some."""
    found = comparisons.encode_with(encoder, texts, report_progress=run.phase("tokenising"))
    if texts and not found:
        raise InputError(
            f"All {encoder.cut.pairs:,} pairs of the reward split have two answers that are equal once cut at "
            f"text.max_answer_tokens={encoder.max_answer_tokens}: raise it, so that there is something to learn."
        )
    return found


def read_evaluation(table: Path, run: Run, encoder: Encoder) -> list[Comparison]:
    """Return the evaluation split's questions with pairs that differ once cut; none where there are none."""
    return comparisons.encode_with(
        encoder, texts_of(table), report_progress=run.phase("tokenising evaluation pairs")
    )


def choose_measured(evaluation: list[Comparison], held_out: list[Comparison], run: Run) -> Measured:
    """Return what to report on: evaluation pairs, or where these are too few, held-out ones, which also chose the weights; that is warned of."""
    if len(evaluation) >= FEWEST_QUESTIONS:
        return Measured(evaluation, unseen=True)
    found = f"Questions of the evaluation split that have pairs: {len(evaluation)}, and a report needs {FEWEST_QUESTIONS}."
    remedy = "Lower data.finetune_share, data.reward_share or data.rl_share, or give more data."
    if len(evaluation) >= len(held_out):
        run.warn(f"{found} Accuracies are of these few all the same. {remedy}")
        return Measured(evaluation, unseen=True)
    run.warn(
        f"{found} Accuracies are of the {len(held_out)} held-out questions of the reward split instead; the weights were chosen on them too, "
        f"so they are a little too good. {remedy}"
    )
    return Measured(held_out, unseen=False)
