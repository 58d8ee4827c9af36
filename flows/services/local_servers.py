"""Commands, addresses and environments of the Prefect and MLflow servers that `alignflow up` starts."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from flows.services import credentials
from flows.services.credentials import USER, Credentials
from flows.services.processes import PAGE_POLICY, PREFECT_SERVER
from tasks.system.errors import InputError
from tasks.system.locks import is_held
from tasks.tracking import databases

DATABASE = "ALIGNFLOW_DATABASE"


class Process(NamedTuple):
    """A supervised process: a server or a worker."""

    name: str
    command: list[str]
    environment: dict[str, str]
    health: str = ""  # URL that answers once it is up


class Address(NamedTuple):
    prefect: str
    mlflow: str

    @property
    def page(self) -> str:
        return f"{self.mlflow}/#/experiments?workflowType=machine_learning"


def find_running(home: Path) -> Address | None:
    """Where the servers of this home are, if `alignflow up` runs."""
    if not is_held(home / "locks" / "up.lock"):
        return None
    try:
        return Address(**json.loads((home / "up.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None  # still starting


def client_environment(home: Path, address: Address) -> dict[str, str]:
    """The environment in which Prefect and MLflow find the servers of this home."""
    known = credentials.read(home)
    places = {
        "PREFECT_API_URL": f"{address.prefect}/api",
        "PREFECT_UI_URL": address.prefect,
        "MLFLOW_TRACKING_URI": address.mlflow,
    }
    return places | (known.clients if known else {})


def servers(home: Path, address: Address, login: Credentials) -> list[Process]:
    """Prefect's and MLflow's servers: on loopback, behind the login, closed to pages of other origins."""
    ports = [str(urlsplit(url).port) for url in address]
    prefect = {
        "PREFECT_SERVER_API_AUTH_STRING": login.clients["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_UI_API_URL": f"{address.prefect}/api",
        "PREFECT_UI_URL": address.prefect,
        **under_both_names("PREFECT_SERVER_{}CORS_ALLOWED_ORIGINS", address.prefect),
        **under_both_names("PREFECT_SERVER_{}CSRF_PROTECTION_ENABLED", "true"),
    }
    ini = home / "mlflow-auth.ini"
    store = (
        os.environ["MLFLOW_TRACKING_URI"]
        if os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite")
        else databases.address(home / "mlflow.db")
    )
    users = databases.address(home / "mlflow-auth.db")
    if os.environ.get(DATABASE):
        prefect["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url("prefect", "asyncpg")
        store = users = database_url("mlflow", "psycopg2")
    function = "mlflow.server.auth:authenticate_request_basic_auth"
    text = [
        "[mlflow]",
        "default_permission = NO_PERMISSIONS",
        f"database_uri = {users}",
        f"admin_username = {USER}",
    ]
    text += [
        f"authorization_function = {function}",
        "auth_cache_ttl_seconds = 60",
    ]  # without it, every request hashes the password anew: .3 s
    credentials.write_private(ini, "\n".join([*text, ""]).replace("%", "%%"))
    mlflow = {
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        "MLFLOW_AUTH_ADMIN_PASSWORD": login.password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": login.signing_key,
        # in the environment, not on the command line, where everybody on the machine would see its password
        "MLFLOW_BACKEND_STORE_URI": store,
    }  # fmt: skip
    listening = ["--host", "127.0.0.1", "--port"]
    policy = ["--uvicorn-opts", shlex.join(["--header", f"Content-Security-Policy:{PAGE_POLICY}"])]
    files = ["--artifacts-destination", str(home / "mlartifacts")]
    commands = {
        "prefect": [*PREFECT_SERVER, "warning", *listening, ports[0]],
        "mlflow": [
            "mlflow",
            "server",
            "--app-name",
            "basic-auth",
            *files,
            *policy,
            "--workers",
            "1",
            *listening,
            ports[1],
        ],
    }
    health = {"prefect": f"{address.prefect}/api/health", "mlflow": f"{address.mlflow}/health"}
    environments = {"prefect": prefect, "mlflow": mlflow}
    return [
        Process(name, [sys.executable, "-m", *command], environments[name], health[name])
        for name, command in commands.items()
    ]


def under_both_names(name: str, value: str) -> dict[str, str]:
    """A setting under Prefect's present name and its older one."""
    return dict.fromkeys((name.format("API_"), name.format("")), value)


def database_url(name: str, driver: str) -> str:
    """Return the URL of one of the two databases on the PostgreSQL server that ALIGNFLOW_DATABASE names.

    Raises InputError.
    """
    parts = urlsplit(os.environ[DATABASE])
    if parts.scheme not in ("postgresql", "postgres") or not parts.hostname or parts.path.strip("/"):
        raise InputError(
            f"{DATABASE} must be postgresql://USER:PASSWORD@HOST:PORT of a server "
            "with the databases prefect and mlflow"
        )
    return urlunsplit((f"postgresql+{driver}", parts.netloc, f"/{name}", parts.query, ""))
