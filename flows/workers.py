"""Workers of the pools: starting one, and asking which are there."""

import os
import signal
import socket
import sys
from typing import Any, NoReturn

LIMITS = {"gpu": 1}  # stages at a time: one per GPU; start a worker for each, with CUDA_VISIBLE_DEVICES
USUAL_LIMIT = 4


def work(pool: str, *, name: str = "", limit: int = 0) -> NoReturn:
    """Become a worker of the pool, until Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a worker started with & inherits it ignored, and could not be stopped
    chosen = str(limit or LIMITS.get(pool, USUAL_LIMIT))
    title = name or f"{socket.gethostname()}-{pool}-{os.getpid()}"
    command = ["-m", "prefect", "worker", "start", "--pool", pool, "--limit", chosen, "--name", title]
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - no shell is wanted


def online(pool: str) -> list[str]:
    """Names of the pool's workers that are at work."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        workers: list[Any] = client.read_workers_for_work_pool(pool)
    return [worker.name for worker in workers if str(getattr(worker.status, "value", worker.status)).upper() == "ONLINE"]
