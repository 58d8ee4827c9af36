"""Prefect's defects that flows/services/prefect_workarounds.py works around, and that it does.

If a test of a defect fails, Prefect has mended it or renamed what the workaround rests on: remove the
workaround, or adapt it.
"""

import asyncio
import inspect
from typing import Any
from uuid import uuid4

import prefect
import pytest
from fastapi.testclient import TestClient
from prefect.client.schemas.objects import FlowRun
from prefect.runner import _flow_run_executor
from prefect.server.api.server import create_ui_app
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessWorker, ProcessWorkerResult

from flows.services.prefect_workarounds import hide_v2_pages
from flows.services.worker import Worker


def test_defect_executor_and_worker_both_report_a_killed_run() -> None:
    by_executor = inspect.getsource(_flow_run_executor.FlowRunExecutor)
    by_worker = inspect.getsource(BaseWorker._submit_run_and_capture_errors)
    assert "propose_crashed(\n            self._flow_run, message=msg" in by_executor
    assert "if result.status_code != 0:" in by_worker
    assert "self._propose_crashed_state(" in by_worker.partition("if result.status_code != 0:")[2]


@pytest.mark.parametrize(("status", "reported"), [(-9, []), (0, ["late"])])
def test_our_worker_does_not_report_again_that_a_run_was_killed(
    status: int, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor has reported it; meanwhile the run may have been started again."""
    said: list[str] = []

    async def end(*_: Any) -> ProcessWorkerResult:
        return ProcessWorkerResult(status_code=status, identifier="1")

    async def say(_: Any, __: FlowRun, message: str) -> None:
        said.append(message)

    async def live() -> None:
        worker, killed = Worker(work_pool_name="gpu"), FlowRun(flow_id=uuid4())
        await worker.run(killed, None)
        await worker._propose_crashed_state(killed, "late")
        await worker._propose_crashed_state(killed, "the next attempt's own")
        await worker._propose_crashed_state(FlowRun(flow_id=uuid4()), "another's")

    monkeypatch.setattr(ProcessWorker, "run", end)
    monkeypatch.setattr(ProcessWorker, "_propose_crashed_state", say)
    asyncio.run(live())
    assert said == [*reported, "the next attempt's own", "another's"]


def offered_pages() -> list[str]:
    answer = TestClient(create_ui_app(ephemeral=False)).get("/ui-settings").json()
    return list(answer["available_uis"])


def test_defect_the_v2_pages_are_offered_though_they_are_switched_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with prefect.settings.temporary_settings({prefect.settings.PREFECT_SERVER_UI_V2_ENABLED: False}):
        assert offered_pages() == ["v1", "v2"]
        monkeypatch.setattr(
            prefect, "__ui_v2_static_path__", prefect.__ui_v2_static_path__
        )  # restored afterwards
        hide_v2_pages()
        assert offered_pages() == ["v1"]
