"""Test what the decorator ``stage`` makes of a function that chooses a stage's inputs."""

import inspect
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, user_artifact
from tasks.config.jobs import ReportJob, WinrateJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext
from tasks.stages import stage as stage_module
from tasks.stages.stage import Inputs, NothingToDo, Stage, stage

CONTEXT = RunContext(Machine(), None)


@stage(WinrateJob, kind="cpu", shown=("loss",))
def example(config: Pipeline, *, data: Artifact, **others: Artifact) -> Inputs:
    """Work on what there is."""
    if not others:
        raise NothingToDo("Nothing was built.")
    return {"data": data, **others}


@pytest.fixture
def built(tmp_path: Any) -> Artifact:
    (tmp_path / "file").write_text("content")
    return user_artifact(tmp_path / "file")


def run(monkeypatch: pytest.MonkeyPatch, one: Stage, **artifacts: Any) -> tuple[State, list[Step]]:
    """Run a stage's task as Prefect does, with ``run_stage`` replaced."""
    steps: list[Step] = []

    def run_stage(step: Step, context: RunContext) -> Artifact:
        assert context is CONTEXT
        steps.append(step)
        return Artifact(**{**step.inputs["data"], "stage": step.stage, "key": "k" * 64})

    monkeypatch.setattr(stage_module, "run_stage", run_stage)
    return one.run.fn(Pipeline(), context=CONTEXT, **artifacts), steps


def test_a_stage_says_what_it_is(built: Artifact) -> None:
    assert (example.name, example.kind, example.needed) == ("example", "cpu", {"data"})
    assert (example.run.name, example.run.description) == ("example", "Work on what there is.")
    step = example.step(Pipeline(seed=3), data=built, ppo=built)
    assert (step.stage, step.kind, step.shown, set(step.inputs)) == (
        "example", "cpu", ("loss",), {"data", "ppo"},
    )  # fmt: skip
    assert isinstance(step.job, WinrateJob)
    assert step.job.seed == 3


def test_prefect_sees_what_a_stage_takes_by_name() -> None:
    assert str(inspect.signature(example.run.fn)).startswith("(config: ")
    assert list(inspect.signature(example.run.fn).parameters) == ["config", "context", "data", "others"]


def test_the_settings_are_completed_by_what_the_artifacts_tell(built: Artifact) -> None:
    def complete(job: WinrateJob, data: Artifact) -> WinrateJob:
        return job.model_copy(update={"seed": len(data["path"])})

    @stage(WinrateJob, complete=complete)
    def other(config: Pipeline, *, data: Artifact) -> Inputs:
        return {"data": data}

    job = other.step(Pipeline(), data=built).job
    assert isinstance(job, WinrateJob)
    assert job.seed == len(built["path"])


def test_an_artifact_that_is_needed_must_be_given(built: Artifact) -> None:
    with pytest.raises(TypeError, match="data"):
        example.step(Pipeline(), ppo=built)

    @stage(ReportJob)
    def plain(config: Pipeline) -> Inputs:
        return {}

    with pytest.raises(TypeError, match="unexpected"):
        plain.step(Pipeline(), data=built)


def test_what_was_not_built_is_left_out(monkeypatch: pytest.MonkeyPatch, built: Artifact) -> None:
    state, (step,) = run(monkeypatch, example, data=built, ppo=built, dpo=ValueError("No."), merge=None)
    assert set(step.inputs) == {"data", "ppo"}
    assert (state.is_completed(), state.name, state.message) == (True, "Cached", "example " + 12 * "k")


def test_a_stage_with_nothing_to_do_is_not_ready(monkeypatch: pytest.MonkeyPatch, built: Artifact) -> None:
    state, steps = run(monkeypatch, example, data=built, ppo=ValueError("No."), dpo=None)
    assert (state.is_pending(), state.name, state.message) == (True, "NotReady", "Nothing was built.")
    assert steps == []
