"""Define a stage of the chain: its job, what it takes of other stages, and the Prefect task that runs it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed, Pending

from tasks.artifacts.artifact import Artifact, Kind, Step
from tasks.config.jobs import Job
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage

Inputs = dict[str, Artifact]

# Results are JSON, and what is reused is the store's decision alone.
TASK_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE, "persist_result": True, "result_serializer": "json",
    "task_run_name": lambda: str(task_run.task_name),  # in the graph; by default Prefect adds random letters
}  # fmt: skip


class NothingToDo(Exception):
    """Raised by a stage's function if none of the artifacts that it could work on was built."""


@dataclass(frozen=True)
class Stage:
    """A stage, made by the decorator ``stage`` of a function that says what the stage takes.

    The function gets the settings and the artifacts of other stages, and returns its inputs: of each artifact
    the files that the program reads. It cannot run without those that it names; of those that it takes as
    ``**others`` some may be missing.
    """

    job_type: type[Job]
    choose_inputs: Callable[..., Inputs]
    kind: Kind
    shown: tuple[str, ...]
    complete: Callable[..., Job] | None

    @property
    def name(self) -> str:
        """Return the name, which is also that of its program."""
        return self.choose_inputs.__name__

    @cached_property
    def needed(self) -> frozenset[str]:
        """Return the names of the artifacts without which it cannot run."""
        parameters = inspect.signature(self.choose_inputs).parameters.values()
        return frozenset(one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY)

    def step(self, config: Pipeline, **artifacts: Artifact) -> Step:
        """Return the step that builds it. Raises NothingToDo, and InputError if a setting is wrong."""
        job = self.job_type.of(config)
        if self.complete:
            job = self.complete(job, **artifacts)
        return Step(self.name, job, self.choose_inputs(config, **artifacts), self.shown, self.kind)

    @cached_property
    def run(self) -> Task[..., State]:
        """Return the Prefect task. In place of an artifact that was not built Prefect passes an exception or
        None, which it leaves out.
        """

        def run(config: Pipeline, *, context: RunContext, **artifacts: Artifact | Exception | None) -> State:
            built = {name: found for name, found in artifacts.items() if isinstance(found, dict)}
            try:
                step = self.step(config, **built)
            except NothingToDo as error:
                return Pending(name="NotReady", message=str(error))
            return as_state(run_stage(step, context))

        # Prefect's pages name what a task takes by its parameters
        signature = inspect.signature(self.choose_inputs)
        config, *artifacts = signature.parameters.values()
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = signature.replace(parameters=[config, context, *artifacts])  # type: ignore[attr-defined]
        run.__qualname__ = self.name  # a part of the task's key
        return Task(run, name=self.name, description=inspect.getdoc(self.choose_inputs), **TASK_OPTIONS)


def stage(
    job_type: type[Job],
    *,
    kind: Kind = "gpu",
    shown: tuple[str, ...] = (),
    complete: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Inputs]], Stage]:
    """Make a stage of the function that chooses its inputs.

    ``kind`` is the kind of machine that it needs, and ``shown`` are the metrics that are shown while it runs.
    ``complete(job, **artifacts)`` adds to the job what only the artifacts tell.
    """
    return lambda choose_inputs: Stage(job_type, choose_inputs, kind, shown, complete)


def as_state(artifact: Artifact) -> State:
    """Return the final state of a stage, named Cached if its artifact was reused."""
    name = "Cached" if artifact["cached"] else "Completed"
    return Completed(name=name, message=f"{artifact['stage']} {artifact['key'][:12]}", data=artifact)
