"""Define which answers are sampled while a policy trains."""

from pydantic import Field

from tasks.config.sections.base import Settings


class Samples(Settings):
    """Answers to a few held-out questions, sampled now and then while SFT, DPO and PPO train.

    They are a file of the artifact, so these settings are in its key. They do not change the weights.
    """

    prompts: int = Field(
        8,
        ge=0,
        le=100,
        description="Held-out questions that are answered, the same in every stage; 0: none.",
    )
    every: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between two samples, for PPO rollout batches; null: five samples, "
        "from before the first step to the last. The untrained and the last weights always answer.",
    )
    temperature: float = Field(0.7, gt=0, le=10, description="Sampling temperature.")

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables of the data stage with these questions; none if no question is answered."""
        return ("evaluation.parquet",) if self.prompts else ()
