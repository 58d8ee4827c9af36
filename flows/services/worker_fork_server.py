"""Fork server for flow runs: preloads Prefect and MLflow and forks a child per run.

python -m flows.services.worker_fork_server LISTENER OWNER     started by flows.services.worker

A request, from flows.services.worker_fork_client, is {"environment", "directory"} with the descriptors of the
run's output. Runs may outlive their worker, and this process outlives them.
"""

import atexit
import gc
import logging
import os
import runpy
import sys
from collections.abc import Mapping

from tasks.system import fork_server
from tasks.system.fork_server import Request

# libraries only: every run reads alignflow's own modules anew
PRELOADED = (
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.deployments",
    "mlflow.tracking.client",
    "mlflow.store.tracking.rest_store",
)
READ_AT_IMPORT = ("PREFECT_", "MLFLOW_", "PYTHON")  # variables whose values the loaded libraries have read
OF_ONE_RUN = "PREFECT__"


def run_flow(request: Request) -> None:
    """Run ``prefect.engine`` in this fork as ``python -m`` would, with the request's environment."""
    environment, directory = request.content["environment"], request.content["directory"]
    # a log that cannot be written must not fill the worker's output with tracebacks
    logging.raiseExceptions = False
    for stream, descriptor in enumerate(request.descriptors, start=1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(directory)
    if select_settings(environment) != select_settings(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "prefect.engine"], environment)
    os.environ.clear()
    os.environ.update(environment)
    fork_server.set_process_title(f"flow {environment['PREFECT__FLOW_RUN_ID'][:8]}")
    sys.argv = ["prefect.engine"]
    sys.modules.pop("prefect.engine", None)  # it runs as __main__ now
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def select_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a preloaded library may have read when it was imported."""
    return {
        key: value
        for key, value in environment.items()
        if key.startswith(READ_AT_IMPORT) and not key.startswith(OF_ONE_RUN)
    }


def main() -> None:
    """Serve until the worker and all runs are gone; in a child, run the flow."""
    atexit.register(gc.freeze)  # inherited by the children: their last garbage collection would take a second
    request = fork_server.serve(PRELOADED, "flow-forks")
    if request is not None:
        run_flow(request)


if __name__ == "__main__":
    main()
