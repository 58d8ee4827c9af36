"""Define the jobs of the programs that use a finished policy: chat with it, export it, export its data."""

from typing import Literal

from pydantic import Field

from tasks.config.jobs import Job
from tasks.config.sections.base import Settings
from tasks.config.sections.data import Data
from tasks.config.sections.models import Precision, Text
from tasks.config.sections.sft import LossOn
from tasks.config.sections.sources import Source

Template = Literal["question-answer", "human-assistant", "chat"]


class PolicyFiles(Settings):
    """A policy whose files are on this machine, and how it is used."""

    name: str = Field(description="The user's name for it.")
    about: str = Field("", description="What it is: the policy, its run and its version.")
    folder: str = Field(description="Model folder: the base of an adapter, or the policy itself.")
    tuned: str = Field("", description="Artifact with adapter/ or bottleneck/ for it; empty: none.")
    precision: Precision | None = Field(None, description="Precision to load it in; null: as it is stored.")
    template: Template | None = Field(
        None, description="Format of prompts; null: the tokenizer's chat template, else question-answer."
    )
    temperature: float = Field(0.7, ge=0, le=10, description="Sampling temperature by default; 0: greedy.")
    max_answer_tokens: int = Field(256, ge=1, description="Longest answer by default, in tokens.")


class Sampling(Settings):
    """How answers are sampled; null: as the policy's own run did."""

    temperature: float | None = Field(None, ge=0, le=10, description="Sampling temperature; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this mass.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer, in tokens.")
    seed: int | None = Field(None, ge=0, description="Seed of all answers; null: another one each time.")


class ChatJob(Job):
    """The job of the program chat."""

    policies: tuple[PolicyFiles, ...]
    sampling: Sampling = Sampling()
    history: bool | None = None  # null: for policies of a template that has several turns


class ExportJob(Job):
    """The job of the program that exports a policy."""

    policy: PolicyFiles
    form: Literal["merged", "adapter", "gguf"]
    base_name: str = ""  # what an adapter names as its base
    converter: str = ""  # llama.cpp's program that writes GGUF


class LookJob(Job):
    """The job of the program that shows examples of a source as a model will see them."""

    seed: int
    source: Source
    data: Data
    text: Text
    loss_on: LossOn
    vocabulary: int = Field(
        1024, description="Of a tokenizer that is learnt from the texts if none is given."
    )
    count: int = Field(3, ge=1, description="Examples to show.")


class ExportDataJob(Job):
    """The job of the program that exports a run's data."""

    text: Text
    form: Literal["parquet", "jsonl"]
    about: str
