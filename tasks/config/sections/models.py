"""Define the settings of the base model, its precision, and how texts become tokens."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.config.sections.base import Settings, as_choice


class BuiltinBase(Settings):
    """A small Llama with its own byte-level BPE tokenizer, trained from scratch on the fine-tuning split."""

    kind: Literal["builtin"] = "builtin"
    vocabulary: int = Field(
        1024, ge=300, le=65_536, description="Tokens of the byte-level BPE tokenizer, special ones included."
    )
    hidden_size: int = Field(128, ge=16, le=4096, description="Width of the residual stream.")
    num_layers: int = Field(3, ge=1, le=64, description="Transformer layers.")
    num_heads: int = Field(4, ge=1, le=64, description="Attention heads; must divide the hidden size.")
    context: int = Field(192, ge=32, le=8192, description="Context length in tokens.")
    loss_on: Literal["answer", "all"] = Field(
        "answer", description="Tokens that the loss counts: the answers', or all."
    )
    steps: int = Field(560, ge=1, description="Optimizer steps.")
    batch_size: int = Field(5, ge=1, description="Blocks of one context length per optimizer step.")
    learning_rate: float = Field(
        5e-3,
        gt=0,
        le=1,
        description="Peak learning rate of Muon (matrices) and AdamW (embeddings and norms).",
    )

    @field_validator("loss_on", mode="before")
    @classmethod
    def _refuse_every_and_last(cls, value: Any) -> Any:
        if value in ("every", "last"):
            raise ValueError(f"{value!r} is a value of sft.loss_on; write 'answer' to count the answers only")
        return value

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError("num_heads must divide hidden_size into even head widths")
        return self


class HuggingFaceBase(Settings):
    """A causal language model in Hugging Face format (safetensors; no remote code)."""

    kind: Literal["hugging-face"] = "hugging-face"
    path: str = Field(min_length=1, description="A model folder, or a hub id.")
    revision: str | None = Field(None, description="Commit, branch or tag of the hub id; null for a folder.")


Base = Annotated[BuiltinBase | HuggingFaceBase, Field(discriminator="kind", json_schema_extra=as_choice)]


class Text(Settings):
    """How a question and an answer become tokens, the same in every stage."""

    template: Literal["question-answer", "human-assistant", "chat"] = Field(
        "question-answer",
        description="'Question: ... Answer: ...', 'Human: ... Assistant: ...' (hh-rlhf), or the tokenizer's "
        "chat template.",
    )
    max_prompt_tokens: int = Field(
        48,
        ge=8,
        le=131_072,
        description="Longer prompts lose the end of the question; conversations first their oldest turns.",
    )
    max_answer_tokens: int = Field(
        56,
        ge=1,
        le=131_072,
        description="Longest answer, its end token included; PPO samples at most as many.",
    )


Precision = Literal["float32", "bfloat16", "int8", "nf4"]


class Weights(Settings):
    """The precision of frozen weights.

    int8 and nf4 (bitsandbytes) quantise the matrices of the layers; only adapters can be trained on them.
    """

    base: Precision | None = Field(
        None, description="Precision of the base model in SFT; null: as it is stored."
    )
    merged: Precision | None = Field(
        None,
        description="Precision of the merged model in the later stages; null: as it is stored. nf4 after nf4 "
        "rounds twice.",
    )
