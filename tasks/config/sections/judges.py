"""Define the settings of the language model that judges answers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import NotInKey, Settings, as_choice

# The endpoint's address and key are read from these variables only; no other stage's program gets them.
JUDGE_URL = "ALIGNFLOW_JUDGE_URL"
JUDGE_KEY = "ALIGNFLOW_JUDGE_KEY"

WRITTEN_PROMPTS = ("dpo", "rubric")  # ask for sentences first, so their next token is no verdict
PROMPTS = "or your own text file with {question}, {first} and {second}."
SAME_REPLY = NotInKey("it changes when and whether a reply comes, not what it says")
Price = Annotated[float, NotInKey("it changes what a reply costs, not what it says")]


class NoJudge(Settings):
    """No language model judges."""

    kind: Literal["none"] = "none"


class LocalJudge(Settings):
    """A causal language model on this machine, which compares two answers."""

    kind: Literal["local"] = "local"
    path: Annotated[str, NotInKey("the folder is an input, known by its content")] = Field(
        min_length=1, description="A model folder in Hugging Face format, with its tokenizer."
    )
    answer_by: Literal["label", "text"] = Field(
        "label",
        description="By the chances of A and B as its next token (label), or by its written reply (text).",
    )
    prompt: Annotated[str, NotInKey("the file is an input, known by its content")] = Field(
        "quality",
        min_length=1,
        description="'quality', 'helpful' or 'llama2'; 'dpo' or 'rubric', if answer_by is text; " + PROMPTS,
    )
    tie: float = Field(
        0.0,
        ge=0,
        le=20,
        description="Log odds of A against B up to which a verdict is a tie, in nats, if answer_by is label.",
    )
    max_tokens: int = Field(
        2048,
        ge=64,
        le=131_072,
        description="Longer prompts have both answers cut; a question that leaves no room is not asked.",
    )
    max_reply_tokens: int = Field(
        512, ge=1, le=32_768, description="Most tokens of a written reply, if answer_by is text."
    )
    batch_size: int = Field(8, ge=1, description="Prompts at a time; padding changes the last digits.")
    num_questions: int = Field(100, ge=1, description="Held-out questions whose answers it judges, at most.")
    num_graded_pairs: int = Field(
        200, ge=1, description="Held-out pairs of voted answers that it is graded on, at most."
    )

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.answer_by == "label" and self.prompt in WRITTEN_PROMPTS:
            raise ValueError(
                f"the prompt {self.prompt} asks for sentences before the letter: set judge.answer_by to text"
            )
        return self


class EndpointJudge(Settings):
    """A model behind an OpenAI-compatible endpoint, whose address and key are in the environment."""

    kind: Literal["endpoint"] = "endpoint"
    model: str = Field(min_length=1, description="The model's name, as the endpoint knows it.")
    prompt: Annotated[str, NotInKey("the file is an input, known by its content")] = Field(
        "dpo", min_length=1, description="'dpo', 'rubric', 'llama2', 'quality', 'helpful', " + PROMPTS
    )
    temperature: float | None = Field(
        0.0,
        ge=0,
        le=2,
        description="Sampling temperature; 0: the likeliest reply; null: not sent, as some models demand.",
    )
    max_reply_tokens: int = Field(512, ge=1, le=32_768, description="Most tokens of a reply.")
    max_prompt_characters: int = Field(
        24_000,
        ge=256,
        le=1_000_000,
        description="Longer prompts have both answers cut; a question that leaves no room is not asked.",
    )
    prompt_price: Price = Field(
        ge=0, le=1e6, description="Price of a million prompt tokens; 0 for a server of your own."
    )
    reply_price: Price = Field(
        ge=0, le=1e6, description="Price of a million reply tokens, in the same currency."
    )
    max_cost: Annotated[float, SAME_REPLY] = Field(
        5.0,
        gt=0,
        le=1e6,
        description="Most that all verdicts of an evaluation may cost, in the same currency; those from "
        "earlier runs count too.",
    )
    requests_per_minute: Annotated[int | None, SAME_REPLY] = Field(
        None, ge=1, le=100_000, description="Requests a minute, at most; null: as many as come back."
    )
    concurrency: Annotated[int, SAME_REPLY] = Field(4, ge=1, le=64, description="Requests at the same time.")
    timeout: Annotated[float, SAME_REPLY] = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds without a sign of a reply after which a request is repeated.",
    )
    patience: Annotated[float, SAME_REPLY] = Field(
        600.0, ge=0, le=86_400, description="Seconds for which one request is repeated before the run stops."
    )
    num_questions: int = Field(100, ge=1, description="Held-out questions whose answers it judges, at most.")
    num_graded_pairs: int = Field(
        200, ge=1, description="Held-out pairs of voted answers that it is graded on, at most."
    )


LanguageJudge = Annotated[
    NoJudge | LocalJudge | EndpointJudge, Field(discriminator="kind", json_schema_extra=as_choice)
]
