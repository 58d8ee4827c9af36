"""`alignflow doctor`: says line by line whether this machine, this home and the servers are fit to run, and what to do where they are not."""

import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flows.commands.deploy import POOLS
from flows.commands.gc import DAY, DAYS, MB, measure
from flows.commands.work import online
from flows.display.terminal import console
from flows.preflight import LEAST_FREE_MB
from flows.services import credentials, environment
from flows.services.local_servers import running
from tasks.artifacts.inventory import entries, intact
from tasks.tracking.client import EXPERIMENT

PACKAGES = ("prefect", "mlflow", "fastapi", "sqlalchemy")
TRAINING = ("torch", "transformers", "peft", "safetensors", "tokenizers")
# Prefect 3.8 sets these no upper limit, and breaks above alignflow's
BROKEN = {
    "fastapi": "with newer ones every flow run dies",
    "sqlalchemy": "with newer ones no schedule ever fires",
}
AMPLE_FREE_MB = 10_000
SECONDS = 5.0  # that a server may take to answer
APART_SECONDS = 5.0  # that two clocks may be
REFUSED = (401, 403)
OPEN = "none is asked for: whoever reaches the server may change what it holds"
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
Level = Literal["ok", "warn", "FAIL"]
Findings = Iterator["Finding"]
Check = Callable[[], Findings]


class Finding(NamedTuple):
    level: Level
    what: str
    detail: str
    todo: str = ""


def doctor(home: Path, *, deep: bool = False) -> int:
    """Print what every check finds; gives the number of failures. ``deep`` reads every stored file."""
    screen, failures = console(), 0
    for level, what, detail, todo in diagnose(home, deep=deep):
        failures += level == "FAIL"
        screen.print(f"{level:<4}", style=COLOURS[level], end="  ")
        screen.print(f"{what:<17} {detail}" + (f" -> {todo}" if todo else ""), markup=False, soft_wrap=True)
    return failures


def diagnose(home: Path, *, deep: bool = False) -> Findings:
    """What every check finds, one by one. A check that breaks down is a failure of its own and hides no other."""
    above = next(folder for folder in (home, *home.parents) if folder.exists())
    here: dict[str, Check] = {
        "versions": versions, "gpu": gpu, "disk": partial(disk, above), "home": partial(writable, above, home), "login": partial(login, home),
        "store": partial(stored, home, deep=deep), "leftovers": partial(leftovers, home), "servers": partial(named, home),
    }  # fmt: skip
    for what, check in here.items():
        yield from _guarded(what, check)
    for variable, (server, check) in SERVERS.items():
        if os.environ.get(variable, "").startswith("http"):
            yield from _guarded(server, check, f"start it, or correct {variable}")


def _guarded(what: str, check: Check, todo: str = "") -> Findings:
    try:
        yield from check()
    except Exception as error:
        yield Finding("FAIL", what, (str(error).strip() or type(error).__name__).splitlines()[0][:300], todo)


def judged(what: str, fine: str, problem: str = "", todo: str = "", level: Level = "warn") -> Finding:
    return Finding(level, what, problem, todo) if problem else Finding("ok", what, fine)


def versions() -> Findings:
    """Python and the packages that the rest stands on, against the ranges that alignflow was installed with."""
    about = metadata("alignflow")
    ranges = {"python": SpecifierSet(about["Requires-Python"] or "")}
    for wanted in map(Requirement, about.get_all("Requires-Dist") or []):
        ranges[wanted.name.lower()] = ranges.get(wanted.name.lower(), SpecifierSet()) & wanted.specifier
    for name in ("python", *PACKAGES, *TRAINING):
        try:
            found = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            extra, so = ("[train]", "; no stage can train here") if name in TRAINING else ("", "")
            yield Finding("warn", name, f"not installed{so}", f"pip install 'alignflow{extra}'")
            continue
        within = ranges.get(name, SpecifierSet())
        problem = f"{found} is not in the range {within}" + (f": {BROKEN[name]}" if name in BROKEN else "")
        yield judged(
            name,
            found,
            "" if within.contains(found, prereleases=True) else problem,
            "install one that is",
            "FAIL",
        )


def gpu() -> Findings:
    bits = f"bitsandbytes is {'' if find_spec('bitsandbytes') else 'not '}installed"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("ok", "gpu", f"none is seen (there is no nvidia-smi), stages run on the CPU; {bits}")
        return
    ask = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(
        ask, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * SECONDS, check=False
    )
    told = "; ".join((done.stdout + done.stderr).split("\n")).strip("; ")[:300]
    is_cpu_build = find_spec("torch") and version("torch").endswith("+cpu")
    wrong = (
        "nvidia-smi fails: look at the driver"
        if done.returncode
        else "torch is a build for CPUs: install the other"
        if is_cpu_build
        else ""
    )
    yield judged("gpu", f"{told}; {bits}", f"{told}; {wrong}" if wrong else "")


def disk(above: Path) -> Findings:
    free = shutil.disk_usage(above).free // MB
    text = f"{free:,} MB are free under {above}"
    yield judged(
        "disk",
        text,
        text if free < AMPLE_FREE_MB else "",
        "alignflow gc frees some",
        "FAIL" if free < LEAST_FREE_MB else "warn",
    )


def writable(above: Path, home: Path) -> Findings:
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        problem = f"{above} cannot be written to ({error.strerror})"
    yield judged(
        "home",
        str(home) if home.exists() else f"{home}, which the first run makes",
        problem,
        "ALIGNFLOW_HOME names another place",
        "FAIL",
    )


def stored(home: Path, *, deep: bool = False) -> Findings:
    """The artifacts against their manifests: which files there are, or with ``deep`` every byte."""
    found = entries(home, ("objects",))
    text = f"{len(found)} artifacts, {sum(measure(entry.path)[0] for entry in found) / MB:.1f} MB"
    broken = [f"{entry.stage} {entry.key[:12]}" for entry in found if not intact(entry.path, deep=deep)]
    problem = f"{text}; {len(broken)} are not what their manifests say: {', '.join(broken[:4])}{', ...' if len(broken) > 4 else ''}"
    fine = f"{text}, {'every byte is' if deep else 'all files are there'} as in the manifests{'' if deep else ' (--deep reads them)'}"
    yield judged("store", fine, problem if broken else "", "the next run that needs one makes it again")


def leftovers(home: Path) -> Findings:
    aside, parts = ([*(home / place).glob("*")] for place in ("quarantine", "partial"))
    stale = sum(time.time() - measure(path)[1] > DAYS * DAY for path in parts)
    text = (
        f"{len(aside)} altered artifacts in quarantine, {stale} unfinished stages older than {DAYS:.0f} days"
    )
    yield judged(
        "leftovers",
        text,
        text if aside or stale else "",
        "alignflow gc removes old ones; files that change by themselves mean a bad disk",
    )


def login(home: Path) -> Findings:
    """The servers' login is nobody else's to read."""
    files = [path for path in (credentials.file_of(home), home / "mlflow-auth.ini") if path.exists()]
    if not files:
        yield Finding("ok", "login", "there is none yet; alignflow up makes it")
    for path in files:
        mode = path.stat().st_mode & 0o777
        problem = f"others on this machine may read {path} (mode {mode:o})" if mode & 0o077 else ""
        yield judged("login", f"{path} is its owner's only", problem, f"chmod 600 {path}", "FAIL")
    try:
        credentials.read(home)
    except (ValueError, TypeError):
        yield Finding(
            "FAIL",
            "login",
            f"{credentials.file_of(home)} is damaged",
            "remove it and start alignflow up anew: it makes another login",
        )


def named(home: Path) -> Findings:
    """Which servers a run would use; those of `alignflow up` are found here."""
    is_own = not os.environ.get("PREFECT_API_URL") and running(home)
    environment.join(home)
    places = [os.environ[name] for name in SERVERS if os.environ.get(name, "").startswith("http")]
    text = " and ".join(urlsplit(place).netloc.rpartition("@")[2] for place in places) + (
        " of alignflow up" if is_own else ""
    )  # without a password
    yield Finding("ok", "servers", text or "none: a run brings its own; alignflow up starts some that stay")


def prefect() -> Findings:
    """Prefect's server; of one that does not answer, or refuses the login, nothing more can be known."""
    with _prefect_client() as client:
        answer = client.request("GET", "/health")
        yield Finding("ok", "prefect", "it answers and is healthy")
        yield clock("prefect clock", answer.headers.get("date"))
        entrance = [*_guarded("prefect login", partial(prefect_login, client))]
        yield from entrance
        if entrance[0].level == "FAIL":
            return
        for what, check in {"pools": pools, "deployments": deployments, "automations": automations}.items():
            yield from _guarded(what, partial(check, client))
        for pool in POOLS:
            yield from _guarded(f"workers {pool}", partial(workers, pool))


@contextmanager
def _prefect_client(*, known: bool = True) -> Iterator[Any]:
    """Prefect's client, and settings, without patience; with ``known`` False, as somebody who has no login."""
    from prefect import settings
    from prefect.client.orchestration import get_client

    keys = {
        key: os.environ.get(key.name) if known else None
        for key in (settings.PREFECT_API_AUTH_STRING, settings.PREFECT_API_KEY)
    }
    chosen = {
        settings.PREFECT_API_URL: os.environ["PREFECT_API_URL"],
        settings.PREFECT_API_REQUEST_TIMEOUT: SECONDS,
    }
    chosen |= {settings.PREFECT_CLIENT_MAX_RETRIES: 0, **keys}
    with settings.temporary_settings(chosen), get_client(sync_client=True) as client:
        yield client


def clock(what: str, date: str | None) -> Finding:
    """How far this machine's clock is from a server's, by the Date of its answer."""
    apart = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    text = f"this machine is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the server"
    return judged(
        what, "as here" if date else "not told", text if abs(apart) > APART_SECONDS else "", "set both by NTP"
    )


def _version(client: Any) -> str | None:
    """The server's; None where it refuses."""
    try:
        return str(client.api_version())
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 0) not in REFUSED:
            raise
        return None


def prefect_login(client: Any) -> Findings:
    theirs, ours = _version(client), version("prefect")
    if theirs is None:
        yield Finding(
            "FAIL",
            "prefect login",
            "the server refuses it",
            "PREFECT_API_AUTH_STRING must be what the server has",
        )
        return
    with _prefect_client(known=False) as stranger:
        problem = "" if _version(stranger) is None else OPEN
    yield judged("prefect login", "accepted", problem, "PREFECT_SERVER_API_AUTH_STRING sets one")
    text = f"the server is {theirs}, here is {ours}"
    yield judged(
        "prefect version",
        text,
        "" if theirs.split(".")[:2] == ours.split(".")[:2] else text,
        "install the same on both",
    )


def pools(client: Any) -> Findings:
    yield present("pools", [*POOLS], {pool.name for pool in client.read_work_pools()})


def workers(pool: str) -> Findings:
    names = online(pool)
    yield judged(
        f"workers {pool}", ", ".join(names), "" if names else "none is online", f"alignflow work {pool}"
    )


def deployments(client: Any) -> Findings:
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    chosen = {flow: FlowFilter(name=FlowFilterName(any_=[flow])) for flow in ("rlhf", "stage")}
    found = {
        f"{flow}/{one.name}"
        for flow, by_name in chosen.items()
        for one in client.read_deployments(flow_filter=by_name)
    }
    chains = [name for name in sorted(found) if name.startswith("rlhf/")] or ["rlhf/demo"]
    yield present("deployments", [*chains, *(f"stage/{pool}" for pool in POOLS)], found)


def automations(client: Any) -> Findings:
    from flows.services.automations import AGAIN, LOST

    wanted = [LOST, AGAIN]
    found = {name for name in wanted if any(one.enabled for one in client.read_automations_by_name(name))}
    yield present("automations", wanted, found)


def present(what: str, wanted: list[str], found: set[str]) -> Finding:
    """A server that was never set up is no failure; one that lacks a part is."""
    missing = ", ".join(name for name in wanted if name not in found)
    problem = f"not there, or switched off: {missing}" if missing else ""
    return judged(
        what,
        ", ".join(wanted),
        problem,
        "alignflow deploy makes what is missing",
        "FAIL" if found else "warn",
    )


def mlflow() -> Findings:
    """MLflow's server; of one that does not answer, nothing more can be known."""
    import httpx

    with httpx.Client(base_url=os.environ["MLFLOW_TRACKING_URI"], timeout=SECONDS) as client:
        answer = client.get("/health")
        answer.raise_for_status()
        yield Finding("ok", "mlflow", "it answers and is healthy")
        yield clock("mlflow clock", answer.headers.get("date"))
        yield from _guarded("mlflow login", partial(mlflow_login, client))


def mlflow_login(client: Any) -> Findings:
    user, password, token = (
        os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD", "TOKEN")
    )
    path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}"
    stranger = client.get(path, auth=None)
    answer = client.get(
        path,
        auth=(user, password) if user else None,
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    if answer.status_code in REFUSED:
        yield Finding(
            "FAIL",
            "mlflow login",
            "the server refuses it",
            "MLFLOW_TRACKING_USERNAME and _PASSWORD must be what the server has",
        )
        return
    yield judged(
        "mlflow login",
        "accepted",
        "" if stranger.status_code in REFUSED else OPEN,
        "mlflow server --app-name basic-auth asks for one",
    )
    if answer.status_code != 404:
        answer.raise_for_status()
    state = (
        answer.json()["experiment"]["lifecycle_stage"]
        if answer.is_success
        else "not there yet, the first run makes it"
    )
    level: Level = "FAIL" if state == "deleted" else "warn"
    yield judged(
        "mlflow experiment",
        f"{EXPERIMENT} is there",
        "" if state == "active" else f"{EXPERIMENT} is {state}",
        level=level,
    )


SERVERS = {"PREFECT_API_URL": ("prefect", prefect), "MLFLOW_TRACKING_URI": ("mlflow", mlflow)}
