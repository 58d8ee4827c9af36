"""Work around defects of Prefect by undocumented means; all other code keeps to its documentation.

Seen in Prefect 3.9.1. Numbers are issues of https://github.com/PrefectHQ/prefect. For each defect a test
fails once Prefect has mended it or has renamed what the workaround rests on; then the workaround is removed,
or adapted. The tests are in tests/flows/test_prefect_workarounds.py, that of edges in test_stage_runs.py.

- ``RepairedWorker._propose_crashed_state``: the end of a killed run is reported twice, and the second report
  undoes a Retry made in between. No issue found; pull request 18453, closed, proposed a change.
- ``true_edges``: a task seems to depend on an earlier one if a value of its parameters has the ``id()`` of a
  part of that one's result. Issue 20558, mended for objects that have weak references; artifacts are
  dictionaries.
- ``hide_v2_pages``: the server offers its V2 pages, which load a script from another host, whatever its
  settings say. No issue: pull request 21706 means to offer both versions.

Prefect's own heartbeats are replaced in flows/services/heartbeat.py, by documented means.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import prefect
from prefect.context import FlowRunContext

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.workers.process import ProcessWorker, ProcessWorkerResult

    Base = ProcessWorker
else:
    # a subclass of ProcessWorker would become the worker of the type process wherever this file is imported
    Base = object


class RepairedWorker(Base):
    """Mixin for ProcessWorker that reports once that a run was killed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reported: set[UUID] = set()  # runs whose exit with a status other than 0 is on the server

    async def run(self, flow_run: "FlowRun", *args: Any, **kwargs: Any) -> "ProcessWorkerResult":
        """Wait for the process of a run.

        If it was killed, Prefect's executor reports that before this returns.
        """
        result = await super().run(flow_run, *args, **kwargs)
        if result.status_code != 0:
            self._reported.add(flow_run.id)
        return result

    async def _propose_crashed_state(self, flow_run: "FlowRun", *args: Any, **kwargs: Any) -> None:
        """Drop the worker's own report, which follows the executor's a moment later."""
        if flow_run.id in self._reported:
            self._reported.remove(flow_run.id)
        else:
            await super()._propose_crashed_state(flow_run, *args, **kwargs)


class _Untracked(dict[int, Any]):
    """A dictionary that keeps nothing."""

    def __setitem__(self, key: int, value: Any) -> None:
        pass


@contextmanager
def true_edges() -> Iterator[None]:
    """While the block runs, have Prefect draw edges for futures and states alone, not for equal ids."""
    context = FlowRunContext.get()
    assert context is not None
    with context.model_copy(update={"run_results": _Untracked()}):
        yield


def hide_v2_pages() -> None:
    """Point Prefect to no folder of V2 pages; its server serves every version whose folder exists."""
    prefect.__ui_v2_static_path__ = Path("/nonexistent")
