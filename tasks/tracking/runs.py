"""What MLflow is told: a run per pipeline, a child per stage, the artifacts under their keys. Never a reason for training to stop.

Whatever goes wrong here is told once, and the rest of the pipeline runs untracked: the artifacts are in the store all the same. Only where another
machine has to find an artifact in MLflow does a failed upload end the stage.
"""

import fcntl
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tasks.artifacts.code_version import PROGRAMS
from tasks.artifacts.store import Manifest, Store, flatten, home
from tasks.tracking import client, program_log
from tasks.tracking.client import forgiving
from tasks.tracking.run_origin import NOTE, origin_tags

PARENT = "mlflow.parentRunId"
HOME = "alignflow.home"
FLOW_RUN = "prefect.flow_run_id"
PROFILE = "alignflow.profile"
LOG = "log.txt"
KEY, DIGEST, DAMAGED = "stage.key", "stage.digest", "stage.damaged"
FLUSH_SECONDS = 1.0
RETRY_SECONDS = 5.0  # between two tries to pass on metrics during an outage; they wait in memory
MAX_VALUE = 5000  # characters of a parameter; MLflow takes 6000


class NotTracked(Exception):
    """MLflow is not reachable, and the run cannot go on without it."""


class Tracked:
    """One run in MLflow; its methods do nothing when the tracker is down."""

    def __init__(
        self, run_id: str | None, *, resumed: bool = False, tags: dict[str, str] | None = None
    ) -> None:
        self.run_id = run_id
        self.resumed = resumed
        self.known = tags or {}  # a resumed run's tags
        self._waiting: list[tuple[str, float, int, int]] = []
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._logged: dict[str, int] = {}  # last step passed on, by metric

    @property
    def is_on(self) -> bool:
        return self.run_id is not None and client.is_up()

    def step(self, line: dict[str, Any]) -> None:
        """Pass on one line of metrics.jsonl; a step that was passed on before a program or its machine died is left out."""
        if not self.is_on:
            return
        step, stamp = int(line.get("step", 0)), int(float(line.get("time", time.time())) * 1000)
        for name, value in line.items():
            if (
                name not in ("step", "total", "time")
                and isinstance(value, int | float)
                and step > self._last_step(name)
            ):
                self._waiting.append((name, float(value), stamp, step))
                self._logged[name] = step
        if time.monotonic() > self._next_flush:
            self._flush_if_up()

    def _last_step(self, name: str) -> int:
        if self.resumed and name not in self._logged:
            with forgiving():
                self._logged[name] = client.last_step(str(self.run_id), name)
        return self._logged.get(name, -1)

    def _flush_if_up(self) -> None:
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        try:
            client.log_metrics(str(self.run_id), self._waiting, patience=0)
            self._waiting.clear()
        except Exception as error:
            if not client.is_outage(error):
                with forgiving():
                    raise
            self._next_flush += RETRY_SECONDS

    def flush(self, patience: float | None = None) -> None:
        if self._waiting and self.is_on:
            with forgiving():
                client.log_metrics(str(self.run_id), self._waiting, patience)
        self._waiting.clear()

    def params(self, settings: dict[str, Any]) -> None:
        client.log_params(str(self.run_id), {name: _text(value) for name, value in flatten(settings).items()})

    def summary(self, metrics: dict[str, Any]) -> None:
        """Final figures: a number, or a value with its interval as NAME, NAME.low and NAME.high."""
        if not self.is_on:
            return
        numbers = {
            name.removesuffix(".value"): value
            for name, value in flatten(metrics).items()
            if isinstance(value, int | float)
        }
        stamp = int(time.time() * 1000)
        with forgiving():
            client.log_metrics(
                str(self.run_id), [(_name(name), float(value), stamp, 0) for name, value in numbers.items()]
            )

    def files(self, path: Path, under: str | None = None) -> None:
        """Upload a file or a folder."""
        if self.is_on and path.exists():
            with forgiving():
                client.upload(str(self.run_id), path, under)

    def log(self, directory: Path, patience: float | None = None) -> None:
        """Upload a program's log, cleaned."""
        if self.is_on and (directory / LOG).is_file():
            with forgiving(), tempfile.TemporaryDirectory() as folder:
                program_log.write_clean(directory / LOG, Path(folder, LOG))
                client.upload(str(self.run_id), Path(folder, LOG), None, patience)

    def tags(self, tags: dict[str, str]) -> None:
        if self.is_on:
            with forgiving():
                client.set_tags(str(self.run_id), tags)

    def artifact(self, manifest: Manifest, folder: Path) -> None:
        """Upload a stage's artifact under its key. Its digest is noted last: with it, the artifact counts as there."""
        self.files(folder, manifest["key"])
        self.tags({DIGEST: manifest["digest"]})
        self.data_sets(manifest, folder)

    def data_sets(self, manifest: Manifest, path: Path) -> None:
        """Name every parquet file of an artifact as a data set of this run, with its digest."""
        sets = []
        for name, digest in manifest["files"].items():
            if name.endswith(".parquet"):
                source = json.dumps({"uri": (path / name).as_uri(), "key": manifest["key"]})
                profile = json.dumps({"bytes": (path / name).stat().st_size})
                sets.append(
                    {"name": Path(name).stem, "digest": digest[:36], "source": source, "profile": profile}
                )
        if sets and self.is_on:
            with forgiving():
                client.log_data_sets(str(self.run_id), sets)

    def end(self, status: str, patience: float | None = None) -> None:
        self.flush(patience)
        if self.is_on:
            with forgiving():
                client.end(str(self.run_id), status, patience)


@contextmanager
def pipeline_run(
    name: str,
    settings: dict[str, Any],
    *,
    flow_run_id: str = "",
    profile: str = "",
    source: str = "alignflow",
) -> Iterator[Tracked]:
    """The parent run of a pipeline; FAILED or KILLED when the block does not end well. A flow run that is tried again goes on with its own."""
    run = Tracked(None)
    with ExitStack() as alive:
        if client.connect():
            with forgiving():
                _close_the_dead()
                tags = {
                    FLOW_RUN: flow_run_id,
                    HOME: _whereabouts(),
                    PROFILE: profile,
                    NOTE: _note(profile or name, settings),
                }
                run = _own(flow_run_id) or Tracked(client.start(name, tags | origin_tags(source)))
                lock = alive.enter_context(_life_line(str(run.run_id)).open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                alive.callback(_life_line(str(run.run_id)).unlink, missing_ok=True)
                if not run.resumed:
                    run.params(settings)
        with _ending(run):
            yield run


def _own(flow_run_id: str) -> Tracked | None:
    """The run that an earlier try of the same flow run left, at work again."""
    left = client.search(f"tags.`{FLOW_RUN}` = '{flow_run_id}'") if flow_run_id else []
    if not left:
        return None
    client.revive(left[0].info.run_id)
    return Tracked(left[0].info.run_id, resumed=True)


def _close_the_dead() -> None:
    """End the runs of this home whose process was killed: each holds a lock while it lives, and the kernel frees it."""
    for run in client.search(f"tags.`{HOME}` = '{_whereabouts()}' AND status = 'RUNNING'", most=50):
        with _life_line(run.info.run_id).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for child in client.search(
                f"tags.`{PARENT}` = '{run.info.run_id}' AND status = 'RUNNING'", most=50
            ):
                Tracked(child.info.run_id).log(
                    Store(home()).partial(child.data.tags.get(KEY, "unknown")), patience=0
                )
                client.end(child.info.run_id, "KILLED")
            client.end(run.info.run_id, "KILLED")
            _life_line(run.info.run_id).unlink(missing_ok=True)


def _life_line(run_id: str) -> Path:
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"run-{run_id}.lock"


def _whereabouts() -> str:
    return f"{socket.gethostname()}:{home()}"


@contextmanager
def stage_run(
    stage: str, key: str, settings: dict[str, Any], *, parent: str | None, takes: dict[str, str] | None = None
) -> Iterator[Tracked]:
    """The run of a stage that is built: a new one, or the one that a crash of the same key left behind."""
    run = Tracked(None)
    if parent and client.connect():
        with forgiving():
            left = client.search(f"tags.`{KEY}` = '{key}' AND tags.cached = 'false' AND status != 'FINISHED'")
            if left:
                run = Tracked(left[0].info.run_id, resumed=True, tags=dict(left[0].data.tags))
                client.revive(left[0].info.run_id)
                run.tags({PARENT: parent})
            else:
                tags = {
                    PARENT: parent,
                    "stage": stage,
                    KEY: key,
                    "cached": "false",
                    NOTE: _stage_note(stage, key, takes or {}),
                }
                run = Tracked(client.start(stage, tags | origin_tags(f"{PROGRAMS}.{stage}")))
                run.params(settings)
    with _ending(run):
        yield run


def built(key: str) -> list[tuple[str, str]]:
    """(run, digest) of every artifact with this key that MLflow has whole, as far as is known; newest first."""
    if not client.connect():
        return []
    runs = client.search(f"tags.`{KEY}` = '{key}' AND tags.cached = 'false' AND status = 'FINISHED'", most=10)
    return [
        (run.info.run_id, run.data.tags[DIGEST])
        for run in runs
        if DIGEST in run.data.tags and DAMAGED not in run.data.tags
    ]


def mark_damaged(run_id: str) -> None:
    """An artifact that is not what its manifest says is never offered again."""
    client.set_tags(run_id, {DAMAGED: "true"})


def reused(stage: str, key: str, digest: str, metrics: dict[str, Any], *, parent: str | None) -> None:
    """Note a stage whose artifact was there: its figures and the run that built it, without uploading anything again."""
    if not (parent and client.connect()):
        return
    with forgiving():
        before = client.search(f"tags.`{KEY}` = '{key}' AND tags.cached = 'false' AND status = 'FINISHED'")
        tags = {PARENT: parent, "stage": stage, KEY: key, DIGEST: digest, "cached": "true"} | origin_tags(
            f"{PROGRAMS}.{stage}"
        )
        tags[NOTE] = f"The stage {stage} was reused: its artifact {key[:12]} was there."
        run = Tracked(
            client.start(stage, tags | ({"stage.built_by": before[0].info.run_id} if before else {}))
        )
        run.summary(metrics)
        run.end("FINISHED")


@contextmanager
def _ending(run: Tracked) -> Iterator[None]:
    try:
        yield
    except Exception:
        run.end("FAILED")
        raise
    except BaseException:  # Ctrl-C, or Prefect's cancellation
        run.end("KILLED", patience=0)  # whoever presses Ctrl-C does not wait for a server that is away
        raise
    run.end("FINISHED")


def _note(name: str, settings: dict[str, Any]) -> str:
    """Return a run's description, in Markdown."""
    source, base = (settings.get(part) or {} for part in ("source", "base"))
    facts = {
        "Profile": name, "Method": settings.get("method"), "Source": source.get("path") or source.get("kind"),
        "Base": base.get("path") or base.get("kind"), "Seed": settings.get("seed"), "Machine and home": _whereabouts(),
    }  # fmt: skip
    return "\n".join(
        f"- {fact}: {_quoted(value)}" for fact, value in facts.items() if value not in (None, "")
    )


def _stage_note(stage: str, key: str, takes: dict[str, str]) -> str:
    inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in takes.items()) or "nothing"
    facts = {"Stage": stage, "Key": key[:12], "Takes": inputs, "Machine and home": _whereabouts()}
    return "\n".join(f"- {fact}: {_quoted(value)}" for fact, value in facts.items())


def _quoted(value: Any) -> str:
    """Return text as it is, whatever it holds: in Markdown's code quotes."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)).replace("`", "'")
    return f"`{text[:200]}`"


def _name(metric: str) -> str:
    """A name MLflow takes: letters, digits, _ - . space : and /."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in metric)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:MAX_VALUE]
