"""A Prefect worker for pools of the type process, whose flow runs are forks of one process that has Prefect and MLflow loaded.

A run of Prefect's own worker takes 4 s until its flow begins, of two processes that import Prefect one after the other, and MLflow another 2 s.
"""

import asyncio
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.settings import get_current_settings
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from flows.services.worker_fork_client import ENGINE

ENTER = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("worker_fork_client.py"))])
BACKLOG = 64


class Configuration(ProcessJobConfiguration):
    """How a flow run is started: by its deployment's own command, if it has one."""

    def prepare_for_flow_run(self, *args: Any, **kwargs: Any) -> None:
        self.command = self.command or ENTER
        super().prepare_for_flow_run(*args, **kwargs)


with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # Prefect says that this class takes the other's place as the worker of the type process

    class Worker(ProcessWorker):
        job_configuration = Configuration

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._told: set[UUID] = set()  # runs whose end with another status than 0 has been told

        async def run(self, flow_run: FlowRun, *args: Any, **kwargs: Any) -> ProcessWorkerResult:
            """The process of a run, to its end; Prefect's executor tells the server when it was killed (where it cannot: no heartbeat, Crashed)."""
            result = await super().run(flow_run, *args, **kwargs)
            if result.status_code != 0:
                self._told.add(flow_run.id)
            return result

        async def _propose_crashed_state(self, flow_run: FlowRun, *args: Any, **kwargs: Any) -> None:
            """Tell it once. Prefect's worker tells it again a moment later, which would take back a Retry that came between."""
            if flow_run.id in self._told:
                self._told.remove(flow_run.id)
            else:
                await super()._propose_crashed_state(flow_run, *args, **kwargs)

        async def _submit_scheduled_flow_runs(self, flow_run_response: list[WorkerFlowRunResponse]) -> Any:
            """Leave a run for the next poll whose last process is not quite put away; Prefect's own worker would die of it (its issue 16806)."""
            busy = set(self.limiter.statistics().borrowers) if self._limiter else set()
            return await super()._submit_scheduled_flow_runs(
                [entry for entry in flow_run_response if entry.flow_run.id not in busy]
            )


def run(pool: str, name: str, limit: int) -> None:
    """Work until Ctrl-C."""
    owner, _engine = start_engine() if sys.platform == "linux" else (None, None)
    setup_signal_handlers_worker(os.getpid(), "the worker", print)
    try:
        asyncio.run(
            Worker(work_pool_name=pool, name=name, limit=limit, create_pool_if_not_found=False).start()
        )
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"Worker {name} stopped.")
    finally:
        if owner is not None:
            os.close(owner)


def start_engine() -> "tuple[int, subprocess.Popen[bytes]]":
    """Start the process that is forked, in the background; gives a descriptor that must stay open for as long as it is wanted, and the process."""
    address = str(Path(tempfile.mkdtemp(prefix="alignflow-")) / "engine")
    os.environ[ENGINE] = address
    # what Prefect's worker gives to its flow runs
    environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
    theirs, ours = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(BACKLOG)
        inherited = (listener.fileno(), theirs)
        engine = subprocess.Popen(
            [sys.executable, "-m", "flows.services.worker_fork_server", *map(str, inherited)],
            env=environment, stdin=subprocess.DEVNULL, pass_fds=inherited, start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    return ours, engine
