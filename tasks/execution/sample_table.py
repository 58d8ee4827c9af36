"""Show the answers that a stage samples while it trains as a table of its MLflow run, as soon as they are
there.

A table of MLflow is a file {"columns", "data"} that a tag of the run names (``mlflow.log_table``). That
function appends to the file: it would add the samples before a kill a second time. This one writes all of it.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.tracking.tracked_run import RETRY_SECONDS, TrackedRun

SAMPLES, TABLE = "samples.jsonl", "samples.json"
TAG = "mlflow.loggedArtifacts"


class SampleTable:
    """The table of the samples in ``directory``, where a program appends them to samples.jsonl."""

    def __init__(self, run: TrackedRun, directory: Path) -> None:
        self.run, self.path = run, directory / SAMPLES
        self._uploaded = 0  # bytes of samples.jsonl
        self._is_tagged = False
        self._next_attempt = 0.0

    def upload_new(self, *, is_last: bool = False) -> None:
        """Upload the table if a sample was added.

        During an outage of the server try again later, but wait for it if the sample ``is_last``.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._uploaded or not self.run.is_on:
            return
        if not is_last and time.monotonic() < self._next_attempt:
            return
        tracker = self.run.tracker
        with tracker.turned_off_by_errors():
            try:
                self._upload(None if is_last else 0)
                self._uploaded = size
            except Exception as error:
                if is_last or not tracker.is_outage(error):
                    raise
                self._next_attempt = time.monotonic() + RETRY_SECONDS

    def _upload(self, patience: float | None) -> None:
        tracker, run_id = self.run.tracker, str(self.run.run_id)
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder, TABLE)
            table.write_text(json.dumps(build_table(read_samples(self.path))))
            tracker.upload(run_id, table, None, patience)
        if not self._is_tagged:
            run = tracker.run(run_id, patience)
            tables = json.loads(run.tags.get(TAG, "[]")) if run else []
            entry = {"path": TABLE, "type": "table"}
            if entry not in tables:
                tag = json.dumps([*tables, entry])
                tracker.call(lambda client: client.set_tag(run_id, TAG, tag), patience)
            self._is_tagged = True


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of samples.jsonl."""
    complete = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def build_table(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a table with a row for each answer, in the form of ``DataFrame.to_json(orient="split")``."""
    rows = [{"step": sample["step"], **answer} for sample in samples for answer in sample["answers"]]
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
