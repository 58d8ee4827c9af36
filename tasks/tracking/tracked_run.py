"""Log one run to MLflow: its metrics while it runs, its parameters, files and end."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tasks.artifacts.store import Manifest, flatten
from tasks.tracking import entities, program_log
from tasks.tracking.client import Metric, Tracker
from tasks.tracking.entities import DataSet
from tasks.tracking.metric_names import curve_name, final_metrics

LOG = "log.txt"
KEY, DIGEST = "stage.key", "stage.digest"  # tags of a stage's run: those of its artifact
FLUSH_SECONDS = 1.0
RETRY_SECONDS = 5.0  # between two attempts to log metrics during an outage; they wait in memory
MAX_VALUE = 5000  # characters of a parameter; MLflow takes 6000


class TrackedRun:
    """A run in MLflow. Its methods do nothing if there is no run or tracking is off."""

    def __init__(
        self,
        tracker: Tracker,
        run_id: str | None,
        *,
        stage: str = "",
        parent: str | None = None,
        resumed: bool = False,
        tags: dict[str, str] | None = None,
    ) -> None:
        self.tracker = tracker
        self.run_id = run_id
        self.stage = stage  # "" for the run of a pipeline
        self.parent = parent  # id of the pipeline's run
        self.resumed = resumed
        self.known = tags or {}  # a resumed run's tags
        self._waiting: list[Metric] = []
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._logged: dict[str, int] = {}  # last logged step, by metric

    @property
    def is_on(self) -> bool:
        """Whether this run is logged."""
        return self.run_id is not None and self.tracker.is_up

    def log_step(self, line: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl, without the metrics that were logged for this step before a crash."""
        if not self.is_on:
            return
        step, stamp = int(line.get("step", 0)), int(float(line.get("time", time.time())) * 1000)
        for name, value in line.items():
            is_metric = name not in ("step", "total", "time") and isinstance(value, int | float)
            curve = curve_name(self.stage, name)
            if is_metric and step > self._last_step(curve):
                self._waiting.append((curve, float(value), stamp, step))
                self._logged[curve] = step
        if time.monotonic() > self._next_flush:
            self._flush_if_up()

    def _last_step(self, name: str) -> int:
        if self.resumed and name not in self._logged:
            with self.tracker.turned_off_by_errors():
                self._logged[name] = self.tracker.last_step(str(self.run_id), name)
        return self._logged.get(name, -1)

    def _flush_if_up(self) -> None:
        """Log the waiting metrics; during an outage keep them for a later attempt."""
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        try:
            self.tracker.log_metrics(str(self.run_id), self._waiting, patience=0)
            self._waiting.clear()
        except Exception as error:
            if not self.tracker.is_outage(error):
                with self.tracker.turned_off_by_errors():
                    raise
            self._next_flush += RETRY_SECONDS

    def flush(self, patience: float | None = None) -> None:
        """Log the waiting metrics, and wait for the server during an outage."""
        if self._waiting and self.is_on:
            with self.tracker.turned_off_by_errors():
                self.tracker.log_metrics(str(self.run_id), self._waiting, patience)
        self._waiting.clear()

    def log_params(self, settings: dict[str, Any]) -> None:
        """Log nested settings as parameters with dotted names."""
        params = {name: _shorten(value) for name, value in flatten(settings).items()}
        self.tracker.log_params(str(self.run_id), params)

    def log_summary(self, metrics: dict[str, Any]) -> None:
        """Log final metrics under MLflow's names: numbers, or values with intervals."""
        self.log_metrics(final_metrics(metrics))

    def log_metrics(self, metrics: dict[str, float], *, model: str | None = None) -> None:
        """Log metrics by their names in MLflow, of the run or of one of its models."""
        if not self.is_on:
            return
        stamp = int(time.time() * 1000)
        values: list[Metric] = [(name, value, stamp, 0) for name, value in metrics.items()]
        with self.tracker.turned_off_by_errors():
            self.tracker.log_metrics(str(self.run_id), values, model=model)

    def upload(self, path: Path, folder: str | None = None) -> None:
        """Upload a file or a folder, if it exists."""
        if self.is_on and path.exists():
            with self.tracker.turned_off_by_errors():
                self.tracker.upload(str(self.run_id), path, folder)

    def upload_log(self, directory: Path, patience: float | None = None) -> None:
        """Upload a cleaned copy of the log of the program in ``directory``."""
        if self.is_on and (directory / LOG).is_file():
            with self.tracker.turned_off_by_errors(), tempfile.TemporaryDirectory() as temporary:
                program_log.write_clean(directory / LOG, Path(temporary, LOG))
                self.tracker.upload(str(self.run_id), Path(temporary, LOG), None, patience)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags."""
        if self.is_on:
            with self.tracker.turned_off_by_errors():
                self.tracker.set_tags(str(self.run_id), tags)

    def upload_artifact(self, manifest: Manifest, folder: Path) -> None:
        """Upload a stage's artifact under its key.

        Its digest is set last and says that the upload is complete.
        """
        self.upload(folder, manifest["key"])
        self.set_tags({DIGEST: manifest["digest"]})

    def log_data_sets(self, data_sets: list[DataSet]) -> None:
        """Log the data sets that the run reads; the original ones are inputs of the pipeline's run too."""
        if not self.is_on:
            return
        of_pipeline = [one for one in data_sets if entities.is_original(one.source)]
        with self.tracker.turned_off_by_errors():
            for run_id, read in ((self.run_id, data_sets), (self.parent, of_pipeline)):
                if run_id and read:
                    inputs = entities.data_set_inputs(read)
                    self.tracker.insert(partial(_log_inputs, run_id=run_id, inputs=inputs))

    @contextmanager
    def monitoring_machine(self, is_wanted: bool) -> Iterator[None]:
        """Log the load of this machine every few seconds while the block runs, by MLflow's own monitor.

        Its thread ends by itself once the run has ended, so that an interruption waits for no server.
        """
        monitor = None
        if is_wanted and self.is_on:
            with self.tracker.turned_off_by_errors():
                monitor = entities.system_monitor(str(self.run_id), self.tracker.uri, resumed=self.resumed)
                monitor.start()
        yield
        if monitor:
            monitor.finish()

    def end(self, status: str, patience: float | None = None) -> None:
        """Log the waiting metrics and set the status that the run ended with."""
        self.flush(patience)
        if self.is_on:
            with self.tracker.turned_off_by_errors():
                self.tracker.end(str(self.run_id), status, patience)


def _log_inputs(client: Any, *, run_id: str, inputs: list[Any]) -> None:
    client.log_inputs(run_id, datasets=inputs)


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:MAX_VALUE]
