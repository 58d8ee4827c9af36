"""MLflow: a run per pipeline, a child per stage. The only file that imports mlflow, and never a reason for training to stop.

Whatever goes wrong here is told once, and the rest of the pipeline runs untracked: the artifacts are in the store all the same.
"""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tasks import events
from tasks.store import Manifest, flat, home

EXPERIMENT = "alignflow"
PARENT = "mlflow.parentRunId"
HOME = "alignflow.home"
FLUSH_SECONDS = 1.0
MAX_PARAMS = 100  # of one call
MAX_METRICS = 500  # of one call; MLflow takes 1000
MAX_VALUE = 5000  # characters of a parameter; MLflow takes 6000

_client: Any = None
_experiment = ""
_down = False


def connect() -> bool:
    """Reach the tracker, once per process: MLFLOW_TRACKING_URI if it is set, else a SQLite file in the home."""
    global _client, _experiment
    if _client is None and not _down:
        with _forgiving():
            _client, _experiment = _open()
    return _client is not None and not _down


def _open() -> tuple[Any, str]:
    root = home()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    (root / "locks").mkdir(parents=True, exist_ok=True)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with (root / "locks" / "mlflow.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that both migrate a new database leave a broken one
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        files = (root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        return client, found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=files)


@contextmanager
def _forgiving() -> Iterator[None]:
    """Turn the tracker off at its first error, with one line on the screen."""
    global _down
    try:
        yield
    except Exception as error:
        if not _down:
            _down = True
            reason = (str(error) or type(error).__name__).splitlines()[0][:300]
            events.tell("warning", text=f"MLflow is not reachable; the run goes on untracked ({reason})")


class Tracked:
    """One run in MLflow; its methods do nothing when the tracker is down."""

    def __init__(self, run_id: str | None, *, resumed: bool = False) -> None:
        self.run_id = run_id
        self.resumed = resumed
        self._waiting: list[Any] = []
        self._last_flush = time.monotonic()
        self._logged: dict[str, int] = {}  # last step in MLflow, by metric, of a resumed run

    @property
    def is_on(self) -> bool:
        return self.run_id is not None and not _down

    def step(self, line: dict[str, Any]) -> None:
        """Pass on one line of metrics.jsonl; what a resumed run already has is left out."""
        if not self.is_on:
            return
        from mlflow.entities import Metric

        step, stamp = int(line.get("step", 0)), int(float(line.get("time", time.time())) * 1000)
        for name, value in line.items():
            if name not in ("step", "total", "time") and isinstance(value, int | float) and step > self._last_step(name):
                self._waiting.append(Metric(name, float(value), stamp, step))
        if len(self._waiting) >= MAX_METRICS or time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def _last_step(self, name: str) -> int:
        if self.resumed and name not in self._logged:
            with _forgiving():
                history = _client.get_metric_history(self.run_id, name)
                self._logged[name] = max((metric.step for metric in history), default=-1)
        return self._logged.get(name, -1)

    def flush(self) -> None:
        while self._waiting and self.is_on:
            with _forgiving():
                _client.log_batch(self.run_id, metrics=self._waiting[:MAX_METRICS])
            del self._waiting[:MAX_METRICS]
        self._last_flush = time.monotonic()

    def params(self, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, _text(value)) for name, value in flat(settings).items()]
        for start in range(0, len(params), MAX_PARAMS):
            _client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    def summary(self, metrics: dict[str, Any]) -> None:
        """Final figures: a number, or a value with its interval as NAME, NAME.low and NAME.high."""
        if not self.is_on:
            return
        from mlflow.entities import Metric

        numbers = {name.removesuffix(".value"): value for name, value in flat(metrics).items() if isinstance(value, int | float)}
        stamp = int(time.time() * 1000)
        with _forgiving():
            entries = [Metric(_name(name), float(value), stamp, 0) for name, value in numbers.items()]
            for start in range(0, len(entries), MAX_METRICS):
                _client.log_batch(self.run_id, metrics=entries[start : start + MAX_METRICS])

    def files(self, path: Path, under: str | None = None) -> None:
        """Upload a file or a folder."""
        if self.is_on and path.exists():
            with _forgiving():
                (_client.log_artifacts if path.is_dir() else _client.log_artifact)(self.run_id, str(path), under)

    def tags(self, tags: dict[str, str]) -> None:
        if self.is_on:
            from mlflow.entities import RunTag

            with _forgiving():
                _client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def data_sets(self, manifest: Manifest, path: Path) -> None:
        """Name every parquet file of an artifact as a data set of this run, with its digest."""
        if not self.is_on:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for name, digest in manifest["files"].items():
            if name.endswith(".parquet"):
                source = json.dumps({"uri": (path / name).as_uri(), "key": manifest["key"]})
                data_set = Dataset(Path(name).stem, digest[:36], "local", source, profile=json.dumps({"bytes": (path / name).stat().st_size}))
                inputs.append(DatasetInput(data_set, [InputTag("mlflow.data.context", Path(name).stem)]))
        with _forgiving():
            if inputs:
                _client.log_inputs(self.run_id, datasets=inputs)

    def end(self, status: str) -> None:
        self.flush()
        if self.is_on:
            with _forgiving():
                _client.set_terminated(self.run_id, status)


@contextmanager
def pipeline_run(name: str, settings: dict[str, Any], *, flow_run_id: str = "") -> Iterator[Tracked]:
    """The parent run of a pipeline; FAILED or KILLED when the block does not end well."""
    run = Tracked(None)
    with ExitStack() as alive:
        if connect():
            with _forgiving():
                _close_the_dead()
                run = Tracked(_start(name, {"prefect.flow_run_id": flow_run_id, HOME: _whereabouts()}))
                lock = alive.enter_context(_life_line(str(run.run_id)).open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                alive.callback(_life_line(str(run.run_id)).unlink, missing_ok=True)
                run.params(settings)
        with _ending(run):
            yield run


def _close_the_dead() -> None:
    """End the runs of this home whose process was killed: each holds a lock while it lives, and the kernel frees it."""
    for run in _search(f"tags.`{HOME}` = '{_whereabouts()}' AND status = 'RUNNING'", most=50):
        with _life_line(run.info.run_id).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for child in _search(f"tags.`{PARENT}` = '{run.info.run_id}' AND status = 'RUNNING'", most=50):
                _client.set_terminated(child.info.run_id, "KILLED")
            _client.set_terminated(run.info.run_id, "KILLED")
            _life_line(run.info.run_id).unlink(missing_ok=True)


def _life_line(run_id: str) -> Path:
    return home() / "locks" / f"run-{run_id}.lock"


def _whereabouts() -> str:
    return f"{socket.gethostname()}:{home()}"


@contextmanager
def stage_run(stage: str, key: str, settings: dict[str, Any], *, parent: str | None) -> Iterator[Tracked]:
    """The run of a stage that is built: a new one, or the one that a crash of the same key left behind."""
    run = Tracked(None)
    if parent and connect():
        with _forgiving():
            left = _search(f"tags.`stage.key` = '{key}' AND tags.cached = 'false' AND status != 'FINISHED'")
            if left:
                run = Tracked(left[0].info.run_id, resumed=True)
                _client.update_run(run.run_id, status="RUNNING")
                run.tags({PARENT: parent})
            else:
                run = Tracked(_start(stage, {PARENT: parent, "stage": stage, "stage.key": key, "cached": "false"}))
                run.params(settings)
    with _ending(run):
        yield run


def reused(stage: str, manifest: Manifest, metrics: dict[str, Any], *, parent: str | None) -> None:
    """Note a stage whose artifact was there: its figures and the run that built it, without uploading anything again."""
    if not (parent and connect()):
        return
    with _forgiving():
        built = _search(f"tags.`stage.key` = '{manifest['key']}' AND tags.cached = 'false' AND status = 'FINISHED'")
        tags = {PARENT: parent, "stage": stage, "stage.key": manifest["key"], "stage.digest": manifest["digest"], "cached": "true"}
        run = Tracked(_start(stage, tags | ({"stage.built_by": built[0].info.run_id} if built else {})))
        run.summary(metrics)
        run.end("FINISHED")


@contextmanager
def _ending(run: Tracked) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


def _start(name: str, tags: dict[str, str]) -> str:
    return str(_client.create_run(_experiment, run_name=name, tags=tags).info.run_id)


def _search(condition: str, *, most: int = 1) -> list[Any]:
    return list(_client.search_runs([_experiment], filter_string=condition, max_results=most))


def _name(metric: str) -> str:
    """A name MLflow takes: letters, digits, _ - . space : and /."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in metric)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:MAX_VALUE]
