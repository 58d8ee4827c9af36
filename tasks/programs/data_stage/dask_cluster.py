"""Make the parts of the data stage on a Dask cluster, whose workers need the same code and the same disk."""

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from tasks.programs.data_stage.code_digest import code_digest
from tasks.programs.data_stage.parts import RESUMES, Parts, report_makers
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError, StageFailed

MAX_PENDING = 128  # their blocks are on disk meanwhile
POLL_SECONDS = 0.2


@contextmanager
def open_cluster(address: str, run: Run) -> Iterator[Parts]:
    """Yield what makes parts on the workers of a scheduler.

    Raises InputError if there is no scheduler, StageFailed if it or too many workers are lost.
    """
    with _connect(address) as client:
        from distributed import KilledWorker

        _wait_for_workers(client, address, run)
        try:
            yield Parts(client.get_executor(pure=False), MAX_PENDING, code_digest(), report_makers(run))
        except KilledWorker as error:
            raise StageFailed(
                f"A part was killed on {error.allowed_failures + 1} Dask workers, the last one "
                f"{error.last_worker.address}: give them more memory and {RESUMES}"
            ) from error
        except CancelledError as error:
            raise StageFailed(f"The Dask scheduler {address} was lost: start it and {RESUMES}") from error


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "machine.dask needs the package distributed: pip install 'alignflow[dask]'"
        ) from None
    if not address.rpartition(":")[2].isdigit():  # Dask reports that only after a minute, if at all
        raise InputError(
            f"machine.dask: there is no Dask scheduler at {address} (give it as tcp://host:port)"
        )
    try:
        return Client(address, set_as_default=False)
    except (OSError, ValueError, TypeError, AssertionError) as error:  # the last two: tls:// without settings
        why = str(error) or type(error).__name__
        raise InputError(f"machine.dask: there is no Dask scheduler at {address} ({why})") from None


def _wait_for_workers(client: Any, address: str, run: Run) -> None:
    waiting = run.phase(f"the Dask scheduler {address} has no workers yet; start some with `dask worker`")
    while not client.scheduler_info()["workers"]:
        waiting(0, 0)
        time.sleep(POLL_SECONDS)
