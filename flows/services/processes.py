"""Start, await and stop servers as child processes; start the Prefect API of a single run."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tasks.system.errors import InputError
from tasks.system.locks import acquire
from tasks.system.processes import die_with_parent

START_SECONDS = 120
# For a server's pages: scripts, pictures and calls of their own host alone. Drawing on a canvas (Prefect's
# graph of a run) compiles functions; both set styles, and build pictures, workers and MLflow's frame round
# HTML from own data.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
)
PREFECT_SERVER = (
    "uvicorn",
    "--factory",
    "flows.services.prefect_server:create_app",
    "--lifespan",
    "on",
    "--log-level",
)
POLL_SECONDS = 0.05
RETRIES = 1  # of a request to a server that the user names, for one that is just started again


class ServerFailed(Exception):
    """A server did not come up; the message says where its log is."""


def start_prefect_api(home: Path) -> "PrefectApi | None":
    """Start a Prefect API for this process on a free loopback port, unless PREFECT_API_URL names one already.

    Prefect would start one by itself, but only once it is imported and needed, and that one would outlive a
    killed run. Call it before Prefect is imported: what is registered first is stopped last, after Prefect
    has sent its last logs.
    """
    if os.environ.get("PREFECT_API_URL"):
        return None
    api = PrefectApi(home)
    atexit.register(api.stop)
    return api


class PrefectApi:
    """The child process; it starts at once and is waited for only when it is needed."""

    def __init__(self, home: Path) -> None:
        self.log = home / "logs" / "prefect-server.log"
        # two servers that both migrate a new database would break it
        self._starting = acquire(home / "locks" / "prefect.lock")
        self.port = free_port()
        quiet = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        command = [
            sys.executable,
            "-m",
            *PREFECT_SERVER,
            "error",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | quiet,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
                cwd=home / "prefect",
            )
        os.environ["PREFECT_API_URL"] = self.url

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def wait(self) -> None:
        """Return when the API answers. Raises ServerFailed."""
        await_health(f"{self.url}/health", self.process, self.log)
        self._starting.close()

    def stop(self) -> None:
        self._starting.close()
        stop(self.process)


def check_prefect() -> None:
    """Check that the server of PREFECT_API_URL answers and accepts the login. Raises InputError."""
    from httpx import HTTPStatusError
    from prefect import settings
    from prefect.client.orchestration import get_client

    url = os.environ["PREFECT_API_URL"]
    named = f"The Prefect server that PREFECT_API_URL names, {_without_password(url)},"
    chosen = {settings.PREFECT_API_URL: url, settings.PREFECT_CLIENT_MAX_RETRIES: RETRIES}
    try:
        with settings.temporary_settings(chosen), get_client(sync_client=True) as client:
            client.api_version()
    except HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{named} refuses the login: PREFECT_API_AUTH_STRING must be what the server has"
            ) from None
        raise InputError(
            f"{named} answers with status {status}; the address of a server ends in /api"
        ) from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{named} does not answer ({reason}): start it, or unset PREFECT_API_URL") from None


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def await_health(url: str, process: "subprocess.Popen[bytes]", log: Path | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    open_direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(OSError):
            with open_direct(url, timeout=2) as answer:
                answer.read()
            return
        time.sleep(POLL_SECONDS)
    raise ServerFailed("A local server did not start" + (f"; its log: {log}" if log else ""))


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and the workers it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
