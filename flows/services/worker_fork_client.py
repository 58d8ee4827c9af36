"""Ask a worker's fork server for a flow run, pass signals on to it, and exit with its status.

python -I -S worker_fork_client.py

A worker starts this as the process of a flow run. The address of the fork server is in ALIGNFLOW_FORK_SERVER;
without a server this process becomes Prefect's own engine. It imports the standard library alone and starts
in 30 ms.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

FORK_SERVER = "ALIGNFLOW_FORK_SERVER"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> int:
    """Run the flow run as a fork. Returns its exit status; a signal that ended it ends this process too."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"environment": dict(os.environ), "directory": os.getcwd()}
    try:
        connection.connect(os.environ[FORK_SERVER])
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        pid = json.loads(connection.recv(4096))["pid"]
    except (OSError, KeyError, ValueError):  # no server, or one that has just died
        become_engine()

    def pass_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    end = connection.recv(4096)
    # without a report the server has died, and its forks with it
    status = json.loads(end)["status"] if end else -signal.SIGKILL
    if status < 0:
        if -status in SIGNALS:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return int(status)


def become_engine() -> NoReturn:
    """Replace this process by the one that Prefect's worker starts."""
    os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])


if __name__ == "__main__":
    sys.exit(main())
