"""Make the parts of the data stage on a Ray cluster, whose nodes need the same code and the same disk."""

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from tasks.programs.data_stage.code_digest import code_digest
from tasks.programs.data_stage.parts import RESUMES, Parts, report_makers
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError, StageFailed

MAX_PENDING = 128  # their blocks are on disk meanwhile
MAX_RETRIES = 3  # of a part whose worker was lost
CONNECT_SECONDS = 10.0


@contextmanager
def open_cluster(address: str, run: Run) -> Iterator[Parts]:
    """Yield what makes parts on the nodes of a cluster that this machine belongs to.

    Raises InputError if it does not, StageFailed if a part's workers are lost again and again.
    """
    ray = _connect(address)
    try:
        yield Parts(_RayExecutor(ray), MAX_PENDING, code_digest(), report_makers(run))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise StageFailed(
            f"A part was killed on {MAX_RETRIES + 1} Ray workers, perhaps because memory ran out: "
            f"give them more memory and {RESUMES}"
        ) from error
    except ray.exceptions.RayError as error:
        raise StageFailed(
            f"The Ray cluster {address} could not make a part ({_first_line(error)}): mend that and {RESUMES}"
        ) from error
    finally:
        ray.shutdown()


class _RayExecutor(Executor):
    """Ray has no executor of its own (ray-project/ray#29456), but its references have standard futures."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.call = ray.remote(max_retries=MAX_RETRIES)(_call)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.call.remote(partial(function, *args, **kwargs)).future().add_done_callback(
            partial(self._pass_on, future)
        )
        return future

    def _pass_on(self, future: Future[Any], made: Future[Any]) -> None:
        error = made.exception()
        if isinstance(error, self.ray.exceptions.RayTaskError):  # has the whole traceback for a message
            error = error.cause
        if error is None:
            future.set_result(made.result())
        else:
            future.set_exception(error)


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("machine.ray needs the package ray: pip install 'alignflow[ray]'") from None
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"machine.ray: this machine belongs to no Ray cluster at {address} ({_first_line(error)}): "
            "start one with `ray start --head`, join it with `ray start --address=HOST:6379`, and give its "
            "address as HOST:6379 or auto"
        ) from None
    return ray


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
