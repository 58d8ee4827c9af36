"""`alignflow doctor`: check this machine, the home and the servers, and say how to mend what is wrong."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flows.commands.doctor_findings import Check, Finding, Findings, judge, run_check
from flows.commands.doctor_servers import SERVERS
from flows.commands.gc import DAY, DAYS, MB
from flows.commands.gc_candidates import measure
from flows.display.terminal import console
from flows.extras import EXTRAS
from flows.preflight import LEAST_FREE_MB
from flows.services import credentials, environment
from flows.services.local_servers import find_running
from tasks.artifacts.inventory import is_intact, list_artifacts
from tasks.artifacts.store import home

HELP = "Check this machine, the home and the servers, and say what to do."
EXAMPLE = "alignflow doctor --deep"

PACKAGES = ("prefect", "mlflow", "sqlalchemy")
TRAINING = EXTRAS["train"]
AMPLE_FREE_MB = 10_000
GPU_SECONDS = 20.0  # that nvidia-smi may take to answer
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow doctor`."""
    parser.add_argument("--deep", action="store_true", help="read every stored file")


def main(args: argparse.Namespace) -> None:
    """Print every finding; exit with status 1 if there is a failure."""
    environment.prepare_for_reading()
    if doctor(home(), deep=args.deep):
        sys.exit(1)


def doctor(root: Path, *, deep: bool = False) -> int:
    """Print what every check finds; return the number of failures. ``deep`` reads every stored file."""
    screen, failures = console(), 0
    for level, what, detail, todo in diagnose(root, deep=deep):
        failures += level == "FAIL"
        screen.print(f"{level:<4}", style=COLOURS[level], end="  ")
        screen.print(f"{what:<17} {detail}" + (f" -> {todo}" if todo else ""), markup=False, soft_wrap=True)
    return failures


def diagnose(root: Path, *, deep: bool = False) -> Findings:
    """Yield the findings of every check. A check that raises is a failure of its own and hides no other."""
    above = next(folder for folder in (root, *root.parents) if folder.exists())
    checks: dict[str, Check] = {
        "versions": check_versions,
        "gpu": check_gpu,
        "disk": partial(check_disk, above),
        "home": partial(check_writable, above, root),
        "login": partial(check_login, root),
        "store": partial(check_store, root, deep=deep),
        "leftovers": partial(check_leftovers, root),
        "servers": partial(find_servers, root),
    }
    for what, check in checks.items():
        yield from run_check(what, check)
    for variable, (server, check) in SERVERS.items():
        if os.environ.get(variable, "").startswith("http"):
            yield from run_check(server, check, f"start it, or correct {variable}")


def check_versions() -> Findings:
    """Compare the versions of Python and of the main packages with the ranges that alignflow requires."""
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
        problem = f"{found} is not in the range {within}"
        yield judge(
            name,
            found,
            "" if within.contains(found, prereleases=True) else problem,
            "install one that is",
            "FAIL",
        )


def check_gpu() -> Findings:
    """Report the GPUs that nvidia-smi lists, and whether torch and bitsandbytes can use them."""
    bits = f"bitsandbytes is {'' if find_spec('bitsandbytes') else 'not '}installed"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("ok", "gpu", f"none is seen (there is no nvidia-smi), stages run on the CPU; {bits}")
        return
    ask = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(
        ask, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GPU_SECONDS, check=False
    )
    output = "; ".join((done.stdout + done.stderr).split("\n")).strip("; ")[:300]
    is_cpu_build = find_spec("torch") and version("torch").endswith("+cpu")
    problem = (
        "nvidia-smi fails: look at the driver"
        if done.returncode
        else "torch is a build for CPUs: install the other"
        if is_cpu_build
        else ""
    )
    yield judge("gpu", f"{output}; {bits}", f"{output}; {problem}" if problem else "")


def check_disk(above: Path) -> Findings:
    """Compare the free disk space with what a run needs."""
    free = shutil.disk_usage(above).free // MB
    text = f"{free:,} MB are free under {above}"
    yield judge(
        "disk",
        text,
        text if free < AMPLE_FREE_MB else "",
        "alignflow gc frees some",
        "FAIL" if free < LEAST_FREE_MB else "warn",
    )


def check_writable(above: Path, root: Path) -> Findings:
    """Check that files can be created in the home, or in the folder ``above`` if there is no home yet."""
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        problem = f"{above} cannot be written to ({error.strerror})"
    yield judge(
        "home",
        str(root) if root.exists() else f"{root}, which the first run makes",
        problem,
        "ALIGNFLOW_HOME names another place",
        "FAIL",
    )


def check_store(root: Path, *, deep: bool = False) -> Findings:
    """Compare stored artifacts with their manifests: the names of files, with ``deep`` every byte."""
    found = list_artifacts(root, ("objects",))
    size = sum(measure(entry.path)[0] for entry in found)
    text = f"{len(found)} artifacts, {size / MB:.1f} MB"
    broken = [f"{entry.stage} {entry.key[:12]}" for entry in found if not is_intact(entry.path, deep=deep)]
    some = ", ".join([*broken[:4], "..."] if len(broken) > 4 else broken)
    problem = f"{text}; {len(broken)} are not what their manifests say: {some}"
    if deep:
        fine = f"{text}, every byte is as in the manifests"
    else:
        fine = f"{text}, all files are there as in the manifests (--deep reads them)"
    yield judge("store", fine, problem if broken else "", "the next run that needs one makes it again")


def check_leftovers(root: Path) -> Findings:
    """Count the artifacts in quarantine and the unfinished stages that are old."""
    aside, parts = ([*(root / place).glob("*")] for place in ("quarantine", "partial"))
    stale = sum(time.time() - measure(path)[1] > DAYS * DAY for path in parts)
    text = (
        f"{len(aside)} altered artifacts in quarantine, {stale} unfinished stages older than {DAYS:.0f} days"
    )
    yield judge(
        "leftovers",
        text,
        text if aside or stale else "",
        "alignflow gc removes old ones; files that change by themselves mean a bad disk",
    )


def check_login(root: Path) -> Findings:
    """Check that only the owner can read the servers' login, and that it is intact."""
    files = [path for path in (credentials.file_of(root), root / "mlflow-auth.ini") if path.exists()]
    if not files:
        yield Finding("ok", "login", "there is none yet; alignflow up makes it")
    for path in files:
        mode = path.stat().st_mode & 0o777
        problem = f"others on this machine may read {path} (mode {mode:o})" if mode & 0o077 else ""
        yield judge("login", f"{path} is its owner's only", problem, f"chmod 600 {path}", "FAIL")
    try:
        credentials.read(root)
    except (ValueError, TypeError):
        yield Finding(
            "FAIL",
            "login",
            f"{credentials.file_of(root)} is damaged",
            "remove it and start alignflow up again: it makes another login",
        )


def find_servers(root: Path) -> Findings:
    """Report which servers a run would use; set the environment for those of `alignflow up`."""
    is_own = not os.environ.get("PREFECT_API_URL") and find_running(root)
    environment.use_running_servers(root)
    places = [os.environ[name] for name in SERVERS if os.environ.get(name, "").startswith("http")]
    hosts = [urlsplit(place).netloc.rpartition("@")[2] for place in places]  # without user and password
    text = " and ".join(hosts) + (" of alignflow up" if is_own else "")
    yield Finding("ok", "servers", text or "none: a run brings its own; alignflow up starts some that stay")
