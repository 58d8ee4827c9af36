"""Who started a run, from where and with which code: MLflow's own tags for that."""

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
    """Return the tags of a run of this process. ``source`` is what was started: a command, a deployment, a program."""
    return {USER: _user(), SOURCE: source, TYPE: "JOB", HOST: socket.gethostname(), **_code()}


def _user() -> str:
    """Return the operating system's name of the user. Not of the environment, which a service or sudo may have from someone else."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a number without a name
        return str(os.getuid())


@cache
def _code() -> dict[str, str]:
    """Return the commit of the source tree. Empty for an installed package: a repository around it is another project's."""
    if not (ROOT / ".git").exists():
        return {}
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "flows", "tasks")
    return {COMMIT: commit, MODIFIED: "true" if changes else "false"} if commit else {}


def _git(*arguments: str) -> str:
    """Return what git says about the source tree; "" if it is not installed, or refuses (a tree of another user)."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # a hook's would name another repository
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
