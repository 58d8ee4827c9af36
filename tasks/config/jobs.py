"""The job of each stage: the sections of ``Pipeline`` that its result depends on."""

from typing import Annotated, Self

from tasks.config.base import NotInKey, Settings
from tasks.config.data import Data
from tasks.config.models import BuiltinBase, Text, Weights
from tasks.config.pipeline import Pipeline
from tasks.config.sources import ShellSite, Source
from tasks.config.stages import Dpo, Merge, Ppo, Reward, Sft, Winrate

BaseWeights = Annotated[Weights, NotInKey("the stage loads the base model only", parts=("merged",))]
MergedWeights = Annotated[Weights, NotInKey("the stage loads the merged model only", parts=("base",))]


class Job(Settings):
    """The sections of a pipeline that one stage's result depends on."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        return cls(**{name: getattr(pipeline, name) for name in cls.model_fields})


class SiteJob(Job):
    seed: int
    source: ShellSite


class DataJob(Job):
    seed: int
    source: Source
    data: Data


class PretrainJob(Job):
    seed: int
    base: BuiltinBase


class SftJob(Job):
    seed: int
    text: Text
    weights: BaseWeights = Weights()
    sft: Sft


class MergeJob(Job):
    text: Text = Text()
    weights: BaseWeights = Weights()
    merge: Merge


class RewardJob(Job):
    seed: int
    text: Text
    weights: MergedWeights = Weights()
    reward: Reward


class ReferenceJob(Job):
    text: Text
    weights: MergedWeights = Weights()


class PpoJob(Job):
    seed: int
    text: Text
    weights: MergedWeights = Weights()
    ppo: Ppo


class DpoJob(Job):
    seed: int
    text: Text
    weights: MergedWeights = Weights()
    dpo: Dpo


class WinrateJob(Job):
    seed: int
    source: Source
    text: Text
    weights: MergedWeights = Weights()
    winrate: Winrate


class ReportJob(Job):
    pass
