"""The job of each stage: the sections of ``Pipeline`` that its result depends on."""

from typing import Self

from tasks.config.base import Settings
from tasks.config.data import Data
from tasks.config.models import BuiltinBase, Text, Weights
from tasks.config.pipeline import Pipeline
from tasks.config.sources import ShellSite, Source
from tasks.config.stages import Dpo, Merge, Ppo, Reward, Sft, Winrate


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
    weights: Weights = Weights()
    sft: Sft


class MergeJob(Job):
    text: Text = Text()
    weights: Weights = Weights()
    merge: Merge


class RewardJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    reward: Reward


class ReferenceJob(Job):
    text: Text
    weights: Weights = Weights()


class PpoJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    ppo: Ppo


class DpoJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    dpo: Dpo


class WinrateJob(Job):
    seed: int
    source: Source
    text: Text
    weights: Weights = Weights()
    winrate: Winrate


class ReportJob(Job):
    pass
