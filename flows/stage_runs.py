"""Run the stages of a pipeline as Prefect task runs, in place or on work pools, and collect how each ended.

Facts about Prefect that this rests on (3.9.1; tests/flows/test_stage_runs.py checks them):
- A task that is submitted, or called with return_state=True, ends in the state Failed and raises nothing.
- A task that takes the result of one that did not complete is not run: it ends in the state NotReady, of the
  type PENDING. ``allow_failure`` hands on the exception of a failed task instead, None of one not run.
- A flow's task runner starts a thread for each submitted task, with a copy of the context variables. By
  default it has no upper limit, so tasks that wait for their inputs leave threads for the others.
- Signals reach the main thread only, and a flow run ends when all threads have ended: a stop has to be passed
  on to them. A child that is to die with its parent dies with the thread that started it, so the programs of
  stages in place are started on the main thread.
- Prefect draws an edge for each future or state among a task's parameters, and for every value whose id() is
  that of an earlier result or of a part of it. Ids of plain values are shared and reused: those are false.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from prefect import allow_failure
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.execution.dispatch import Stopped
from tasks.execution.run_stage import RunContext
from tasks.stages.stage import Stage
from tasks.system.errors import DiskFailure
from tasks.system.retry import stopping

NONE_SEEDED: Mapping[str, Pipeline] = MappingProxyType({})
End = State | PrefectFuture[Any]  # of a stage that was run in place; of one that a work pool runs


class Outcome(NamedTuple):
    """How the stages of a run ended, each by its name, in the order in which they were started."""

    built: dict[str, Artifact]
    failed: dict[str, Exception]
    not_run: dict[str, list[str]]  # the failed stages whose results it would have needed


class StageRuns:
    """The stages of one run of the pipeline."""

    def __init__(
        self, config: Pipeline, context: RunContext, *, seeded: Mapping[str, Pipeline] = NONE_SEEDED
    ) -> None:
        """Take the settings and, for stages that draw with a seed of their own, their settings by name.

        A seeded stage belongs to a round and needs every input that it is handed: a reward model that was
        trained without the round's comparisons would be another one.
        """
        self.config, self.context, self.seeded = config, context, seeded
        self.ends: dict[str, End] = {}
        self.inputs: dict[str, list[str]] = {}  # names of the stages that a stage takes results of

    def run(self, stage: Stage, **inputs: Any) -> End:
        """Run a stage in place and return its final state, or hand it to a work pool and return its future.

        Stages in place run one after another on the main thread: a laptop's memory holds one at a time. A
        failed stage raises nothing here, unless this machine's disk is full: the others would fail as well.
        """
        self.inputs[stage.name] = [other for other, end in self.ends.items() if _is_among(end, inputs)]
        needed = inputs if stage.name in self.seeded else stage.needed
        taken = {key: end if key in needed else allow_failure(end) for key, end in inputs.items()}
        config = self.seeded.get(stage.name, self.config)
        if getattr(self.context.pools, stage.kind):
            self.ends[stage.name] = stage.run.submit(config, context=self.context, **taken)
            return self.ends[stage.name]
        self.ends[stage.name] = state = stage.run(config, context=self.context, return_state=True, **taken)
        if state.is_failed() and isinstance(error := _error(state), DiskFailure):
            raise error
        return state

    def wait(self) -> Outcome:
        """Wait for every stage that was started, and return how each ended."""
        found = Outcome({}, {}, {})
        for name, end in self.ends.items():
            state = _final_state(end)
            if state.is_completed():
                found.built[name] = state.result()
            elif state.is_failed():
                found.failed[name] = _error(state)
            else:
                found.not_run[name] = self._causes(name, found)
        return found

    def _causes(self, name: str, found: Outcome) -> list[str]:
        """Return the failed stages because of which a stage was not run."""
        causes = [
            cause
            for taken in self.inputs[name]
            for cause in ([taken] if taken in found.failed else found.not_run.get(taken, []))
        ]
        return list(dict.fromkeys(causes))


@contextmanager
def stopping_threads() -> Iterator[None]:
    """When an exception ends the block, such as a signal's, make the threads of submitted stages end too."""
    stopping.clear()
    try:
        yield
    except BaseException as error:
        stopping.set()
        if isinstance(error, Stopped):  # Ctrl-C was pressed, and a library caught what it raised here
            raise KeyboardInterrupt from error
        raise


def _is_among(end: End, inputs: dict[str, Any]) -> bool:
    return any(end is taken for taken in inputs.values())


def _final_state(end: End) -> State:
    if isinstance(end, PrefectFuture):
        end.wait()
        return end.state
    return end


def _error(state: State) -> Exception:
    error = state.result(raise_on_failure=False)
    assert isinstance(error, Exception)
    return error
