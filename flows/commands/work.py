"""Workers of the pools: starting one, and asking which are there."""

import os
import signal
import socket
import sys
from typing import Any

from tasks.system.errors import InputError

LIMITS = {"cpu": 4}  # runs at a time
USUAL_LIMIT = 1  # a stage per GPU; start a worker for each, with CUDA_VISIBLE_DEVICES


def work(pool: str, *, name: str = "", limit: int = 0) -> None:
    """Be a worker of the pool until Ctrl-C. Raises InputError."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a worker started with & inherits it ignored, and could not be stopped
    chosen = limit or LIMITS.get(pool, USUAL_LIMIT)
    title = name or f"{socket.gethostname()}-{pool}-{os.getpid()}"
    if _type_of(pool) != "process":
        command = [
            sys.executable,
            "-m",
            "prefect",
            "worker",
            "start",
            "--pool",
            pool,
            "--limit",
            str(chosen),
            "--name",
            title,
        ]
        os.execv(sys.executable, command)
    from flows.services.worker import run

    run(pool, title, chosen)


def _type_of(pool: str) -> str:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return str(client.read_work_pool(pool).type)
        except ObjectNotFound:
            raise InputError(
                f"The Prefect server has no pool {pool}; `alignflow deploy` makes cpu, gpu and those that its profiles name"
            ) from None


def online(pool: str) -> list[str]:
    """Names of the pool's workers that are at work."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        workers: list[Any] = client.read_workers_for_work_pool(pool)
    return [
        worker.name
        for worker in workers
        if str(getattr(worker.status, "value", worker.status)).upper() == "ONLINE"
    ]
