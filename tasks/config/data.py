"""Settings of the data stage: which questions and answers are kept, how they are paired and split."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import NotInKey, Settings


class Data(Settings):
    """Scoring, pairing and splitting."""

    old_names: ClassVar[dict[str, str]] = {"against": "decontaminate_against"}

    max_pairs: int = Field(10, ge=1, le=1000, description="Most comparison pairs kept per question.")
    min_answer_chars: int = Field(
        1, ge=1, description="Shorter answers (characters of Markdown) are dropped and counted."
    )
    max_answer_chars: int = Field(
        20_000, ge=1, description="Longer answers (characters of Markdown) are dropped and counted."
    )
    max_prompt_chars: int = Field(
        20_000, ge=1, description="Longer questions (characters of Markdown) are dropped and counted."
    )
    personal: Literal["mask", "drop", "keep"] = Field(
        "mask",
        description="E-mail addresses, phone numbers and secret keys: replaced by their kind, or texts that have them dropped, or kept.",
    )
    languages: tuple[str, ...] = Field(
        (), description="Languages (ISO 639-1, such as en) whose questions are kept; empty: any."
    )
    max_questions_per_author: int | None = Field(
        None, ge=1, description="Most questions of one author (InstructGPT: 200 prompts); null: any number."
    )
    duplicates: Literal["together", "drop"] = Field(
        "together",
        description="Questions that say the same (see alike) are kept in one split, or only the first of them is kept at all.",
    )
    decontaminate_against: Annotated[
        tuple[str, ...], NotInKey("the files are inputs, known by their content")
    ] = Field(
        (),
        description="Files of evaluation sets used later; questions that share 13 words in a row with one of them are dropped.",
    )
    alike: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Prompts that share this much (Jaccard index of three-word runs) are never in two splits; 1: equal words only.",
    )
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="Most rows that may be unreadable; with more, the stage fails."
    )
    finetune_share: float = Field(
        0.34,
        ge=0,
        le=1,
        description="Share of the questions for fine-tuning (and pretraining of the built-in base).",
    )
    reward_share: float = Field(
        0.43, ge=0, le=1, description="Share of the questions for reward modelling and DPO."
    )
    rl_share: float = Field(
        0.10,
        ge=0,
        le=1,
        description="Share of the questions whose prompts PPO answers; the rest is for evaluation.",
    )

    @model_validator(mode="after")
    def _room_for_evaluation(self) -> Self:
        if self.finetune_share + self.reward_share + self.rl_share >= 1:
            raise ValueError(
                "finetune_share + reward_share + rl_share must stay below 1: the rest is the evaluation split"
            )
        return self
