"""Test how the process of a flow run starts: forked from the fork server, or without one as Prefect starts
it.
"""

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessWorker, ProcessWorkerResult

from flows.services import worker
from flows.services import worker as services_worker
from flows.services.worker_fork_client import ENGINE
from tests.support.fake_programs import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks flow runs")


def enter(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Start a flow run with an id that Prefect refuses before it asks any server."""
    command = shlex.split(worker.ENTER)
    chosen = {**os.environ, "PREFECT__FLOW_RUN_ID": "no-such-id", **environment}
    return subprocess.run(
        command, cwd=folder, env=chosen, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_fork_says_and_ends_what_prefects_own_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv(ENGINE, "")
    alone = enter(tmp_path)
    owner, engine = worker.start_engine()
    address = Path(os.environ[ENGINE])
    try:
        forked = enter(tmp_path)
        other = enter(
            tmp_path, PREFECT_LOGGING_LEVEL="ERROR"
        )  # a setting that the engine has read: the run starts as without it
        assert [run.returncode for run in (alone, forked, other)] == [1, 1, 1]
        assert all("Invalid flow run id" in run.stdout + run.stderr for run in (alone, forked, other))
        assert address.exists()
        engine.send_signal(signal.SIGSTOP)
        waiting = subprocess.Popen(
            shlex.split(worker.ENTER),
            env={**os.environ, "PREFECT__FLOW_RUN_ID": "x"},
            stdout=subprocess.DEVNULL,
        )
        engine.kill()
        engine.wait(10)
        assert waiting.wait(60) == 1, "an engine that dies leaves the run to Prefect's own process"
    finally:
        os.close(owner)


def test_the_engine_ends_with_its_worker_and_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE, "")
    owner, engine = worker.start_engine()
    folder = Path(os.environ[ENGINE]).parent
    assert folder.stat().st_mode & 0o077 == 0
    os.close(owner)
    assert engine.wait(30) == 0
    assert wait_until(lambda: not folder.exists())


@pytest.mark.parametrize(("status", "told"), [(-9, []), (0, ["late"])])
def test_the_worker_does_not_say_again_that_a_run_was_killed(
    status: int, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its executor has already reported it; meanwhile the run may have been started again."""
    said: list[str] = []

    async def end(*_: Any) -> ProcessWorkerResult:
        return ProcessWorkerResult(status_code=status, identifier="1")

    async def say(_: Any, __: FlowRun, message: str) -> None:
        said.append(message)

    async def live() -> None:
        worker, killed = services_worker.Worker(work_pool_name="gpu"), FlowRun(flow_id=uuid4())
        await worker.run(killed, None)
        await worker._propose_crashed_state(killed, "late")
        await worker._propose_crashed_state(killed, "the next attempt's own")
        await worker._propose_crashed_state(FlowRun(flow_id=uuid4()), "another's")

    monkeypatch.setattr(ProcessWorker, "run", end)
    monkeypatch.setattr(ProcessWorker, "_propose_crashed_state", say)
    asyncio.run(live())
    assert said == [*told, "the next attempt's own", "another's"]
