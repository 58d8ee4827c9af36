"""Run a Prefect worker for pools of the type process, whose flow runs are forks of a preloaded process.

Prefect's own worker starts an interpreter per run. That takes 4.0 s of CPU time for a flow that does nothing,
a fork 0.7 s.
"""

import asyncio
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from flows.services.prefect_workarounds import RepairedWorker
from flows.services.worker_fork_client import FORK_SERVER
from tasks.system.fork_server import ServerProcess, start_server

FORK_COMMAND = shlex.join(
    [sys.executable, "-I", "-S", str(Path(__file__).with_name("worker_fork_client.py"))]
)


class Configuration(ProcessJobConfiguration):
    """How a flow run is started: by its deployment's own command, if it has one, else as a fork."""

    def prepare_for_flow_run(self, *args: Any, **kwargs: Any) -> None:
        self.command = self.command or FORK_COMMAND
        super().prepare_for_flow_run(*args, **kwargs)


with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # that this class replaces ProcessWorker as the worker of the type process

    class Worker(RepairedWorker, ProcessWorker):
        """A process worker whose flow runs are forks."""

        job_configuration = Configuration


def run_worker(pool: str, name: str, limit: int) -> None:
    """Run a worker until Ctrl-C."""
    server = start_fork_server() if sys.platform == "linux" else None
    setup_signal_handlers_worker(os.getpid(), "the worker", print)
    try:
        asyncio.run(
            Worker(work_pool_name=pool, name=name, limit=limit, create_pool_if_not_found=False).start()
        )
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"Worker {name} stopped.")
    finally:
        if server is not None:
            os.close(server.owner)  # it ends after its last flow run, which may outlive this worker


def start_fork_server() -> ServerProcess:
    """Start the fork server in the background; flow runs find its address in their environment."""
    # the settings that Prefect's worker gives to its flow runs
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    server = start_server("flows.services.worker_fork_server", os.environ | settings, None)
    os.environ[FORK_SERVER] = str(server.address)
    return server
