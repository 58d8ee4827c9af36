"""Create and read the login of the servers that `alignflow up` starts, the same for Prefect and MLflow.

It is created once per home and readable by its owner only.
"""

import json
import secrets
from pathlib import Path
from typing import NamedTuple

from tasks.system.files import replace_text

USER = "alignflow"


class Credentials(NamedTuple):
    password: str
    signing_key: str  # of MLflow's session cookies

    @property
    def clients(self) -> dict[str, str]:
        """Return the environment variables by which clients log in."""
        return {
            "PREFECT_API_AUTH_STRING": f"{USER}:{self.password}",
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }


def file_of(home: Path) -> Path:
    return home / "credentials.json"


def read(home: Path) -> Credentials | None:
    try:
        return Credentials(**json.loads(file_of(home).read_text()))
    except FileNotFoundError:
        return None


def load_or_create(home: Path) -> Credentials:
    """Return the home's credentials; create them the first time."""
    known = read(home)
    if known:
        return known
    fresh = Credentials(secrets.token_urlsafe(24), secrets.token_urlsafe(32))
    write_private(file_of(home), json.dumps(fresh._asdict()))
    return fresh


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text, private=True)
