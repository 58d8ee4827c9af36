"""The unit that a worker pulls: one stage as a flow, deployed once per work pool."""

import socket
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.display.run_log import logging_events
from flows.services.heartbeat import heartbeat
from tasks.artifacts.artifact import Artifact, Step, code_of
from tasks.config import jobs
from tasks.config.machine import Machine
from tasks.execution.dispatch import BAD_INPUT, DISK_FAILURE, INPUT_MISSING, OTHER_CODE
from tasks.execution.launch import warm_up
from tasks.execution.run_stage import RunContext, run_stage
from tasks.system.errors import DiskFailure, InputError, InputMissing, StageFailed


@flow(name="stage", flow_run_name="{stage}", persist_result=False)
def stage(
    stage: str,
    job: dict[str, Any],
    inputs: dict[str, Any],
    shown: list[str],
    sources: dict[str, str],
    machine: Machine = Machine(),  # noqa: B008
    tracked: str | None = None,
) -> State:
    """Run one stage on this worker; started by the flow rlhf, not by hand.

    Args:
        stage: Name of the stage.
        job: The stage's settings.
        inputs: The artifacts that it takes.
        shown: Metrics for the log.
        sources: Digests of the code that the asking side has; a worker with other code refuses.
        machine: How the program uses this machine.
        tracked: The parent run in MLflow.
    """
    if different := _different(sources, code_of(stage)):
        names = ", ".join(different[:4])
        text = (
            f"This worker has other code than the process that asked for the stage {stage} ({names}): "
            "install the same version on both"
        )
        return Failed(message=OTHER_CODE + text)
    step = as_step(stage, job, inputs, shown)
    warm_up(stage, machine)
    try:
        with heartbeat(), logging_events():
            artifact = run_stage(step, RunContext(machine, tracked, shared=True))
    except DiskFailure as error:  # of this machine, which may be another than the one that asks
        return Failed(message=f"{DISK_FAILURE}on {socket.gethostname()}: {error}")
    except InputError as error:
        return Failed(message=f"{BAD_INPUT}{error}")
    except InputMissing as error:
        return Failed(message=f"{INPUT_MISSING}{error}")
    except StageFailed as error:
        return Failed(message=str(error))
    return Completed(
        name="Cached" if artifact["cached"] else "Completed", message=f"{stage} {artifact['key'][:12]}"
    )


def as_step(stage: str, job: dict[str, Any], inputs: dict[str, Artifact], shown: list[str]) -> Step:
    """The step that ``dispatch.parameters`` wrote down."""
    job_type: type[jobs.Job] = getattr(jobs, f"{stage.capitalize()}Job")
    return Step(stage, job_type.model_validate(job), inputs, tuple(shown))


def _different(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
