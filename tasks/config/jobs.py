"""Define the job of each stage: the sections of ``Pipeline`` that its result depends on.

The key of an artifact covers the whole job but the settings that are marked with NotInKey, here or beside the
setting.
"""

from typing import Annotated, Self

from pydantic import Field

from tasks.config.pipeline import Pipeline
from tasks.config.rounds import RoundChoice, RoundLabels, RoundSample
from tasks.config.sections.base import NotInKey, Settings
from tasks.config.sections.benchmarks import Benchmarks
from tasks.config.sections.data import Data
from tasks.config.sections.dpo import Dpo
from tasks.config.sections.judges import LanguageJudge, NoJudge
from tasks.config.sections.models import BuiltinBase, Precision, Text, Weights
from tasks.config.sections.ppo import Ppo
from tasks.config.sections.reward import Reward
from tasks.config.sections.samples import Samples
from tasks.config.sections.sft import Merge, Sft
from tasks.config.sections.sources import ShellSite, Source
from tasks.config.sections.winrate import Winrate

BaseWeights = Annotated[Weights, NotInKey("the stage loads the base model only", parts=("merged",))]
MergedWeights = Annotated[Weights, NotInKey("the stage loads the merged model only", parts=("base",))]


class Job(Settings):
    """The sections of a pipeline that one stage's result depends on."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Return the job of a pipeline."""
        sections = {name for name in cls.model_fields if name in type(pipeline).model_fields}
        return cls(**{name: getattr(pipeline, name) for name in sections})


class SiteJob(Job):
    """The job of the stage site."""

    seed: int
    source: ShellSite


class DataJob(Job):
    """The job of the stage data."""

    seed: int
    source: Source
    data: Data


class PretrainJob(Job):
    """The job of the stage pretrain."""

    seed: int
    base: BuiltinBase


class SftJob(Job):
    """The job of the stage sft."""

    seed: int
    text: Text
    weights: BaseWeights = Weights()
    sft: Sft
    samples: Samples = Samples()


class MergeJob(Job):
    """The job of the stage merge."""

    text: Text = Text()
    weights: BaseWeights = Weights()
    merge: Merge


class RewardJob(Job):
    """The job of the stage reward."""

    seed: int
    text: Text
    weights: MergedWeights = Weights()
    reward: Reward


class ReferenceJob(Job):
    """The job of the stage reference."""

    text: Text
    weights: MergedWeights = Weights()


class PpoJob(Job):
    """The job of the stage ppo."""

    seed: int
    text: Text
    weights: MergedWeights = Weights()
    ppo: Ppo
    samples: Samples = Samples()
    judge: Annotated[
        LanguageJudge,
        NotInKey("it judges answers to ppo.score.prompts only", parts=("num_questions", "num_graded_pairs")),
    ] = NoJudge()
    # no setting: digests of the modules of ppo.rewards.functions, by name
    reward_code: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Return the job of a pipeline, with its judge if that scores the policy."""
        job = super().of(pipeline)
        return job if job.ppo.score.by == "judge" else job.model_copy(update={"judge": NoJudge()})


class DpoJob(Job):
    """The job of the stage dpo."""

    seed: int
    text: Text
    weights: MergedWeights = Weights()
    dpo: Dpo
    samples: Samples = Samples()


class Champion(Settings):
    """How the champion was trained, whose answers are sampled beside those of the new policies."""

    text: Text
    precision: Precision | None  # of its merged model


class AnswersJob(Job):
    """The job of the stage answers."""

    seed: int
    text: Text
    weights: Weights = Weights()
    winrate: Annotated[Winrate, NotInKey("the stage judges nothing", parts=("num_graded_pairs",))]
    champion: Champion | None = None  # no setting: it is that of the registered model


class WinrateJob(Job):
    """The job of the stage winrate."""

    seed: int
    source: Source
    text: Text
    weights: MergedWeights = Weights()
    winrate: Winrate
    judge: LanguageJudge = NoJudge()


class BenchmarksJob(Job):
    """The job of the stage benchmarks."""

    text: Text
    weights: Weights = Weights()
    benchmarks: Benchmarks


class CandidatesJob(Job):
    """The job of the stage candidates."""

    seed: int
    text: Text
    weights: MergedWeights = Weights()
    sample: RoundSample
    held_out_prompts: int = 0  # of ppo.score, which nothing may learn from

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Return the job of a pipeline."""
        score = pipeline.ppo.score
        return cls(
            seed=pipeline.seed,
            text=pipeline.text,
            weights=pipeline.weights,
            sample=pipeline.rounds.sample,
            held_out_prompts=score.prompts if score.by else 0,
        )


class AskedJob(Job):
    """The job of the stage asked."""

    seed: int
    choose: RoundChoice
    comparisons: int
    gold_questions: int = 0

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Return the job of a pipeline."""
        rounds = pipeline.rounds
        return cls(
            seed=pipeline.seed,
            choose=rounds.choose,
            comparisons=rounds.comparisons,
            gold_questions=rounds.labels.gold_questions if rounds.labels.kind == "people" else 0,
        )


class ComparisonsJob(Job):
    """The job of the stage comparisons."""

    seed: int
    labels: RoundLabels
    text: Text
    weights: MergedWeights = Weights()
    judge: Annotated[
        LanguageJudge,
        NotInKey("it judges the pairs that are asked", parts=("num_questions", "num_graded_pairs")),
    ] = NoJudge()
    batch_size: int = Field(200, ge=1)  # answers scored at a time
    on_site: bool = False  # of the gold scorer, which then measures the labels

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Return the job of a pipeline, with its language model if that gives the labels."""
        labels = pipeline.rounds.labels
        asks_model = labels.kind == "judge" and labels.by == "lm"
        return cls(
            seed=pipeline.seed,
            labels=labels,
            text=pipeline.text,
            weights=pipeline.weights,
            judge=pipeline.judge if asks_model else NoJudge(),
            batch_size=pipeline.rounds.sample.batch_size,
            on_site=isinstance(pipeline.source, ShellSite),
        )


class MixtureJob(Job):
    """The job of the stage mixture."""

    seed: int
    old_share: float

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Return the job of a pipeline."""
        return cls(seed=pipeline.seed, old_share=pipeline.rounds.old_share)


class ReportJob(Job):
    """The job of the stage report, which has no settings."""
