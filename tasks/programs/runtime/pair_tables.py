"""Choose the pairs that a stage reports on, and build the encoder of its texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypedDict, TypeVar

from transformers import PreTrainedTokenizerBase

from tasks.config.sections.models import Text
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.conversations import Messages
from tasks.rlhf.batches.truncation import Encoder

if TYPE_CHECKING:  # it imports torch, which `alignflow look` does not need
    from tasks.rlhf.batches.comparisons import Comparison

MIN_QUESTIONS = 20  # with fewer evaluation questions a confidence interval is too wide to be of use

Questions = TypeVar("Questions", bound="Sequence[Comparison]")


class ReportedPairsRecord(TypedDict):
    """What a stage's summary says of the pairs that its accuracies are of."""

    split: str
    questions: int
    pairs: int


class ReportedPairs(NamedTuple, Generic[Questions]):
    """The questions whose pairs are reported on, and whether the weights were chosen without them."""

    questions: Questions
    unseen: bool

    @property
    def record(self) -> ReportedPairsRecord:
        """Return the split and the number of questions and pairs."""
        num_pairs = sum(len(question.pairs) for question in self.questions)
        split = "evaluation" if self.unseen else "held-out"
        return {"split": split, "questions": len(self.questions), "pairs": num_pairs}


def build_encoder(text: Text, tokenizer: PreTrainedTokenizerBase, chats: Mapping[str, Messages]) -> Encoder:
    """Return an encoder with the limits of the settings. It counts what it truncates.

    ``chats`` has the messages of prompts that are conversations (`table_rows.read_chats`).
    """
    return Encoder(
        tokenizer,
        template=text.template,
        max_prompt_tokens=text.max_prompt_tokens,
        max_answer_tokens=text.max_answer_tokens,
        chats=chats,
    )


def choose_reported_pairs(evaluation: Questions, held_out: Questions, run: Run) -> ReportedPairs[Questions]:
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
