"""Set the process environment of Prefect and MLflow: all files under the home, no output, no telemetry.

Set before either is imported. What the user has set for servers that are named stays; what belongs to none is
removed (flows.services.isolation).
"""

import json
import os
from pathlib import Path
from typing import Any

from flows.services import isolation, permissions
from tasks.artifacts.store import home
from tasks.tracking import databases

FIXED = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PREFECT_CLI_COLORS": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "5",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
}

# any of them names another database of Prefect's than the one in its home
ELSEWHERE = {
    "PREFECT_API_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
}


def prepare(root: Path) -> None:
    """Set the environment for a pipeline whose home is ``root``; copy empty databases into a new home."""
    permissions.restrict_to_owner(root)
    prefect_home, logs = root / "prefect", root / "logs"
    prefect_home.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    settings = prefect_home / "logging.json"  # Prefect reads YAML, which takes JSON
    settings.write_text(json.dumps(_logging(logs / "prefect.log")))
    has_own_server = ELSEWHERE.isdisjoint(os.environ)
    chosen = {
        **FIXED,
        "ALIGNFLOW_HOME": str(root),
        "MLFLOW_TRACKING_URI": databases.address(root / "mlflow.db"),
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_LOGGING_SETTINGS_PATH": str(settings),
    }
    if has_own_server and databases.needs_escaping(
        prefect_home
    ):  # Prefect makes the address of its database by itself, as it is
        chosen["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = databases.address(
            prefect_home / "prefect.db", "+aiosqlite"
        )
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    if has_own_server:
        databases.lay("prefect", Path(os.environ["PREFECT_HOME"]) / "prefect.db")
    if os.environ["MLFLOW_TRACKING_URI"] == chosen["MLFLOW_TRACKING_URI"]:
        databases.lay("mlflow", root / "mlflow.db")
    isolation.leave_working_folder(prefect_home)


def use_running_servers(root: Path) -> None:
    """Use the servers that `alignflow up` runs over this home, unless others are named."""
    from flows.services.local_servers import client_environment, find_running

    isolation.reach_loopback_directly()
    address = None if os.environ.get("PREFECT_API_URL") else find_running(root)
    if address:
        has_other_tracker = os.environ.get("MLFLOW_TRACKING_URI", address.mlflow) != address.mlflow
        for name, value in client_environment(root, address).items():
            if not (
                has_other_tracker and name.startswith("MLFLOW_")
            ):  # another's server is not told this one's password
                os.environ[name] = value


def prepare_for_reading() -> None:
    """Set the environment for a command that only reads; write nothing."""
    for name, value in {
        **FIXED,
        "ALIGNFLOW_HOME": str(home()),
        "PREFECT_HOME": str(home() / "prefect"),
    }.items():
        os.environ.setdefault(name, value)
    isolation.reach_loopback_directly()
    isolation.leave_working_folder(isolation.quiet_folder())


def _logging(file: Path) -> dict[str, Any]:
    """Return Prefect's logging settings: its log and libraries' warnings to a file, runs' logs to the API."""
    level = "${PREFECT_LOGGING_LEVEL}"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
        "handlers": {
            "file": {"class": "logging.handlers.RotatingFileHandler", "formatter": "plain",
                     "filename": str(file).replace("$", "$$"), "maxBytes": 5_000_000, "backupCount": 1,
                     "delay": True},
            "api": {"class": "prefect.logging.handlers.APILogHandler"},
        },
        "loggers": {
            "prefect": {"level": level},
            "prefect.extra": {"level": level, "handlers": ["api"], "propagate": False},
            "prefect.flow_runs": {"level": "NOTSET", "handlers": ["api"]},
            "prefect.task_runs": {"level": "NOTSET", "handlers": ["api"]},
            "prefect._internal": {"level": "ERROR", "propagate": False, "handlers": ["file"]},
        },
        "root": {"level": "WARNING", "handlers": ["file"]},
    }  # fmt: skip
