"""The real things on loopback: PostgreSQL, `alignflow up`, workers with stores of their own, over a tree of fake programs; and a browser."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled

from flows.services import credentials
from flows.services.processes import free_port
from tests.support import fake_tree
from tests.support.fake_tree import await_

CHROMIUM = shutil.which("chromium")
CHROMIUM_OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


def postgres_binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server with the databases that alignflow needs; gives its URL."""
    if not postgres_binary("initdb"):
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder, port = Path(tempfile.mkdtemp(prefix="alignflow-pg-")), free_port()
    if user:
        shutil.chown(folder, user)

    def run(tool: str, *arguments: str) -> None:
        subprocess.run(
            [str(postgres_binary(tool)), *arguments], user=user, cwd=folder, check=True, capture_output=True
        )

    run("initdb", "-D", str(folder / "data"), "-U", "alignflow", "--auth", "trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"
    run("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        for name in ("prefect", "mlflow"):
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "alignflow", name)
        yield f"postgresql://alignflow:unused@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


class House:
    """`alignflow up --no-workers`, and workers that share nothing with each other but its servers."""

    def __init__(self, root: Path, tree: Path, database: str, webhook: str, *profiles: str) -> None:
        self.root, self.tree, self.home = root, tree, root / "servers"
        self.prefect_port, self.mlflow_port = free_port(), free_port()
        self.prefect, self.mlflow = (
            f"http://127.0.0.1:{self.prefect_port}",
            f"http://127.0.0.1:{self.mlflow_port}",
        )
        self.started: list[subprocess.Popen[bytes]] = []
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        more = {"ALIGNFLOW_DATABASE": database, "ALIGNFLOW_ALERT_WEBHOOK": webhook}
        ports = ["--prefect-port", str(self.prefect_port), "--mlflow-port", str(self.mlflow_port)]
        self.log = root / "up.txt"
        self.up = self.start(self.log, self.home, "up", *profiles, "--no-workers", *ports, **more)
        await_(lambda: "Ctrl-C" in self.log.read_text() or self.up.poll() is not None, 120)
        assert self.up.poll() is None, self.log.read_text()
        self.password = credentials.load_or_create(self.home).password

    def start(self, log: Path, home: Path, *arguments: str, **more: str) -> "subprocess.Popen[bytes]":
        home.mkdir(parents=True, exist_ok=True)
        environment = {**fake_tree.environment(self.tree, home), **more}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *arguments],
                cwd=self.root,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    @property
    def login(self) -> dict[str, str]:
        """What a worker on another machine is given."""
        clients = {
            "PREFECT_API_AUTH_STRING": f"{credentials.USER}:{self.password}",
            "MLFLOW_TRACKING_USERNAME": credentials.USER,
        }
        places = {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "PREFECT_UI_URL": self.prefect,
        }
        return clients | places | {"MLFLOW_TRACKING_PASSWORD": self.password}

    def work(self, pool: str, name: str) -> "subprocess.Popen[bytes]":
        """A worker with a home of its own, ROOT/NAME; there when this returns."""
        process = self.start(
            self.root / f"{name}.txt", self.root / name, "work", pool, "--name", name, **self.login
        )
        self.workers[name] = process
        with self.client() as client:
            await_(lambda: name in [one.name for one in client.read_workers_for_work_pool(pool)], 60)
        return process

    @contextlib.contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        chosen = {
            PREFECT_API_URL: f"{self.prefect}/api",
            PREFECT_API_AUTH_STRING: f"{credentials.USER}:{self.password}",
        }
        with temporary_settings(chosen), get_client(sync_client=True) as client:
            yield client

    def trigger(self, deployment: str, **parameters: Any) -> UUID:
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(
                found.id, parameters=parameters, state=Scheduled()
            ).id

    def run(self, run_id: UUID) -> FlowRun:
        """The run as it is now; a server that has been killed is waited for."""
        while True:
            with contextlib.suppress(httpx.TransportError), self.client() as client:
                return client.read_flow_run(run_id)
            assert self.up.poll() is None
            time.sleep(0.5)

    def end(self, run_id: UUID, seconds: float = 300) -> FlowRun:
        """The run, once it is at its end."""
        await_(lambda: (state := self.run(run_id).state) is not None and state.is_final(), seconds, every=0.5)
        return self.run(run_id)

    def stages(self, since: float = 0) -> list[FlowRun]:
        """Runs of the flow ``stage``, oldest first."""
        with self.client() as client:
            runs = client.read_flow_runs(limit=200)
        mine = [
            run
            for run in runs
            if any(tag.startswith("key:") for tag in run.tags) and run.created.timestamp() >= since
        ]
        return sorted(mine, key=lambda run: run.created)

    def builders(self, key: str) -> list[FlowRun]:
        """The runs that were started to build the artifact with this key, oldest first."""
        return [run for run in self.stages() if f"key:{key[:40]}" in run.tags]

    def crashes(self, run_id: UUID) -> list[str | None]:
        """What was said of a run each time that it was set to Crashed."""
        with self.client() as client:
            return [
                state.message
                for state in client.read_flow_run_states(run_id)
                if state.type == StateType.CRASHED
            ]

    def runs_of(self, deployment: UUID) -> list[FlowRun]:
        with self.client() as client:
            return [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment]

    def schedule(self, deployment: str, seconds: int) -> None:
        """Add a schedule that is on."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            made = DeploymentScheduleCreate(
                schedule=IntervalSchedule(interval=timedelta(seconds=seconds)), active=True, slug="often"
            )
            client.create_deployment_schedules(found.id, [made])

    def unschedule(self, deployment: str) -> None:
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            for one in found.schedules:
                if one.active:
                    client.delete_deployment_schedule(found.id, one.id)

    def land(self, profile: str, dump: Path) -> None:
        """Say that data has landed, as whoever brings it does."""
        process = self.start(
            self.root / "landed.txt", self.root / "laptop", "landed", profile, str(dump), **self.login
        )
        assert process.wait(60) == 0, (self.root / "landed.txt").read_text()

    def lines(self, stage: str) -> list[str]:
        """The log of the newest runs of a stage."""
        newest = [run.id for run in self.stages() if run.name == stage][-3:]
        with self.client() as client:
            return [
                line.message
                for line in client.read_logs(
                    LogFilter(flow_run_id=LogFilterFlowRunId(any_=newest)), limit=200
                )
            ]

    def tracked(self, name: str) -> list[Any]:
        """MLflow's runs with a name that built something, newest first."""
        mlflow = MlflowClient(self.mlflow)
        experiment = mlflow.get_experiment_by_name("alignflow")
        runs = mlflow.search_runs([experiment.experiment_id], f"attributes.run_name LIKE '{name}%'")
        runs = [run for run in runs if name in (run.info.run_name, run.data.tags.get("alignflow.profile"))]
        return [run for run in runs if run.data.tags.get("cached") != "true"]

    def tags_of_runs(self, name: str) -> list[dict[str, str]]:
        return [run.data.tags for run in self.tracked(name)]

    def statuses(self, name: str) -> list[str]:
        return [run.info.status for run in self.tracked(name)]

    def steps_of(self, name: str, metric: str) -> list[int]:
        return [
            point.step
            for point in MlflowClient(self.mlflow).get_metric_history(
                self.tracked(name)[0].info.run_id, metric
            )
        ]

    def listening(self, port: int) -> list[psutil.Process]:
        """A server's processes, by its port on their command lines."""
        return [
            process
            for process in self.processes()
            if str(port) in (line := command_of(process)) and "flows.cli" not in line
        ]

    def stop(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in reversed(self.started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def processes(self, home: str = "") -> list[psutil.Process]:
        """Everything that runs for a worker's home, or for the whole house."""
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("ALIGNFLOW_HOME", "").startswith(str(self.root / home))
                    and process.pid != os.getpid()
                ):
                    mine.append(process)
        return mine

    def worker(self, pool: str) -> str:
        """Name of the pool's worker that is at work; a new one, with a home of its own, where the last was killed."""
        alive = [
            name for name, process in self.workers.items() if name.startswith(pool) and process.poll() is None
        ]
        if not alive:
            alive = [f"{pool}-{sum(name.startswith(pool) for name in self.workers) + 1}"]
            self.work(pool, alive[0])
        return alive[0]

    def lose(self, name: str) -> None:
        """Kill everything on a worker's machine at once."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.workers[name].wait()

    def flow(self, run: UUID) -> psutil.Process:
        """The process of a flow run."""
        (found,) = [process for process in self.processes() if process.name() == f"flow {str(run)[:8]}"]
        return found

    def file(self, run: UUID, name: str) -> Path:
        """What a pipeline has left on whichever worker ran it."""
        (found,) = self.root.glob(f"cpu-*/runs/{run}/{name}")
        return found

    def program(self, stage: str) -> psutil.Process | None:
        """The process that runs the program of a stage, in whichever home."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "partial" in process.cwd() and (
                    process.name() == stage or f"tasks.programs.{stage}" in process.cmdline()
                ):
                    return process
        return None


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing of one that has ended meanwhile."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
