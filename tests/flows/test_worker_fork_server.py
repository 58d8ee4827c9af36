"""Test that a flow run starts as a fork, or without a fork server as Prefect's own process.

tests/servers/test_operations.py kills and cancels such runs.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.services import worker
from flows.services.worker_fork_client import FORK_SERVER
from tests.support.fake_programs import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks flow runs")


def run_flow(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Start a flow run with an id that Prefect refuses before it asks any server."""
    command = shlex.split(worker.FORK_COMMAND)
    chosen = {**os.environ, "PREFECT__FLOW_RUN_ID": "no-such-id", **environment}
    return subprocess.run(
        command, cwd=folder, env=chosen, capture_output=True, text=True, timeout=900, check=False
    )


def test_a_fork_says_and_ends_what_prefects_own_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv(FORK_SERVER, "")
    alone = run_flow(tmp_path)
    server, address, owner = worker.start_fork_server()
    assert os.environ[FORK_SERVER] == str(address)
    try:
        forked = run_flow(tmp_path)
        other = run_flow(
            tmp_path, PREFECT_LOGGING_LEVEL="ERROR"
        )  # a setting that the server has read: the run starts as without it
        assert [run.returncode for run in (alone, forked, other)] == [1, 1, 1]
        assert all("Invalid flow run id" in run.stdout + run.stderr for run in (alone, forked, other))
        assert address.exists()
        server.send_signal(signal.SIGSTOP)
        waiting = subprocess.Popen(
            shlex.split(worker.FORK_COMMAND),
            env={**os.environ, "PREFECT__FLOW_RUN_ID": "x"},
            stdout=subprocess.DEVNULL,
        )
        server.kill()
        server.wait(900)
        assert waiting.wait(900) == 1, "a fork server that dies leaves the run to Prefect's own process"
    finally:
        os.close(owner)


def test_the_engine_ends_with_its_worker_and_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORK_SERVER, "")
    server, address, owner = worker.start_fork_server()
    folder = address.parent
    assert folder.stat().st_mode & 0o077 == 0
    os.close(owner)
    assert server.wait(900) == 0
    assert wait_until(lambda: not folder.exists())
