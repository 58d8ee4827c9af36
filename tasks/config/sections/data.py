"""Define the settings of the data stage: how questions and answers are filtered, paired and split."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import NotInKey, Settings


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
        description="E-mail addresses, phone numbers and secret keys: mask replaces them by their kind, drop "
        "removes the texts that hold them, keep leaves them.",
    )
    languages: tuple[str, ...] = Field(
        (), description="Languages (ISO 639-1, such as en) whose questions are kept; empty: any."
    )
    max_questions_per_author: int | None = Field(
        None, ge=1, description="Most questions of one author (InstructGPT: 200 prompts); null: any number."
    )
    duplicates: Literal["together", "drop"] = Field(
        "together",
        description="Questions that say the same (see alike): together keeps them in one split, drop keeps "
        "the first of them only.",
    )
    decontaminate_against: Annotated[
        tuple[str, ...], NotInKey("the files are inputs, known by their content")
    ] = Field(
        (),
        description="Files of evaluation sets used later; questions that share 13 words in a row with one of "
        "them are dropped.",
    )
    alike: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Prompts whose sets of three-word runs have at least this Jaccard index are never in two "
        "splits; 1: equal words only.",
    )
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="Largest share of unreadable rows; with more, the stage fails."
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
    def _check_evaluation_share(self) -> Self:
        if self.finetune_share + self.reward_share + self.rl_share >= 1:
            raise ValueError(
                "finetune_share + reward_share + rl_share must stay below 1: the rest is the evaluation split"
            )
        return self
