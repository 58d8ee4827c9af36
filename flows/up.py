"""`alignflow up`: Prefect, MLflow and a worker per pool on this machine, watched until Ctrl-C. On loopback, behind a login."""

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from flows import credentials
from flows.credentials import USER, Credentials
from flows.deploying import Definition
from flows.output import Output
from flows.servers import PAGE_POLICY, PREFECT_SERVER, ServerFailed, await_health, stop
from tasks import databases
from tasks.digests import replace_text
from tasks.lifeline import die_with
from tasks.programs.config import InputError

DATABASE = "ALIGNFLOW_DATABASE"
MOST_RESTARTS = 5
SETTLED_SECONDS = 60.0  # a process that has run this long starts with a clean record
POLL_SECONDS = 0.5


class Part(NamedTuple):
    """One process of the house."""

    name: str
    command: list[str]
    environment: dict[str, str]
    health: str = ""  # URL that answers once it is up


class Address(NamedTuple):
    prefect: str
    mlflow: str

    @property
    def page(self) -> str:
        return f"{self.mlflow}/#/experiments?workflowType=machine_learning"


def running(home: Path) -> Address | None:
    """Where the servers of this home are, if `alignflow up` runs."""
    lock = home / "locks" / "up.lock"
    if not lock.exists():
        return None
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None  # nobody holds it
        except BlockingIOError:
            pass
    try:
        return Address(**json.loads((home / "up.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None  # still starting


def clients(home: Path, address: Address) -> dict[str, str]:
    """The environment in which Prefect and MLflow find the servers of this home."""
    known = credentials.read(home)
    places = {"PREFECT_API_URL": f"{address.prefect}/api", "PREFECT_UI_URL": address.prefect, "MLFLOW_TRACKING_URI": address.mlflow}
    return places | (known.clients if known else {})


def up(home: Path, *, prefect_port: int, mlflow_port: int, definition: Definition, with_workers: bool = True) -> None:
    """Start everything, say where it is, and keep it up until Ctrl-C. A second one only says what is running."""
    lock = _claimed(home)
    if lock is None:
        _say_running(home)
        return
    with lock:
        address = Address(f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}")
        for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
            _check_free(port, option)
        pools = tuple(definition.pools) if with_workers else ()
        login = credentials.made(home)
        for number in (signal.SIGINT, signal.SIGTERM):  # also when a script started this with Ctrl-C ignored
            signal.signal(number, signal.default_int_handler)
        house = House(home)
        try:
            parts = servers(home, address, login)
            print("Prefect and MLflow are starting; their pages are there in some 20 seconds.", flush=True)
            for part in parts:
                house.start(part)
            house.await_health()
            os.environ.update(clients(home, address))
            from flows.deploying import deploy

            deploy(definition, webhook=os.environ.get("ALIGNFLOW_ALERT_WEBHOOK", ""))
            for pool in pools:
                house.start(Part(f"worker-{pool}", [sys.executable, "-m", "flows.cli", "work", pool], {}))
            _await_workers(house, pools)
            replace_text(home / "up.json", json.dumps(address._asdict()))
            _say(home, address, definition, pools)
            house.watch()
        finally:
            (home / "up.json").unlink(missing_ok=True)
            house.stop()


def _claimed(home: Path) -> IO[str] | None:
    path = home / "locks" / "up.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise InputError(f"Port {port} is taken by another program; {option} names another one") from None


def servers(home: Path, address: Address, login: Credentials) -> list[Part]:
    """Prefect's and MLflow's servers: on loopback, behind the login, closed to pages of other origins."""
    ports = [str(urlsplit(url).port) for url in address]
    prefect = {
        "PREFECT_SERVER_API_AUTH_STRING": login.clients["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_UI_API_URL": f"{address.prefect}/api",
        "PREFECT_UI_URL": address.prefect,
        **both("PREFECT_SERVER_{}CORS_ALLOWED_ORIGINS", address.prefect),
        **both("PREFECT_SERVER_{}CSRF_PROTECTION_ENABLED", "true"),
    }
    ini = home / "mlflow-auth.ini"
    store = os.environ["MLFLOW_TRACKING_URI"] if os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite") else databases.address(home / "mlflow.db")
    users = databases.address(home / "mlflow-auth.db")
    if os.environ.get(DATABASE):
        prefect["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database("prefect", "asyncpg")
        store = users = database("mlflow", "psycopg2")
    function = "mlflow.server.auth:authenticate_request_basic_auth"
    text = ["[mlflow]", "default_permission = NO_PERMISSIONS", f"database_uri = {users}", f"admin_username = {USER}"]
    text += [f"authorization_function = {function}", "auth_cache_ttl_seconds = 60"]  # without it, every request hashes the password anew: .3 s
    credentials.write_private(ini, "\n".join([*text, ""]).replace("%", "%%"))
    mlflow = {
        "MLFLOW_AUTH_CONFIG_PATH": str(ini), "MLFLOW_AUTH_ADMIN_PASSWORD": login.password, "MLFLOW_FLASK_SERVER_SECRET_KEY": login.signing_key,
        "MLFLOW_BACKEND_STORE_URI": store,  # in the environment, not on the command line, where everybody on the machine would see its password
    }  # fmt: skip
    listening = ["--host", "127.0.0.1", "--port"]
    policy = ["--uvicorn-opts", shlex.join(["--header", f"Content-Security-Policy:{PAGE_POLICY}"])]
    files = ["--artifacts-destination", str(home / "mlartifacts")]
    commands = {
        "prefect": [*PREFECT_SERVER, "warning", *listening, ports[0]],
        "mlflow": ["mlflow", "server", "--app-name", "basic-auth", *files, *policy, "--workers", "1", *listening, ports[1]],
    }
    health = {"prefect": f"{address.prefect}/api/health", "mlflow": f"{address.mlflow}/health"}
    environments = {"prefect": prefect, "mlflow": mlflow}
    return [Part(name, [sys.executable, "-m", *command], environments[name], health[name]) for name, command in commands.items()]


def both(name: str, value: str) -> dict[str, str]:
    """A setting under Prefect's present name and its older one."""
    return dict.fromkeys((name.format("API_"), name.format("")), value)


def database(name: str, driver: str) -> str:
    """The URL of one of the two databases on the PostgreSQL server that ALIGNFLOW_DATABASE names. Raises InputError."""
    parts = urlsplit(os.environ[DATABASE])
    if parts.scheme not in ("postgresql", "postgres") or not parts.hostname or parts.path.strip("/"):
        raise InputError(f"{DATABASE} must be postgresql://USER:PASSWORD@HOST:PORT of a server with the databases prefect and mlflow")
    return urlunsplit((f"postgresql+{driver}", parts.netloc, f"/{name}", parts.query, ""))


class House:
    """Processes that are started again when they die."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.parts: dict[str, Part] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.outputs: dict[str, Output] = {}
        self.deaths: dict[str, list[float]] = {}

    def start(self, part: Part) -> None:
        self.parts[part.name] = part
        folder = self.home / "prefect"  # holds no module that could hide a library's
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            part.command, env=os.environ | part.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with(os.getpid()), cwd=folder,
        )  # fmt: skip
        assert process.stdout
        self.processes[part.name] = process
        self.outputs[part.name] = Output(process.stdout, self.log(part.name))

    def log(self, name: str) -> Path:
        return self.home / "logs" / f"up-{name}.log"

    def await_health(self) -> None:
        for name, part in self.parts.items():
            if part.health:
                await_health(part.health, self.processes[name], self.log(name))

    def watch(self) -> None:
        """Start again what dies; give up on what dies again and again. Raises ServerFailed."""
        while True:
            time.sleep(POLL_SECONDS)
            self.revive()

    def revive(self, say: Callable[[str], None] = print) -> None:
        for name, process in list(self.processes.items()):
            if process.poll() is None:
                continue
            self.outputs[name].finish()
            now = time.monotonic()
            recent = [moment for moment in self.deaths.get(name, []) if now - moment < SETTLED_SECONDS]
            if len(recent) >= MOST_RESTARTS:
                raise ServerFailed(f"{name} stops again and again; its log: {self.log(name)}")
            self.deaths[name] = [*recent, now]
            say(f"{time.strftime('%H:%M:%S')}  {name} stopped and is started again; its log: {self.log(name)}")
            self.start(self.parts[name])

    def stop(self) -> None:
        """The workers first, so that their last words reach the servers."""
        for process in reversed(self.processes.values()):
            stop(process)
        for output in self.outputs.values():
            output.finish()


def _await_workers(house: House, pools: tuple[str, ...]) -> None:
    from flows.workers import online

    deadline = time.monotonic() + 60
    while not all(online(pool) for pool in pools):
        house.revive()
        if time.monotonic() > deadline:
            raise ServerFailed(f"A worker does not come up; the logs: {', '.join(str(house.log(f'worker-{pool}')) for pool in pools)}")
        time.sleep(POLL_SECONDS)


def _say(home: Path, address: Address, definition: Definition, pools: tuple[str, ...]) -> None:
    lines = [
        f"Prefect      {address.prefect}/deployments", f"MLflow       {address.page}",
        f"Log in       as {USER}; the password is in {credentials.file_of(home)} (Prefect's page asks for {USER}:PASSWORD)",
        f"Deployments  {', '.join(definition.names)}", *(f"Left out     {name}: {why}" for name, why in definition.left_out.items()),
        f"Workers      {' and '.join(pools) or 'none here; alignflow work POOL starts one'}",
        "Ctrl-C stops it all.",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)


def _say_running(home: Path) -> None:
    address: Any = None
    deadline = time.monotonic() + 5
    while address is None and time.monotonic() < deadline:
        address = running(home)
        with suppress(KeyboardInterrupt):
            time.sleep(0 if address else 0.2)
    if address:
        print(f"Already running:\nPrefect      {address.prefect}\nMLflow       {address.page}")
    else:
        print("Already starting, in another terminal.")
