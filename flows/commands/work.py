"""`alignflow work`: run a worker of a pool, and find out which workers are online."""

import argparse
import os
import signal
import socket
import sys

from flows.arguments import number
from tasks.system.errors import InputError

HELP = "Run the stages or flows of a work pool on this machine."
EXAMPLE = "CUDA_VISIBLE_DEVICES=0 alignflow work gpu"

LIMITS = {"cpu": 4}  # runs at a time
USUAL_LIMIT = 1  # a stage per GPU; start a worker for each, with CUDA_VISIBLE_DEVICES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow work`."""
    pool_help = "cpu or gpu, or a pool that a deployed profile names in pools.*"
    parser.add_argument("pool", metavar="POOL", help=pool_help)
    parser.add_argument("--name", default="", help="default: host, pool and process id")
    parser.add_argument(
        "--limit", type=number(int, 0), default=0, help="runs at a time (default: 4 for cpu, else 1)"
    )


def main(args: argparse.Namespace) -> None:
    """Run a worker until Ctrl-C. Raises InputError and ServerFailed."""
    from flows.preflight import require_prefect_server

    require_prefect_server()
    work(args.pool, name=args.name, limit=args.limit)


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
    from flows.services.worker import run_worker

    run_worker(pool, title, chosen)


def _type_of(pool: str) -> str:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return str(client.read_work_pool(pool).type)
        except ObjectNotFound:
            raise InputError(
                f"The Prefect server has no pool {pool}; `alignflow deploy` makes cpu, gpu and those that "
                "its profiles name"
            ) from None


def online_workers(pool: str) -> list[str]:
    """Names of the pool's workers that are at work."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(pool)
    return [
        worker.name
        for worker in workers
        if str(getattr(worker.status, "value", worker.status)).upper() == "ONLINE"
    ]
