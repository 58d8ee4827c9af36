"""What a worker starts for a flow run: asks the engine for a fork, hands on the signals it gets, and ends as the fork ends.

python -I -S enter.py      the engine's socket is in ALIGNFLOW_ENGINE; without one, this process becomes Prefect's engine itself

It imports next to nothing: it is there in 30 ms.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

ENGINE = "ALIGNFLOW_ENGINE"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> int:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"environment": dict(os.environ), "directory": os.getcwd()}
    try:
        connection.connect(os.environ[ENGINE])
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        pid = json.loads(connection.recv(4096))["pid"]
    except (OSError, KeyError, ValueError):  # no engine, or one that has just died
        become_engine()

    def hand_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in SIGNALS:
        signal.signal(number, hand_on)
    end = connection.recv(4096)
    status = (
        json.loads(end)["status"] if end else -signal.SIGKILL
    )  # the engine is gone, and its forks with it
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status in SIGNALS else None
        os.kill(os.getpid(), -status)
    return int(status)


def become_engine() -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])


if __name__ == "__main__":
    sys.exit(main())
