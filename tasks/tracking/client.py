"""The connection to MLflow: opened once per process, waited for through an outage, and given up with one line. The only file that imports mlflow."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tasks.artifacts.store import home
from tasks.system import events
from tasks.system.errors import disk_failure
from tasks.system.retry import retry
from tasks.tracking import databases

EXPERIMENT = "alignflow"
MAX_ENTRIES = 500  # metrics of one call; MLflow takes 1000
MAX_PARAMS = 100  # of one call
PATIENCE = 300.0  # seconds that a call waits for a server which has gone away
PATIENCE_TO_CONNECT = 15.0
PAUSE = 1.0  # between two tries

_client: Any = None
_experiment = ""
_down = False


def connect() -> bool:
    """Reach the tracker, once per process: MLFLOW_TRACKING_URI if it is set, else a SQLite file in the home."""
    global _client, _experiment
    if _client is None and not _down:
        with forgiving():
            _client, _experiment = _open()
    return is_up()


def is_up() -> bool:
    return _client is not None and not _down


def is_remote() -> bool:
    """Whether the tracker is a server that other machines may use too."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")


def _open() -> tuple[Any, str]:
    root = home()
    os.environ.setdefault("MLFLOW_TRACKING_URI", databases.address(root / "mlflow.db"))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    (root / "locks").mkdir(parents=True, exist_ok=True)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with (root / "locks" / "mlflow.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that both migrate a new database leave a broken one
        from mlflow import MlflowClient

        _keep_off_the_screen()
        client = MlflowClient(uri)
        found = patiently(lambda: client.get_experiment_by_name(EXPERIMENT), PATIENCE_TO_CONNECT)
        files = (root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        return client, found.experiment_id if found else client.create_experiment(
            EXPERIMENT, artifact_location=files
        )


def _keep_off_the_screen() -> None:
    """Let MLflow log where everything else does: it prints its errors, tracebacks included, by a handler of its own."""
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.handlers, logger.propagate = [logging.NullHandler()], True


@contextmanager
def forgiving() -> Iterator[None]:
    """Turn the tracker off at its first error, with one line on the screen."""
    global _down
    try:
        yield
    except Exception as error:
        if not _down:
            _down = True
            reason = (str(error) or type(error).__name__).splitlines()[0][:300]
            text = f"MLflow is not reachable; the run goes on untracked ({reason})"
            if failure := disk_failure(error, home()):
                text = f"MLflow cannot write; the run goes on untracked ({str(failure).partition(':')[0]})"
            events.tell("warning", text=text)


def patiently(call: Callable[[], Any], patience: float | None = None) -> Any:
    """Return what ``call`` returns, retried while the server is away for as long as ``patience`` (seconds, PATIENCE by default)."""
    return retry(call, is_outage=is_outage, patience=PATIENCE if patience is None else patience, pause=PAUSE)


def is_outage(error: Exception) -> bool:
    """Whether the server may be back soon: it could not be reached, or failed by itself. What it refuses stays refused."""
    if not is_remote():
        return False
    answer = getattr(error, "response", None)
    if answer is not None:
        return bool(answer.status_code >= 500)
    if status := getattr(error, "get_http_status_code", None):
        return bool(status() >= 500)
    return isinstance(error, OSError)


def page(run_id: str, file: str = "") -> str:
    """Return the address of a run's page, with one of its files opened; "" if the tracker is no server."""
    place = (os.environ.get("ALIGNFLOW_MLFLOW_URL") or os.environ.get("MLFLOW_TRACKING_URI", "")).rstrip("/")
    opened = f"artifacts/{file}" if file else "artifacts"
    return (
        f"{place}/#/experiments/{_experiment}/runs/{run_id}/{opened}?workflowType=machine_learning"
        if is_remote()
        else ""
    )


def start(name: str, tags: dict[str, str]) -> str:
    return str(patiently(lambda: _client.create_run(_experiment, run_name=name, tags=tags)).info.run_id)


def search(condition: str, *, most: int = 1) -> list[Any]:
    """Runs that fulfil a condition in MLflow's own words, newest first."""
    return list(
        patiently(lambda: _client.search_runs([_experiment], filter_string=condition, max_results=most))
    )


def end(run_id: str, status: str, patience: float | None = None) -> None:
    patiently(lambda: _client.set_terminated(run_id, status), patience)


def revive(run_id: str) -> None:
    patiently(lambda: _client.update_run(run_id, status="RUNNING"))


def log_metrics(
    run_id: str, entries: list[tuple[str, float, int, int]], patience: float | None = None
) -> None:
    """Log (name, value, milliseconds since the epoch, step), as many as there are; logging one twice changes nothing."""
    from mlflow.entities import Metric

    metrics = [Metric(*entry) for entry in entries]
    for first in range(0, len(metrics), MAX_ENTRIES):
        part = metrics[first : first + MAX_ENTRIES]
        patiently(partial(_client.log_batch, run_id, metrics=part), patience)


def log_params(run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(name, value) for name, value in params.items()]
    for first in range(0, len(entries), MAX_PARAMS):
        part = entries[first : first + MAX_PARAMS]
        patiently(partial(_client.log_batch, run_id, params=part))


def set_tags(run_id: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    patiently(lambda: _client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()]))


def log_data_sets(run_id: str, sets: list[dict[str, str]]) -> None:
    """Note data sets that a run made or used: name, digest, source and profile (the last two JSON) of each."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(Dataset(source_type="local", **one), [InputTag("mlflow.data.context", one["name"])])
        for one in sets
    ]
    patiently(lambda: _client.log_inputs(run_id, datasets=inputs))


def last_step(run_id: str, metric: str) -> int:
    """The last step with a value of the metric, -1 for none."""
    history = patiently(lambda: _client.get_metric_history(run_id, metric))
    return max((point.step for point in history), default=-1)


def upload(run_id: str, path: Path, under: str | None, patience: float | None = None) -> None:
    """A file or a folder as a run's artifact."""
    log = _client.log_artifacts if path.is_dir() else _client.log_artifact
    patiently(lambda: log(run_id, str(path), under), patience)


def download(run_id: str, path: str, into: Path) -> Path | None:
    """One artifact file of a run as a file below ``into``; None where the run has no such file."""
    from mlflow.exceptions import MlflowException

    try:
        return Path(patiently(lambda: _client.download_artifacts(run_id, path, str(into))))
    except (MlflowException, OSError) as error:
        if is_outage(error):
            raise
        return None


def delete(run_id: str, path: str) -> None:
    """Remove a folder of a run's artifacts."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = _client.get_run(run_id).info.artifact_uri
    get_artifact_repository(uri).delete_artifacts(path)
