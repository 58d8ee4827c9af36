"""Define what a comparison of finished runs is made of: the runs, and the judge of their policies."""

from typing import Any, Literal

from pydantic import Field

from tasks.config.jobs import Job, MergedWeights
from tasks.config.pipeline import Pipeline
from tasks.config.sections.base import Settings
from tasks.config.sections.judges import LanguageJudge, NoJudge
from tasks.config.sections.models import Text, Weights
from tasks.config.sections.winrate import Winrate


class ComparedRun(Settings):
    """A finished run, as far as a comparison shows it."""

    run_id: str = Field(description="Its id in MLflow.")
    name: str = Field(description="Its name in MLflow.")
    settings: dict[str, str] = Field(description="The settings in which the runs differ, as text.")
    metrics: dict[str, Any] = Field(description="The figures of its summary.")
    warnings: tuple[str, ...] = Field(description="The warnings of its stages.")
    judges: dict[str, str] = Field(description="Its judges, each with a text that tells it from others.")
    policies: tuple[str, ...] = Field(description="The policies whose answers are judged.")


class ComparingJudge(Settings):
    """The judge that decides between the policies of all runs."""

    name: Literal["gold", "lm", "held_out", "reward"] = Field(description="Its kind.")
    title: str = Field(description="Its name in a sentence.")
    identity: str = Field(description="The text that tells it from other judges.")
    card: dict[str, Any] = Field(description="Its report card in the run that it is of.")


class Comparison(Pipeline):
    """Finished runs, and the settings of the run whose judge decides between their policies."""

    runs: tuple[ComparedRun, ...] = Field(min_length=2)
    judged_by: ComparingJudge | None = Field(
        None, description="The judge that decides; null: only the runs' own figures are compared."
    )


class CompareJob(Job):
    """The job of the stage compare, of a ``Comparison``."""

    text: Text
    weights: MergedWeights = Weights()
    winrate: Winrate
    judge: LanguageJudge = NoJudge()
    runs: tuple[ComparedRun, ...]
    judged_by: ComparingJudge | None
