"""Connect to MLflow. Only this file and entities.py import mlflow.

MLflow is never a reason for training to stop: calls wait during an outage of its server, and any other error
turns tracking off with one warning.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tasks.artifacts.store import home
from tasks.system import events
from tasks.system.errors import disk_failure
from tasks.system.locks import acquire
from tasks.system.retry import retry
from tasks.tracking import databases

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

T = TypeVar("T")
Metric = tuple[str, float, int, int]  # name, value, milliseconds since the epoch, step

EXPERIMENT = "alignflow"
URI = "MLFLOW_TRACKING_URI"
PAGE = "ALIGNFLOW_MLFLOW_URL"  # where a browser reaches the server, if that is another address
MAX_METRICS = 500  # of one call; MLflow takes 1000
MAX_PARAMS = 100  # of one call
PATIENCE = 300.0  # seconds that a call waits during an outage of the server
PATIENCE_TO_CONNECT = 15.0
PAUSE = 1.0  # seconds between two attempts
MAX_INSERTS = 6  # attempts to insert what another process inserts too


class Run(NamedTuple):
    """A run as MLflow stores it."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    started: float  # seconds since the epoch


class Tracker:
    """A connection to MLflow, opened at the first ``connect``; several threads may use it at the same time.

    Its other methods need a connection and raise what MLflow raises; inside ``turned_off_by_errors`` the run
    goes on.
    """

    def __init__(self, root: Path, uri: str) -> None:
        self.root, self.uri = root, uri
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._is_off = False
        self._connecting = threading.RLock()
        self._reporting = threading.Lock()

    def __reduce__(self) -> tuple[type["Tracker"], tuple[Path, str]]:
        """Pickle the address alone: a Dask worker, which gets a task's parameters, connects by itself."""
        return Tracker, (self.root, self.uri)

    def connect(self) -> bool:
        """Connect if that was not done before; return whether MLflow can be used."""
        with self._connecting:
            if self._client is None and not self._is_off:
                with self.turned_off_by_errors():
                    self._client, self._experiment = self._open()
        return self.is_up

    @property
    def is_up(self) -> bool:
        """Whether MLflow is connected and has raised no error."""
        return self._client is not None and not self._is_off

    @property
    def is_remote(self) -> bool:
        """Whether the tracker is a server, which other machines can use too."""
        return self.uri.startswith("http")

    def _open(self) -> "tuple[MlflowClient, str]":
        os.environ.setdefault(URI, self.uri)  # some functions of MLflow read it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        # two processes that migrate a new database at the same time would break it
        with acquire(self.root / "locks" / "mlflow.lock"):
            from mlflow import MlflowClient

            _redirect_logs()
            client = MlflowClient(self.uri)
            found = self._retry(lambda: client.get_experiment_by_name(EXPERIMENT), PATIENCE_TO_CONNECT)
            if found:
                return client, found.experiment_id
            place = (self.root / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=place)

    @contextmanager
    def turned_off_by_errors(self) -> Iterator[None]:
        """Turn tracking off if the block raises an error, with one warning, and go on."""
        try:
            yield
        except Exception as error:
            with self._reporting:
                is_first, self._is_off = not self._is_off, True
            if is_first:
                events.tell("warning", text=self._describe(error))

    def _describe(self, error: Exception) -> str:
        if failure := disk_failure(error, self.root):
            return f"MLflow cannot write; the run goes on untracked ({str(failure).partition(':')[0]})"
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        return f"MLflow is not reachable; the run goes on untracked ({reason})"

    def _retry(self, call: Callable[[], T], patience: float | None = None) -> T:
        """Return what ``call`` returns.

        During an outage, retry for ``patience`` seconds (default: PATIENCE).
        """
        seconds = PATIENCE if patience is None else patience
        return retry(call, is_outage=self.is_outage, patience=seconds, pause=PAUSE)

    def is_outage(self, error: Exception) -> bool:
        """Return whether the server was unreachable or failed, so that a retry may succeed.

        A refusal is no outage.
        """
        if not self.is_remote:
            return False
        response = getattr(error, "response", None)
        if response is not None:
            return bool(response.status_code >= 500)
        if status := getattr(error, "get_http_status_code", None):
            return bool(status() >= 500)
        return isinstance(error, OSError)

    @property
    def _mlflow(self) -> "MlflowClient":
        assert self._client is not None, "connect first"
        return self._client

    # runs

    def page(self, run_id: str, file: str = "") -> str:
        """Return the URL of a run's page, with one of its files opened; "" if the tracker is no server."""
        if not self.is_remote:
            return ""
        server = (os.environ.get(PAGE) or self.uri).rstrip("/")
        return f"{server}/{self.page_path(run_id, file)}"

    def page_path(self, run_id: str, file: str = "") -> str:
        """Return the address of a run's page from any other page of MLflow."""
        view = f"artifacts/{file}" if file else "artifacts"
        return f"#/experiments/{self._experiment}/runs/{run_id}/{view}?workflowType=machine_learning"

    def start(self, name: str, tags: dict[str, str]) -> str:
        """Create a run and return its id."""
        run = self._retry(lambda: self._mlflow.create_run(self._experiment, run_name=name, tags=tags))
        return str(run.info.run_id)

    def search(self, condition: str, *, limit: int = 1) -> list[Run]:
        """Return the newest runs that match a condition in MLflow's filter syntax."""
        experiments = [self._experiment]
        return [
            _as_run(found)
            for found in self._retry(
                lambda: self._mlflow.search_runs(experiments, filter_string=condition, max_results=limit)
            )
        ]

    def run(self, run_id: str, patience: float | None = None) -> Run | None:
        """Return a run; None if MLflow has none with this id."""
        try:
            return _as_run(self._retry(lambda: self._mlflow.get_run(run_id), patience))
        except Exception as error:
            status = getattr(error, "get_http_status_code", None)
            if status and status() == 404:
                return None
            raise

    def end(self, run_id: str, status: str, patience: float | None = None) -> None:
        """Set the status that a run ended with."""
        self._retry(lambda: self._mlflow.set_terminated(run_id, status), patience)

    def reopen(self, run_id: str) -> None:
        """Set the status of an ended run to RUNNING."""
        self._retry(lambda: self._mlflow.update_run(run_id, status="RUNNING"))

    def insert(self, function: "Callable[[MlflowClient], object]") -> None:
        """Call a function of MLflow's client that inserts the rows that are not there yet.

        MLflow looks which rows are there and inserts the others without a lock: of two stages that read the
        same data set at the same time one gets an error of the database. The next time it finds the rows.
        """
        for attempt in range(MAX_INSERTS):
            try:
                self.call(function)
            except Exception as error:
                if not is_duplicate(error) or attempt == MAX_INSERTS - 1:
                    raise
                time.sleep(PAUSE * (attempt + 1) / 5)
            else:
                return

    def call(self, function: "Callable[[MlflowClient], T]", patience: float | None = None) -> T:
        """Return what a function of MLflow's client returns; wait during an outage."""
        return self._retry(lambda: function(self._mlflow), patience)

    @property
    def experiment(self) -> str:
        """Return the id of the experiment that all runs are in."""
        return self._experiment

    # contents of a run

    def log_metrics(
        self, run_id: str, metrics: list[Metric], patience: float | None = None, *, model: str | None = None
    ) -> None:
        """Log any number of metrics, of a run or a model of it; logging one twice changes nothing."""
        from mlflow.entities import Metric as MlflowMetric

        values = [MlflowMetric(*metric, model_id=model) for metric in metrics]
        for first in range(0, len(values), MAX_METRICS):
            part = values[first : first + MAX_METRICS]
            self._retry(partial(self._mlflow.log_batch, run_id, metrics=part), patience)

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        """Log any number of parameters."""
        from mlflow.entities import Param

        values = [Param(name, value) for name, value in params.items()]
        for first in range(0, len(values), MAX_PARAMS):
            part = values[first : first + MAX_PARAMS]
            self._retry(partial(self._mlflow.log_batch, run_id, params=part))

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        values = [RunTag(name, value) for name, value in tags.items()]
        self._retry(lambda: self._mlflow.log_batch(run_id, tags=values))

    def last_step(self, run_id: str, metric: str) -> int:
        """Return the last step for which the metric has a value, -1 if it has none."""
        history = self._retry(lambda: self._mlflow.get_metric_history(run_id, metric))
        return max((point.step for point in history), default=-1)

    def upload(self, run_id: str, path: Path, folder: str | None, patience: float | None = None) -> None:
        """Upload a file, or a folder's files, into a folder of the run's artifacts (None: the top one)."""
        log = self._mlflow.log_artifacts if path.is_dir() else self._mlflow.log_artifact
        self._retry(lambda: log(run_id, str(path), folder), patience)

    def download(self, run_id: str, name: str, folder: Path) -> Path | None:
        """Download an artifact file of a run into ``folder`` and return its path.

        None if there is no such file.
        """
        from mlflow.exceptions import MlflowException

        try:
            return Path(self._retry(lambda: self._mlflow.download_artifacts(run_id, name, str(folder))))
        except (MlflowException, OSError) as error:
            if self.is_outage(error):
                raise
            return None

    def delete(self, run_id: str, folder: str) -> None:
        """Delete a folder of a run's artifacts."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        get_artifact_repository(self._mlflow.get_run(run_id).info.artifact_uri).delete_artifacts(folder)


_trackers: dict[tuple[Path, str], Tracker] = {}
_creating = threading.Lock()


def process_tracker() -> Tracker:
    """Return the one tracker of this process: of MLFLOW_TRACKING_URI, or of a SQLite file in the home if that
    is unset.
    """
    root = home()
    uri = os.environ.get(URI) or databases.address(root / "mlflow.db")
    with _creating:
        return _trackers.setdefault((root, uri), Tracker(root, uri))


def _as_run(run: "MlflowRun") -> Run:
    started = (run.info.start_time or 0) / 1000
    return Run(run.info.run_id, run.info.status, dict(run.data.tags), dict(run.data.params), started)


def _redirect_logs() -> None:
    """Remove MLflow's log handlers, which print errors with tracebacks: errors are reported as warnings."""
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.handlers, logger.propagate = [logging.NullHandler()], True


def is_duplicate(error: Exception) -> bool:
    """Return whether the database has refused a row that it has already; SQLite and PostgreSQL say so."""
    return "unique" in str(error).lower()
