"""Define the settings of the stage benchmarks: what every model is measured on beside the win rates."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import NotInKey, Settings


class Benchmarks(Settings):
    """Perplexity of held-out answers and, if files are given, benchmarks and RewardBench 2."""

    num_texts: int = Field(
        200, ge=1, description="Held-out answers whose perplexity is measured (at most what the split has)."
    )
    files: Annotated[tuple[str, ...], NotInKey("the files are inputs, known by their content")] = Field(
        (),
        description="Benchmarks: JSON Lines files of {query, choices, gold} or {context, continuation}; each "
        "file is one benchmark, named like the file.",
    )
    num_fewshot: tuple[int, ...] = Field(
        (0,), description="Numbers of solved examples before each question; every benchmark runs with each."
    )
    num_examples: int = Field(
        32,
        ge=1,
        description="With examples: questions of each file that are kept for examples, and are not counted.",
    )
    max_documents: int | None = Field(
        None, ge=1, description="Most questions of each benchmark; null: all of the file."
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="Texts computed at a time; it affects the last digits of log-probabilities by rounding.",
    )
    reward_bench: Annotated[str, NotInKey("the file is an input, known by its content")] = Field(
        "",
        description="RewardBench 2 for the reward model: a JSON Lines file of {id, prompt, chosen, rejected, "
        "subset}; empty: none.",
    )

    @model_validator(mode="after")
    def _check_fewshot(self) -> Self:
        if not self.num_fewshot or min(self.num_fewshot) < 0:
            raise ValueError("num_fewshot needs at least one number, and none below 0")
        if len(set(self.num_fewshot)) < len(self.num_fewshot):
            raise ValueError("num_fewshot names a number twice")
        if max(self.num_fewshot) > self.num_examples:
            raise ValueError(f"num_fewshot={max(self.num_fewshot)} needs num_examples of at least as many")
        return self
