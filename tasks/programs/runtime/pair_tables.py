"""Choose the pairs that a stage reports on, and build the encoder of its texts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from tasks.config.sections.models import Text
from tasks.dataset.conversation import from_records
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.conversations import Messages
from tasks.rlhf.batches.truncation import Encoder

MIN_QUESTIONS = 20  # with fewer evaluation questions a confidence interval is too wide to be of use


class ReportedPairsRecord(TypedDict):
    """What a stage's summary says of the pairs that its accuracies are of."""

    split: str
    questions: int
    pairs: int


class ReportedPairs(NamedTuple):
    """The questions whose pairs are reported on, and whether the weights were chosen without them."""

    questions: Sequence[Comparison]
    unseen: bool

    @property
    def record(self) -> ReportedPairsRecord:
        """Return the split and the number of questions and pairs."""
        num_pairs = sum(len(question.pairs) for question in self.questions)
        split = "evaluation" if self.unseen else "held-out"
        return {"split": split, "questions": len(self.questions), "pairs": num_pairs}


def read_chats(*tables: Path) -> dict[str, Messages]:
    """Return the messages of the prompts of tables that are conversations, by the prompt's text.

    Tables that are not there have none.
    """
    chats: dict[str, Messages] = {}
    for table in filter(Path.exists, tables):
        with pq.ParquetFile(table) as file:
            names = file.schema_arrow.names
            prompt = "prompt" if "prompt" in names else "question"
            for batch in file.iter_batches(row_groups=_groups_with_chats(file), columns=[prompt, "messages"]):
                is_chat = pc.greater(pc.fill_null(pc.list_value_length(batch["messages"]), 0), 0)
                rows = batch.filter(is_chat).to_pylist()
                chats |= {row[prompt]: from_records(row["messages"]) for row in rows}
    return chats


def _groups_with_chats(file: pq.ParquetFile) -> list[int]:
    """Return the row groups that hold messages, by their statistics: most tables have none."""
    paths = [file.metadata.schema.column(number).path for number in range(file.metadata.num_columns)]
    roles = [number for number, path in enumerate(paths) if re.fullmatch(r"messages\..*\.role", path)]
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    statistics = {n: group.column(number).statistics for number in roles for n, group in enumerate(groups)}
    return [n for n, found in statistics.items() if found is None or found.has_min_max]


def build_encoder(text: Text, tokenizer: PreTrainedTokenizerBase, chats: Mapping[str, Messages]) -> Encoder:
    """Return an encoder with the limits of the settings. It counts what it truncates.

    ``chats`` has the messages of prompts that are conversations (`read_chats`).
    """
    return Encoder(
        tokenizer,
        template=text.template,
        max_prompt_tokens=text.max_prompt_tokens,
        max_answer_tokens=text.max_answer_tokens,
        chats=chats,
    )


def choose_reported_pairs(
    evaluation: Sequence[Comparison], held_out: Sequence[Comparison], run: Run
) -> ReportedPairs:
    """Choose the pairs that accuracies are measured on: the evaluation split's, or the held-out ones if these
    are more than too few.

    Held-out pairs also chose the weights, so the result is warned of.
    """
    if len(evaluation) >= MIN_QUESTIONS:
        return ReportedPairs(evaluation, unseen=True)
    shortage = (
        f"Questions of the evaluation split that have pairs: {len(evaluation)}, "
        f"and a report needs {MIN_QUESTIONS}."
    )
    remedy = "Lower data.finetune_share, data.reward_share or data.rl_share, or give more data."
    if len(evaluation) >= len(held_out):
        run.warn(f"{shortage} Accuracies are of these few all the same. {remedy}")
        return ReportedPairs(evaluation, unseen=True)
    run.warn(
        f"{shortage} Accuracies are of the {len(held_out)} held-out questions of the reward split instead; "
        f"the weights were chosen on them too, so they are a little too good. {remedy}"
    )
    return ReportedPairs(held_out, unseen=False)
