"""Keep other programs' settings, proxies and modules in the user's shell and folder away from ours."""

import os
import site
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from tasks.artifacts.code_version import ROOT, imported_packages

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
# variables that change uvicorn and gunicorn, which serve Prefect and MLflow, behind their command lines
OF_SERVERS = ("UVICORN_", "GUNICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS")
KEPT = {"PREFECT_LOGGING_LEVEL"}


def leave_out_other_servers(*, all_of_them: bool = False) -> None:
    """Remove settings of Prefect and MLflow that belong to no server which the user has named.

    PREFECT_API_URL and MLFLOW_TRACKING_URI name one; a run without them has servers of its own, and a
    password, a database or a port meant for another would stop it, or change the other. With ``all_of_them``,
    for `alignflow up`, whose servers are its own, the named ones go as well.
    """
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if all_of_them or not os.environ.get("PREFECT_API_URL"):
        _remove("PREFECT_", *OF_SERVERS)
    if not tracking or (all_of_them and not tracking.startswith("sqlite")):
        _remove("MLFLOW_")
    elif all_of_them:
        _remove("MLFLOW_")
        os.environ["MLFLOW_TRACKING_URI"] = tracking


def _remove(*beginnings: str) -> None:
    for name in list(os.environ):
        if name.startswith(beginnings) and name not in KEPT:
            del os.environ[name]


def reach_loopback_directly() -> None:
    """Add this machine to the hosts that no proxy stands before, where a proxy is set."""
    chosen = {name: value for name, value in os.environ.items() if name.lower() in PROXIES and value}
    if not chosen:
        return
    for name, value in chosen.items():
        if urlsplit(value).scheme.startswith("socks") and find_spec("socksio") is None:
            del os.environ[
                name
                # httpx, which sends Prefect's requests, refuses to start with a proxy that it cannot use
            ]
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    text = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = (
        text  # libraries differ in which of the two they ask first
    )


def leave_working_folder(folder: Path) -> None:
    """Change to ``folder``, so that no process reads a .env, prefect.toml, json.py or tasks/ of the user.

    All relative paths must be absolute by now. Children find alignflow's own code wherever it is imported
    from.
    """
    entries = [
        os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry
    ]
    if str(ROOT) not in {*site.getsitepackages(), *entries}:
        entries.insert(0, str(ROOT))
    if entries:
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    os.environ["PYTHONSAFEPATH"] = "1"  # `python -m` does not look into its folder
    if os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = _absolute(os.environ["MLFLOW_TRACKING_URI"])
    os.chdir(folder)


def _absolute(uri: str) -> str:
    """Return an address with its path written out, if it names a file or folder below the working folder."""
    for beginning in ("sqlite:///", "file:"):
        path = uri.removeprefix(beginning)
        if path != uri and not path.startswith(("/", "file:", ":memory:")):
            return f"{beginning}{os.path.abspath(path)}"
    return uri if "://" in uri or uri.startswith(("file:", "databricks")) else os.path.abspath(uri)


def hides_a_module(folder: Path, stage: str) -> bool:
    """Return whether ``python -m`` in a folder would import the folder's modules instead of a stage's."""
    names = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    return folder != ROOT and bool(names & (sys.stdlib_module_names | imported_packages(stage) | {"tasks"}))


def quiet_folder() -> Path:
    """Return a folder that holds no files of the user's, for commands that make no home."""
    return Path(sys.prefix)
