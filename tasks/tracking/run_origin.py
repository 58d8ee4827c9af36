"""Return MLflow's tags for the origin of a run: its user, its command and the commit of its code."""

import os
import pwd
import socket
import subprocess
from functools import cache

from tasks.artifacts.code_version import ROOT

USER, SOURCE, TYPE, COMMIT, NOTE = (
    "mlflow.user",
    "mlflow.source.name",
    "mlflow.source.type",
    "mlflow.source.git.commit",
    "mlflow.note.content",
)
MODIFIED, HOST = "alignflow.source.modified", "alignflow.host"
GIT_SECONDS = 10


def origin_tags(source: str) -> dict[str, str]:
    """Return the tags for a run that this process starts.

    ``source`` is a command, a deployment or a program.
    """
    return {USER: user_name(), SOURCE: source, TYPE: "JOB", HOST: socket.gethostname(), **_code()}


def user_name() -> str:
    """Return the operating system's name of the user.

    USER may be another one's under sudo or in a service.
    """
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a user id without a name
        return str(os.getuid())


@cache
def _code() -> dict[str, str]:
    """Return tags for the commit of the source tree.

    None for an installed package, which is in no repository.
    """
    if not (ROOT / ".git").exists():
        return {}
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "flows", "tasks")
    return {COMMIT: commit, MODIFIED: "true" if changes else "false"} if commit else {}


def _git(*arguments: str) -> str:
    """Return git's output for the source tree; "" without git, or if it refuses (a tree of another user)."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # a git hook's variables name another repository
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            env=kept,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
