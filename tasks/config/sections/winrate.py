"""Define the settings of the comparison of policies."""

from pydantic import Field

from tasks.config.sections.base import Settings


class Winrate(Settings):
    """Comparison of the trained policies on held-out questions."""

    num_questions: int = Field(
        500, ge=1, description="Held-out questions answered by every policy (at most what the split has)."
    )
    num_graded_pairs: int = Field(
        2000, ge=0, description="Held-out pairs of voted answers that each judge is graded on, at most."
    )
    temperature: float = Field(0.7, gt=0, le=10, description="Sampling temperature of every policy.")
    batch_size: int = Field(
        200,
        ge=1,
        description="Questions answered at a time; it affects the result, because padding changes the last "
        "digits.",
    )
