"""Test `alignflow doctor`: every check finds its problem and hides no other. The servers are fakes on
loopback.
"""

import base64
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.commands import doctor, doctor_servers
from flows.commands.doctor import diagnose
from flows.commands.doctor_findings import Finding
from flows.services import credentials
from flows.services.automations import AGAIN, LABELLED, LOST
from tasks.artifacts.store import Recipe, Store

MB = 2**20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a home, and an environment without servers."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


# ------------------------------------------------------------------------------------- this machine

INSTALLED = {
    "prefect": "3.9.1", "mlflow": "3.17.2", "sqlalchemy": "2.0.58",
    "torch": "2.13.0+cpu", "transformers": "5.23.0",
    "peft": "0.21.2", "safetensors": "0.8.0", "tokenizers": "0.23.3",
    "accelerate": "1.15.0", "datasets": "5.2.0", "scipy": "1.17.1",
}  # fmt: skip
WANTED = [
    "prefect<4,>=3.9.1", "mlflow<4,>=3.15", "SQLAlchemy<2.1,>=2.0", (
        'torch<3,>=2.9; extra '
        '== "train"'
    ),
    (
        'transformers<6,>=5.20; '
        'extra == "train"'
    ), 'peft<1,>=0.19; extra == "train"', 'datasets<6,>=4; extra == "train"',
    'mlflow[auth]>=3.16; extra == "server"',
]  # fmt: skip


def judged_versions(
    monkeypatch: pytest.MonkeyPatch, python: str = ">=3.11", **changes: str | None
) -> dict[str, Finding]:
    about = Message()
    about["Requires-Python"] = python
    for line in WANTED:
        about["Requires-Dist"] = line
    installed = INSTALLED | changes

    def version(name: str) -> str:
        if not installed[name]:
            raise PackageNotFoundError(name)
        return str(installed[name])

    monkeypatch.setattr(doctor, "metadata", lambda _: about)
    monkeypatch.setattr(doctor, "version", version)
    return {finding.what: finding for finding in doctor.check_versions()}


def test_versions_within_their_ranges_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged_versions(monkeypatch)
    assert list(found) == ["python", *INSTALLED]
    assert {finding.level for finding in found.values()} == {"ok"}
    assert judged_versions(monkeypatch, prefect="3.10.0rc1")["prefect"].level == "ok"


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("sqlalchemy", "2.1.9", "not in the range <2.1,>=2.0"),
        ("datasets", "3.6.0", "not in the range <6,>=4"),
        ("prefect", "3.6.1", "not in the range <4,>=3.9.1"),
        ("mlflow", "3.15.2", ">=3.16"),  # what an extra asks for counts
        ("mlflow", "4.1", "<4"),
        ("torch", "3.0.0.dev1+cu130", "not in the range <3,>=2.9"),
    ],
)
def test_a_version_out_of_its_range_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, words: str
) -> None:
    found = judged_versions(monkeypatch, **{name: version})
    assert found[name].level == "FAIL"
    assert words in found[name].detail
    assert [finding.what for finding in found.values() if finding.level != "ok"] == [name]


def test_an_old_python_and_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged_versions(monkeypatch, ">=99", torch=None, mlflow=None)
    assert found["python"].level == "FAIL"
    assert found["torch"] == Finding(
        "warn", "torch", "not installed; no stage can train here", "pip install 'alignflow[train]'"
    )
    assert found["mlflow"] == Finding("warn", "mlflow", "not installed", "pip install 'alignflow'")


def test_what_is_installed_here_is_looked_up_without_importing_it() -> None:
    assert {finding.what for finding in doctor.check_versions()} == {"python", *INSTALLED}


@pytest.mark.parametrize(
    ("script", "torch", "level", "words"),
    [
        (
            "echo 'Big GPU, 81559 MiB, 570.1'; echo 'Big GPU, 81559 MiB, 570.1'",
            "2.13.0",
            "ok",
            "Big GPU, 81559 MiB, 570.1; Big GPU",
        ),
        ("echo 'Big GPU, 81559 MiB, 570.1'", "2.13.0+cpu", "warn", "torch is a build for CPUs"),
        ("echo 'no driver' >&2; exit 9", "2.13.0", "warn", "no driver; nvidia-smi fails"),
        (None, "2.13.0", "ok", "stages run on the CPU"),
    ],
)
def test_the_gpu_is_asked_for_by_its_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, torch: str, level: str, words: str
) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "version", lambda _: torch)
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "torch" or None)
    found = only(doctor.check_gpu())
    assert found.level == level
    assert words in found.detail
    assert level == "warn" or "bitsandbytes is not installed" in found.detail


# ---------------------------------------------------------------------------------------- this home


@pytest.mark.parametrize(("free", "level"), [(199, "FAIL"), (200, "warn"), (9_999, "warn"), (10_000, "ok")])
def test_a_full_disk_is_a_failure_and_a_small_one_a_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    class Usage:
        pass

    Usage.free = free * MB
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    assert only(doctor.check_disk(home)).level == level


def test_a_home_that_cannot_be_written_to_is_a_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.check_writable(home, home)).level == "ok"

    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = only(doctor.check_writable(home, home))
    assert (found.level, found.detail) == ("FAIL", f"{home} cannot be written to (Read-only file system)")


def commit(home: Path) -> Path:
    store, recipe = Store(home), Recipe("sft", {}, {}, {}, {})
    made = store.partial(recipe.key) / "artifact"
    made.mkdir(parents=True)
    (made / "weights.bin").write_text("weights")
    store.commit(recipe, seconds=1, peak_mb=1)
    store.discard_partial(recipe.key)
    return store.entry("sft", recipe.key)


def alter(entry: Path) -> None:
    (entry / "weights.bin").write_text("weightz")


def add(entry: Path) -> None:
    (entry / "more.bin").write_text("")


def cut_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text((entry / "manifest.json").read_text()[:50])


def empty_manifest(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "weights.bin").unlink()
    (entry / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))


def move(entry: Path) -> None:
    entry.rename(entry.with_name("f" * 64))


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (None, "--"),
        (alter, "-d"),
        (add, "sd"),
        (cut_manifest, "sd"),
        (empty_manifest, "sd"),
        (move, "sd"),
        (lambda entry: (entry / "weights.bin").unlink(), "sd"),
    ],
)
def test_altered_artifacts_are_counted_and_single_bytes_only_when_asked_for(
    home: Path, damage: Callable[[Path], None] | None, seen: str
) -> None:
    entry = commit(home)
    if damage:
        damage(entry)
    shallow, deep = (only(doctor.check_store(home, deep=deep)) for deep in (False, True))
    assert (
        "".join(sign if found.level == "warn" else "-" for sign, found in (("s", shallow), ("d", deep)))
        == seen
    )
    assert shallow.detail.startswith("1 artifacts, 0.0 MB")
    assert (
        damage is None
        or f"1 are not what their manifests say: sft {'f' * 12 if damage is move else entry.name[:12]}"
        in deep.detail
    )


def test_quarantine_and_stale_work_are_told(home: Path) -> None:
    (home / "partial" / "young").mkdir(parents=True)
    assert only(doctor.check_leftovers(home)).level == "ok"
    (home / "quarantine" / "sft-0").mkdir(parents=True)
    (home / "partial" / "old").mkdir()
    os.utime(home / "partial" / "old", (0, 0))
    found = only(doctor.check_leftovers(home))
    assert found.level == "warn"
    assert found.detail.startswith("1 altered artifacts in quarantine, 1 unfinished stages")


def test_a_login_that_others_can_read_is_a_failure(home: Path) -> None:
    assert only(doctor.check_login(home)).detail.startswith("there is none yet")
    credentials.load_or_create(home)
    assert only(doctor.check_login(home)).level == "ok"
    credentials.file_of(home).chmod(0o640)
    found = only(doctor.check_login(home))
    assert (found.level, found.todo) == ("FAIL", f"chmod 600 {credentials.file_of(home)}")
    credentials.file_of(home).chmod(0o600)
    credentials.file_of(home).write_text("{")
    assert [finding.level for finding in doctor.check_login(home)] == ["ok", "FAIL"]


def test_a_check_that_breaks_down_is_a_failure_and_hides_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Finding]:
        yield Finding("ok", "gpu", "so far")
        raise RuntimeError("It fell over\nand more")

    monkeypatch.setattr(doctor, "check_gpu", broken)
    found = list(diagnose(home))
    assert Finding("FAIL", "gpu", "It fell over") in found
    assert {"disk", "home", "store", "leftovers", "login", "servers"} <= {finding.what for finding in found}


def test_failures_are_counted_and_every_finding_is_a_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        Finding("ok", "gpu", "[bold]one"),
        Finding("warn", "disk", "two", "do this"),
        Finding("FAIL", "store", "three"),
        Finding("FAIL", "x", "4"),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda *_, **__: iter(findings))
    assert doctor.doctor(home) == 2
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "ok    gpu               [bold]one", (
            "warn  disk             "
            " two -> do this"
        ), "FAIL  store             three", "FAIL  x                 4"
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- the servers

PASSWORD = "s3cret-password"
SILENCE = 5.0  # seconds
LOGIN = {
    "PREFECT_API_AUTH_STRING": f"alignflow:{PASSWORD}", "MLFLOW_TRACKING_USERNAME": "alignflow",
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
}  # fmt: skip


class Servers:
    """A fake of Prefect's and MLflow's APIs on one port, whose answers can be changed."""

    def __init__(self) -> None:
        self.asks_login, self.version, self.ahead, self.silent = True, "3.9.1", 0.0, ""
        self.healthy = True
        self.pools, self.workers = ["cpu", "gpu"], {"cpu": ["ONLINE"], "gpu": ["ONLINE", "OFFLINE"]}
        self.deployments = {"rlhf": ["demo", "mine"], "stage": ["cpu", "gpu"]}
        self.automations = {LOST: True, AGAIN: True}
        self.labels: dict[str, str] = {}  # kind, by the name of a deployment of rounds
        self.experiment: str | None = "active"
        self.ended = ended = threading.Event()
        servers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
                path = self.path.partition("?")[0]
                ended.wait(SILENCE if path == servers.silent else 0)
                status, content = servers.answer(path, self.headers, asked)
                body = json.dumps(content, default=str).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(BrokenPipeError):  # whoever asked has not waited
                    self.wfile.write(body)

            do_POST = do_GET

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time.time() + servers.ahead, usegmt=True)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def answer(self, path: str, headers: Any, asked: Any) -> tuple[int, Any]:
        if not self.healthy:
            return 500, {"detail": "no database"}
        login = base64.b64encode(f"alignflow:{PASSWORD}".encode()).decode()
        if not path.endswith("/health") and self.asks_login and headers["Authorization"] != f"Basic {login}":
            return 401, {"exception_message": "Unauthorized"}
        if asked is not None and not headers["Prefect-Csrf-Token"]:
            return 403, {"detail": "Invalid CSRF token or client identifier."}
        match path.removeprefix("/api").strip("/").split("/"):
            case ["health"]:
                return 200, True
            case ["admin", "version"]:
                return 200, self.version
            case ["csrf-token"]:
                return 200, {"id": uuid4(), "token": "t", "client": "c", "expiration": "2999-01-01T00:00:00Z"}
            case ["work_pools", "filter"]:
                return 200, [{"id": uuid4(), "name": name, "type": "process"} for name in self.pools]
            case ["work_pools", pool, "workers", "filter"]:
                states = self.workers[pool]
                return 200, [
                    {"id": uuid4(), "name": f"{pool}-{n}", "work_pool_id": uuid4(), "status": state}
                    for n, state in enumerate(states)
                ]
            case ["deployments", "filter"]:
                (flow,) = asked["flows"]["name"]["any_"]
                if flow == "rounds":
                    return 200, [
                        {"id": uuid4(), "name": name, "flow_id": uuid4(), "parameters": parameters_of(kind)}
                        for name, kind in self.labels.items()
                    ]
                return 200, [
                    {"id": uuid4(), "name": name, "flow_id": uuid4()} for name in self.deployments[flow]
                ]
            case ["automations", "filter"]:
                return 200, [
                    self.automation(name)
                    for name in asked["automations"]["name"]["any_"]
                    if name in self.automations
                ]
            case [*_, "get-by-name"] if self.experiment:
                return 200, {"experiment": {"experiment_id": "1", "lifecycle_stage": self.experiment}}
        return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}

    def automation(self, name: str) -> dict[str, Any]:
        trigger = {"type": "event", "posture": "Reactive", "threshold": 1, "within": 0}
        return {
            "id": uuid4(),
            "name": name,
            "enabled": self.automations[name],
            "trigger": trigger,
            "actions": [{"type": "do-nothing"}],
        }


def parameters_of(kind: str) -> dict[str, Any]:
    """Return the parameters of a deployment of rounds with this kind of labels; "": with the defaults."""
    return {"config": {"rounds": {"labels": {"kind": kind}}}} if kind else {}


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """Start both fake servers, and set the environment in which they are found."""
    certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr(
        ssl, "create_default_context", lambda *_, **__: certificates
    )  # each client reads all of them: .06 s, for plain HTTP
    made = Servers()
    for name, value in {
        "PREFECT_API_URL": f"{made.url}/api",
        "MLFLOW_TRACKING_URI": f"{made.url}/",
        **LOGIN,
    }.items():
        monkeypatch.setenv(name, value)
    yield made
    made.ended.set()
    made.server.shutdown()
    made.server.server_close()


def asked(home: Path) -> list[Finding]:
    """Return what doctor reports about the servers."""
    found = list(diagnose(home))
    return found[[finding.what for finding in found].index("servers") :]


def test_a_house_in_order_is_all_fine(home: Path, servers: Servers) -> None:
    found = asked(home)
    assert [finding for finding in found if finding.level != "ok"] == []
    told = {finding.what: finding.detail for finding in found}
    assert told["workers gpu"] == "gpu-0"
    assert told["deployments"] == "rlhf/demo, rlhf/mine, stage/cpu, stage/gpu"
    assert {*told} == {
        "servers", "prefect", "prefect clock", "prefect login", "prefect version", "pools", "workers cpu",
        "workers gpu", "deployments",
        "automations", "mlflow", "mlflow clock", "mlflow login", "mlflow experiment",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {
                "pools": ["cpu"], "workers": {"cpu": ["ONLINE"], "gpu": ["OFFLINE"]},
                "deployments": {"rlhf": ["demo"], "stage": ["cpu"]},
                "automations": {LOST: False},
            },
            {
                "pools": ("FAIL", "gpu"), "workers gpu": ("warn", "none is online"),
                "deployments": ("FAIL", "stage/gpu"),
                "automations": ("warn", f"{LOST}, {AGAIN}"),
            },
        ),
        (
            {"pools": [], "deployments": {"rlhf": [], "stage": []}, "automations": {}, "experiment": None},
            {
                "pools": ("warn", ": cpu, gpu"), "deployments": ("warn", ": rlhf/demo, stage/cpu, stage/gpu"),
                "automations": ("warn", f"{LOST}, {AGAIN}"), "mlflow experiment": ("warn", "not there yet"),
            },
        ),
        (
            {"deployments": {"rlhf": [], "stage": ["cpu", "gpu"]}, "version": "3.99.1",
            "experiment": "deleted", "ahead": 30.0, "asks_login": False,
             "automations": {LOST: True}},
            {
                "deployments": ("FAIL", ": rlhf/demo"), "automations": ("FAIL", AGAIN),
                "prefect version": ("warn", "the server is 3.99.1"),
                "mlflow experiment": ("FAIL", "is deleted"), "prefect clock": ("warn", "s behind"),
                "mlflow clock": ("warn", "s behind"),
                "prefect login": ("warn", "none is asked for"), "mlflow login": ("warn", "none is asked for"),
            },
        ),
        ({"healthy": False}, {"prefect": ("FAIL", "500"), "mlflow": ("FAIL", "500")}),
    ],
    ids=["parts missing", "never set up", "others missing", "unhealthy"],
)  # fmt: skip
def test_what_is_missing_on_the_servers_is_told(
    home: Path, servers: Servers, change: dict[str, Any], expected: dict[str, tuple[str, str]]
) -> None:
    vars(servers).update(change)
    wrong = {finding.what: finding for finding in asked(home) if finding.level != "ok"}
    assert {what: finding.level for what, finding in wrong.items()} == {
        what: level for what, (level, _) in expected.items()
    }
    for what, (_, words) in expected.items():
        assert words in wrong[what].detail


GOES_ON = f"rounds/mine, rounds/yours goes on when its labels are in: the automation {LABELLED!r}"


@pytest.mark.parametrize(
    ("automation", "level", "detail", "todo"),
    [
        (True, "ok", f"a suspended run of {GOES_ON} is on", ""),
        (False, "FAIL", f"no suspended run of {GOES_ON} is switched off", "switch it on in Prefect's page"),
        (None, "FAIL", f"no suspended run of {GOES_ON} is not there", "alignflow deploy makes it; Resume"),
    ],
    ids=["there", "switched off", "missing"],
)
def test_rounds_that_wait_for_people_need_the_automation_that_resumes_them(
    home: Path, servers: Servers, automation: bool | None, level: str, detail: str, todo: str
) -> None:
    servers.labels = {"mine": "people", "demo": "gold", "yours": "people", "plain": ""}
    if automation is not None:
        servers.automations[LABELLED] = automation
    (found,) = [one for one in asked(home) if one.what == "labels"]
    assert (found.level, found.detail) == (level, detail)
    assert found.todo.startswith(todo)
    servers.labels = {"demo": "gold", "plain": ""}
    assert "labels" not in [one.what for one in asked(home)]


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        (0, "ok", "as here"),
        (3, "ok", "as here"),
        (-3, "ok", "as here"),
        (30, "warn", "s behind the server"),
        (-30, "warn", "s ahead of the server"),
    ],
)
def test_clocks_may_be_a_few_seconds_apart(ahead: float, level: str, words: str) -> None:
    found = doctor_servers.check_clock("clock", formatdate(time.time() + ahead, usegmt=True))
    assert found.level == level
    assert words in found.detail


def test_a_wrong_login_is_a_failure_and_is_never_shown(
    home: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LOGIN:
        monkeypatch.setenv(name, "alignflow:hunter2" if "AUTH" in name else "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", servers.url.replace("//", "//alignflow:hunter2@"))
    found = asked(home)
    assert [finding.what for finding in found if finding.level == "FAIL"] == ["prefect login", "mlflow login"]
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("silent", "down", "other"), [("/api/health", "prefect", "mlflow"), ("/health", "mlflow", "prefect")]
)
def test_a_server_that_does_not_answer_is_one_failure_after_a_short_time_and_the_other_is_looked_at(
    home: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, silent: str, down: str, other: str
) -> None:
    monkeypatch.setattr(doctor_servers, "SECONDS", 0.2)
    servers.silent = silent
    started = time.monotonic()
    found = asked(home)
    assert time.monotonic() - started < SILENCE
    (failure,) = [finding for finding in found if finding.level == "FAIL"]
    assert failure.what == down
    assert failure.todo.startswith("start it, or correct ")
    assert {f"{other} login", f"{other} clock"} <= {
        finding.what for finding in found if finding.level == "ok"
    }


def test_the_servers_of_alignflow_up_are_found(
    home: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", *LOGIN):
        monkeypatch.delenv(name)
    address = {"PREFECT_API_URL": f"{servers.url}/api", "MLFLOW_TRACKING_URI": servers.url}
    monkeypatch.setattr(doctor, "find_running", lambda _: address)
    monkeypatch.setattr(
        doctor.environment,
        "use_running_servers",
        lambda _: [monkeypatch.setenv(name, value) for name, value in (address | LOGIN).items()],
    )
    found = asked(home)
    assert found[0].detail.endswith("of alignflow up")
    assert {finding.level for finding in found} == {"ok"}


def test_without_servers_none_is_asked(home: Path) -> None:
    (found,) = asked(home)
    assert (found.level, found.detail[:5]) == ("ok", "none:")
