"""Run a whole installation on loopback: PostgreSQL, `alignflow up`, and workers with homes of their own.

The programs of the stages are fakes (tests/support/fake_programs.py); everything else is what a user runs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
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
from tasks.tracking.metric_names import curve_name
from tests.support import fake_programs
from tests.support.fake_programs import wait_until

REQUEST_SECONDS = 0.25  # between requests while a test waits: each takes a server 20 ms of CPU


class Installation:
    """`alignflow up --no-workers`, and workers that share nothing with each other but its servers."""

    def __init__(self, root: Path, tree: Path, database: str, webhook: str, *profiles: str) -> None:
        self.root, self.tree, self.home = root, tree, root / "servers"
        self.prefect_port, self.mlflow_port = free_port(), free_port()
        self.prefect = f"http://127.0.0.1:{self.prefect_port}"
        self.mlflow = f"http://127.0.0.1:{self.mlflow_port}"
        self.started: list[subprocess.Popen[bytes]] = []
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self._client: SyncPrefectClient | None = None
        self._opened = contextlib.ExitStack()
        more = {"ALIGNFLOW_DATABASE": database, "ALIGNFLOW_ALERT_WEBHOOK": webhook}
        ports = ["--prefect-port", str(self.prefect_port), "--mlflow-port", str(self.mlflow_port)]
        self.log = root / "up.txt"
        self.up = self.start_cli(self.log, self.home, "up", *profiles, "--no-workers", *ports, **more)
        wait_until(lambda: "Ctrl-C" in self.log.read_text() or self.up.poll() is not None)
        assert self.up.poll() is None, self.log.read_text()
        self.password = credentials.load_or_create(self.home).password

    # ------------------------------------------------------------------------------------ processes

    def start_cli(self, log: Path, home: Path, *arguments: str, **more: str) -> "subprocess.Popen[bytes]":
        """Start the command line with a home; its output goes to a log file."""
        home.mkdir(parents=True, exist_ok=True)
        environment = {**fake_programs.environment(self.tree, home), **more}
        command = [sys.executable, "-m", "flows.cli", *arguments]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.started.append(process)
        return process

    @property
    def login(self) -> dict[str, str]:
        """Return the environment variables that a worker on another machine needs."""
        return {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_UI_URL": self.prefect,
            "PREFECT_API_AUTH_STRING": f"{credentials.USER}:{self.password}",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": credentials.USER,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }

    def start_worker(self, pool: str, name: str, *options: str) -> "subprocess.Popen[bytes]":
        """Start a worker with its own home, ROOT/NAME, and wait until the server knows it."""
        log, home = self.root / f"{name}.txt", self.root / name
        process = self.start_cli(log, home, "work", pool, "--name", name, *options, **self.login)
        self.workers[name] = process
        with self.client() as client:
            wait_until(
                lambda: name in [one.name for one in client.read_workers_for_work_pool(pool)],
                every=REQUEST_SECONDS,
            )
        return process

    def running_worker(self, pool: str) -> str:
        """Return the name of a running worker of the pool; start one with a new home if there is none."""
        names = [name for name in self.workers if name.startswith(pool)]
        running = [name for name in names if self.workers[name].poll() is None]
        if running:
            return running[0]
        name = f"{pool}-{len(names) + 1}"
        self.start_worker(pool, name)
        return name

    def kill_machine(self, name: str) -> None:
        """Kill a worker and everything that it has started, as if its machine had lost power."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.workers[name].wait()

    def processes(self, home: str = "") -> list[psutil.Process]:
        """Return the processes of one worker's home, or of the whole installation."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its_home = process.environ().get("ALIGNFLOW_HOME", "")
                if its_home.startswith(str(self.root / home)) and process.pid != os.getpid():
                    found.append(process)
        return found

    def server_processes(self, port: int) -> list[psutil.Process]:
        """Return the processes of the server on a port, which is on their command lines."""
        lines = [(process, command_line(process)) for process in self.processes()]
        return [process for process, line in lines if str(port) in line and "flows.cli" not in line]

    def flow_process(self, run_id: UUID) -> psutil.Process:
        """Return the process of a flow run."""
        (found,) = self.flow_processes(run_id)
        return found

    def flow_processes(self, run_id: UUID) -> list[psutil.Process]:
        """Return the processes of a flow run; it has none while it is not at work."""
        return [process for process in self.processes() if process.name() == f"flow {str(run_id)[:8]}"]

    def program(self, stage: str, steps: int | None = None) -> psutil.Process | None:
        """Return the process that runs the program of a stage (with that many steps of PPO), in any home."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error, FileNotFoundError):
                is_stage = process.name() == stage or f"tasks.programs.{stage}" in process.cmdline()
                if "partial" in (folder := process.cwd()) and is_stage:
                    job = json.loads(Path(folder, "job.json").read_text())["job"]
                    if steps in (None, job.get("ppo", {}).get("steps")):
                        return process
        return None

    def stop(self) -> None:
        """Stop all processes; kill those that do not end within 20 s."""
        self._opened.close()
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in reversed(self.started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for left_over in self.processes():
            with contextlib.suppress(psutil.Error):
                left_over.kill()

    # ------------------------------------------------------------------------------------ Prefect

    @contextlib.contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """Yield the client of the Prefect server; it is kept, as to make one takes longer than a request."""
        if self._client is None:
            chosen = {
                PREFECT_API_URL: f"{self.prefect}/api",
                PREFECT_API_AUTH_STRING: f"{credentials.USER}:{self.password}",
            }
            with temporary_settings(chosen):
                self._client = self._opened.enter_context(get_client(sync_client=True))
        yield self._client

    def trigger(self, deployment: str, **parameters: Any) -> UUID:
        """Start a run of a deployment; return its id."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            run = client.create_flow_run_from_deployment(found.id, parameters=parameters, state=Scheduled())
            return run.id

    def read_run(self, run_id: UUID) -> FlowRun:
        """Return a flow run as it is now; wait for the server if it has been killed."""
        while True:
            with contextlib.suppress(httpx.TransportError), self.client() as client:
                return client.read_flow_run(run_id)
            assert self.up.poll() is None
            time.sleep(0.5)

    def wait_for_run(self, run_id: UUID) -> FlowRun:
        """Wait until a flow run is in a final state; return it."""

        def is_final() -> bool:
            state = self.read_run(run_id).state
            return state is not None and state.is_final()

        wait_until(is_final, every=0.5)
        return self.read_run(run_id)

    def stage_runs(self) -> list[FlowRun]:
        """Return the runs of the flow ``stage``, oldest first."""
        with self.client() as client:
            runs = client.read_flow_runs(limit=200)
        of_stages = [run for run in runs if any(tag.startswith("key:") for tag in run.tags)]
        return sorted(of_stages, key=lambda run: run.created)

    def stage_runs_of(self, key: str) -> list[FlowRun]:
        """Return the runs that were started to build the artifact with this key, oldest first."""
        return [run for run in self.stage_runs() if f"key:{key[:40]}" in run.tags]

    def crash_messages(self, run_id: UUID) -> list[str | None]:
        """Return the message of every Crashed state that a run has been in."""
        with self.client() as client:
            states = client.read_flow_run_states(run_id)
        return [state.message for state in states if state.type == StateType.CRASHED]

    def runs_of(self, deployment: UUID) -> list[FlowRun]:
        """Return the flow runs of a deployment."""
        with self.client() as client:
            return [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment]

    def add_schedule(self, deployment: str, seconds: int) -> None:
        """Add an active schedule to a deployment."""
        interval = IntervalSchedule(interval=timedelta(seconds=seconds))
        schedule = DeploymentScheduleCreate(schedule=interval, active=True, slug="often")
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            client.create_deployment_schedules(found.id, [schedule])

    def remove_schedules(self, deployment: str) -> None:
        """Remove the active schedules of a deployment."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            for one in found.schedules:
                if one.active:
                    client.delete_deployment_schedule(found.id, one.id)

    def announce_dump(self, profile: str, dump: Path) -> None:
        """Run `alignflow landed`, as the process does that has delivered new data."""
        log = self.root / "landed.txt"
        process = self.start_cli(log, self.root / "laptop", "landed", profile, str(dump), **self.login)
        assert process.wait(900) == 0, log.read_text()

    def log_lines(self, stage: str) -> list[str]:
        """Return the log messages of the three newest runs of a stage."""
        return self.messages(*[run.id for run in self.stage_runs() if run.name == stage][-3:])

    def messages(self, *run_ids: UUID) -> list[str]:
        """Return the log messages of flow runs."""
        of_them = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[*run_ids]))
        with self.client() as client:
            return [line.message for line in client.read_logs(of_them, limit=200)]

    def run_file(self, run_id: UUID, name: str) -> Path:
        """Return a file that a pipeline's run has left in the home of the worker that ran it."""
        (found,) = self.root.glob(f"cpu-*/runs/{run_id}/{name}")
        return found

    # ------------------------------------------------------------------------------------ MLflow

    def tracked_runs(self, name: str) -> list[Any]:
        """Return MLflow's runs of a stage or a profile that were not read from the store, newest first."""
        mlflow = MlflowClient(self.mlflow)
        experiment = mlflow.get_experiment_by_name("alignflow")
        runs = mlflow.search_runs([experiment.experiment_id], f"attributes.run_name LIKE '{name}%'")
        tags = ("stage", "alignflow.profile")
        runs = [run for run in runs if name in map(run.data.tags.get, tags)]
        return [run for run in runs if run.data.tags.get("cached") != "true"]

    def tracked_tags(self, name: str) -> list[dict[str, str]]:
        return [run.data.tags for run in self.tracked_runs(name)]

    def tracked_statuses(self, name: str) -> list[str]:
        return [run.info.status for run in self.tracked_runs(name)]

    def tracked_steps(self, stage: str, metric: str) -> list[int]:
        """Return the steps at which the newest run of a stage has logged a metric."""
        run, curve = self.tracked_runs(stage)[0].info.run_id, curve_name(stage, metric)
        return [point.step for point in MlflowClient(self.mlflow).get_metric_history(run, curve)]


def command_line(process: psutil.Process) -> list[str]:
    """Return the command line of a process; an empty list if it has ended meanwhile."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
