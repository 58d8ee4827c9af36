"""Define the settings of supervised fine-tuning and of merging its adapter."""

from typing import Any, Literal

from pydantic import Field, field_validator

from tasks.config.sections.base import Settings
from tasks.config.sections.tuning import Lora, Tuning

LossOn = Literal["every", "last", "all"]


class Sft(Tuning):
    """Supervised fine-tuning on the best answer of each question."""

    tune: Literal["lora", "full"] = Field("lora", description="What is trained: an adapter, or every weight.")
    lora: Lora = Lora(rank=16, alpha=32, dropout=0.05)
    loss_on: LossOn = Field(
        "every",
        description="Tokens that the loss counts: those of every answer of a conversation, of the last one, "
        "or all.",
    )
    epochs: float = Field(1.7, gt=0, le=100, description="Passes over the fine-tuning split.")
    batch_size: int = Field(8, ge=1, description="Packed blocks per optimizer step.")
    block_tokens: int = Field(
        256, ge=32, description="Tokens of a packed block; documents inside it do not attend to each other."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate goes on after the warm-up: to 0, or not."
    )
    held_out_share: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Share of the questions that is held out of training, to measure the loss.",
    )

    @field_validator("loss_on", mode="before")
    @classmethod
    def _refuse_answer(cls, value: Any) -> Any:
        if value == "answer":
            raise ValueError(
                "'answer' is a value of base.loss_on; write 'last' to count a conversation's last answer, or "
                "'every' to count all its answers"
            )
        return value


class Merge(Settings):
    """Merging of an adapter into its base."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Precision of the merged weights; null: that of the base, or float32 if it was trained "
        "in float32.",
    )
