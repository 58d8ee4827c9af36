"""How a flow run's process starts: forked from the engine, or, without one, as Prefect's own; test_operations kills and cancels such runs."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tree import await_

from flows import forking
from flows.enter import ENGINE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks flow runs")


def enter(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A flow run with an id that Prefect refuses before it asks any server."""
    command = shlex.split(forking.ENTER)
    chosen = {**os.environ, "PREFECT__FLOW_RUN_ID": "no-such-id", **environment}
    return subprocess.run(command, cwd=folder, env=chosen, capture_output=True, text=True, timeout=60, check=False)


def test_a_fork_says_and_ends_what_prefects_own_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv(ENGINE, "")
    alone = enter(tmp_path)
    owner, engine = forking.start_engine()
    address = Path(os.environ[ENGINE])
    try:
        forked = enter(tmp_path)
        other = enter(tmp_path, PREFECT_LOGGING_LEVEL="ERROR")  # a setting that the engine has read: the run starts as without it
        assert [run.returncode for run in (alone, forked, other)] == [1, 1, 1]
        assert all("Invalid flow run id" in run.stdout + run.stderr for run in (alone, forked, other))
        assert address.exists()
        engine.send_signal(signal.SIGSTOP)
        waiting = subprocess.Popen(shlex.split(forking.ENTER), env={**os.environ, "PREFECT__FLOW_RUN_ID": "x"}, stdout=subprocess.DEVNULL)
        engine.kill()
        engine.wait(10)
        assert waiting.wait(60) == 1, "an engine that dies leaves the run to Prefect's own process"
    finally:
        os.close(owner)


def test_the_engine_ends_with_its_worker_and_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE, "")
    owner, engine = forking.start_engine()
    folder = Path(os.environ[ENGINE]).parent
    assert folder.stat().st_mode & 0o077 == 0
    os.close(owner)
    assert engine.wait(30) == 0
    assert await_(lambda: not folder.exists())
