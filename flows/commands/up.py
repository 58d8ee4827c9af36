"""`alignflow up`: run Prefect, MLflow and a worker per pool on this machine until Ctrl-C.

On loopback, behind a login.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from flows.arguments import add_deployed_profiles, number
from flows.commands.deploy import Definition, define
from flows.services import credentials, environment, isolation
from flows.services.credentials import USER
from flows.services.local_servers import Address, Process, client_environment, find_running, servers
from flows.services.log_rotation import RotatedLog
from flows.services.processes import ServerFailed, await_health, stop
from tasks.artifacts.store import home
from tasks.system.errors import InputError
from tasks.system.files import replace_text
from tasks.system.locks import try_acquire
from tasks.system.processes import die_with_parent

HELP = "Run Prefect, MLflow and workers on this machine until Ctrl-C."
EXAMPLE = "alignflow up mine.yaml"

MOST_RESTARTS = 5
SETTLED_SECONDS = 60.0  # a process that has run this long starts with a clean record
POLL_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow up`."""
    add_deployed_profiles(parser)
    port = number(int, 0, 65535)
    parser.add_argument("--prefect-port", type=port, default=4200, help="default: %(default)s")
    parser.add_argument("--mlflow-port", type=port, default=5000, help="default: %(default)s")
    parser.add_argument(
        "--no-workers", action="store_true", help="servers only; `alignflow work POOL` starts workers"
    )


def main(args: argparse.Namespace) -> None:
    """Run the servers and workers until Ctrl-C. Raises InputError and ServerFailed."""
    from flows.extras import check_servers
    from flows.preflight import check_places

    root = home()
    check_places(root, None)
    if args.prefect_port == args.mlflow_port and args.prefect_port:
        raise InputError(
            f"--prefect-port and --mlflow-port are both {args.prefect_port}: two servers need two ports"
        )
    definition = define(args.profile)
    check_servers()
    isolation.reach_loopback_directly()
    environment.prepare(root)
    ports = {"prefect_port": args.prefect_port, "mlflow_port": args.mlflow_port}
    with suppress(KeyboardInterrupt):
        up(root, **ports, definition=definition, with_workers=not args.no_workers)


def up(
    home: Path, *, prefect_port: int, mlflow_port: int, definition: Definition, with_workers: bool = True
) -> None:
    """Start everything, say where it is, and keep it up until Ctrl-C.

    A second one only says what is running.
    """
    lock = try_acquire(home / "locks" / "up.lock")
    if lock is None:
        _say_running(home)
        return
    with lock:
        address = Address(f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}")
        for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
            _check_free(port, option)
        pools = tuple(definition.pools) if with_workers else ()
        login = credentials.load_or_create(home)
        for number in (signal.SIGINT, signal.SIGTERM):  # also when a script started this with Ctrl-C ignored
            signal.signal(number, signal.default_int_handler)
        supervisor = Supervisor(home)
        try:
            processes = servers(home, address, login)
            print("Prefect and MLflow are starting; their pages are there in some 20 seconds.", flush=True)
            for process in processes:
                supervisor.start(process)
            supervisor.await_health()
            os.environ.update(client_environment(home, address))
            from flows.commands.deploy import deploy

            deploy(definition, webhook=os.environ.get("ALIGNFLOW_ALERT_WEBHOOK", ""))
            for pool in pools:
                supervisor.start(
                    Process(f"worker-{pool}", [sys.executable, "-m", "flows.cli", "work", pool], {})
                )
            _await_workers(supervisor, pools)
            replace_text(home / "up.json", json.dumps(address._asdict()))
            _say(home, address, definition, pools)
            supervisor.watch()
        finally:
            (home / "up.json").unlink(missing_ok=True)
            supervisor.stop()


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise InputError(f"Port {port} is taken by another program; {option} names another one") from None


class Supervisor:
    """Start processes, and restart those that stop."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.processes: dict[str, Process] = {}
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.outputs: dict[str, RotatedLog] = {}
        self.deaths: dict[str, list[float]] = {}

    def start(self, process: Process) -> None:
        self.processes[process.name] = process
        folder = self.home / "prefect"  # holds no module that could hide a library's
        folder.mkdir(parents=True, exist_ok=True)
        child = subprocess.Popen(
            process.command,
            env=os.environ | process.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
            cwd=folder,
        )
        assert child.stdout
        self.children[process.name] = child
        self.outputs[process.name] = RotatedLog(child.stdout, self.log(process.name))

    def log(self, name: str) -> Path:
        return self.home / "logs" / f"up-{name}.log"

    def await_health(self) -> None:
        for name, process in self.processes.items():
            if process.health:
                await_health(process.health, self.children[name], self.log(name))

    def watch(self) -> None:
        """Restart processes that stop. Raises ServerFailed for one that stops again and again."""
        while True:
            time.sleep(POLL_SECONDS)
            self.revive()

    def revive(self, say: Callable[[str], None] = print) -> None:
        for name, child in list(self.children.items()):
            if child.poll() is None:
                continue
            self.outputs[name].finish()
            now = time.monotonic()
            recent = [moment for moment in self.deaths.get(name, []) if now - moment < SETTLED_SECONDS]
            if len(recent) >= MOST_RESTARTS:
                raise ServerFailed(f"{name} stops again and again; its log: {self.log(name)}")
            self.deaths[name] = [*recent, now]
            say(
                f"{time.strftime('%H:%M:%S')}  {name} stopped and is started again; its log: {self.log(name)}"
            )
            self.start(self.processes[name])

    def stop(self) -> None:
        """Stop all processes, the workers first, so that their last logs reach the servers."""
        for child in reversed(self.children.values()):
            stop(child)
        for output in self.outputs.values():
            output.finish()


def _await_workers(supervisor: Supervisor, pools: tuple[str, ...]) -> None:
    from flows.commands.work import online_workers

    deadline = time.monotonic() + 60
    while not all(online_workers(pool) for pool in pools):
        supervisor.revive()
        if time.monotonic() > deadline:
            raise ServerFailed(
                f"A worker does not come up; the logs: "
                f"{', '.join(str(supervisor.log(f'worker-{pool}')) for pool in pools)}"
            )
        time.sleep(POLL_SECONDS)


def _say(home: Path, address: Address, definition: Definition, pools: tuple[str, ...]) -> None:
    lines = [
        f"Prefect      {address.prefect}/deployments", f"MLflow       {address.page}",
        f"Log in       as {USER}; the password is in {credentials.file_of(home)} (Prefect's page asks for "
        f"{USER}:PASSWORD)",
        f"Deployments  {', '.join(definition.names)}",
        *(f"Left out     {name}: {why}" for name, why in definition.left_out.items()),
        f"Workers      {' and '.join(pools) or 'none here; alignflow work POOL starts one'}",
        "Ctrl-C stops it all.",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)


def _say_running(home: Path) -> None:
    address: Address | None = None
    deadline = time.monotonic() + 5
    while address is None and time.monotonic() < deadline:
        address = find_running(home)
        with suppress(KeyboardInterrupt):
            time.sleep(0 if address else 0.2)
    if address:
        print(f"Already running:\nPrefect      {address.prefect}\nMLflow       {address.page}")
    else:
        print("Already starting, in another terminal.")
