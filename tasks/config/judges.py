"""Define the settings of the language model that judges answers."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.config.base import NotInKey, Settings, as_choice


class NoJudge(Settings):
    """No language model judges."""

    kind: Literal["none"] = "none"


class LocalJudge(Settings):
    """A causal language model on this machine, which prefers A or B by the probability of these letters."""

    kind: Literal["local"] = "local"
    path: Annotated[str, NotInKey("the folder is an input, known by its content")] = Field(
        min_length=1, description="A model folder in Hugging Face format, with its tokenizer."
    )
    prompt: Annotated[str, NotInKey("the file is an input, known by its content")] = Field(
        "quality",
        min_length=1,
        description="'quality' or 'helpful', or your own text file with {question}, {first} and {second}.",
    )
    tie: float = Field(
        0.0, ge=0, le=20, description="Log odds of A against B up to which a verdict is a tie, in nats."
    )
    max_tokens: int = Field(
        2048, ge=64, le=131_072, description="Longer prompts have both answers cut, the question stays whole."
    )
    batch_size: int = Field(8, ge=1, description="Prompts at a time; padding changes the last digits.")
    num_questions: int = Field(100, ge=1, description="Held-out questions whose answers it judges, at most.")
    num_graded_pairs: int = Field(
        200, ge=1, description="Held-out pairs of voted answers that it is graded on, at most."
    )


LanguageJudge = Annotated[NoJudge | LocalJudge, Field(discriminator="kind", json_schema_extra=as_choice)]
