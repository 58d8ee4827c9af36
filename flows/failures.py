"""The errors that a run ends with if stages of it failed, and a promotion if a gate refuses it.

Imports neither Prefect nor MLflow, because the command line catches them.
"""

from collections.abc import Mapping
from typing import Any

from tasks.system.errors import InputError


class RunFailed(Exception):
    """Stages of a run failed; those that do not depend on them were built."""

    def __init__(self, errors: Mapping[str, Exception], summary: dict[str, Any] | None = None) -> None:
        """Take the errors by stage and, if there is a report of what was built, the run's summary."""
        sentences = [describe_failure(stage, error) for stage, error in errors.items()]
        many = f"{len(sentences)} stages failed: {'; '.join(sentences)}"
        super().__init__(sentences[0] if len(sentences) == 1 else many)
        self.errors, self.summary = dict(errors), summary

    @property
    def status(self) -> int:
        """Return the exit status: 2 if every failure is bad input, else 1."""
        return 2 if all(isinstance(error, InputError) for error in self.errors.values()) else 1


class NotPromoted(Exception):
    """A policy has failed a gate; the message says which, and by how much."""


def describe_failure(stage: str, error: Exception) -> str:
    """Return the sentence of a stage's failure, with the stage's name in it."""
    sentence = str(error) or type(error).__name__
    return sentence if sentence.startswith(f"The stage {stage} ") else f"{stage}: {sentence}"
