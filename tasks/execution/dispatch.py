"""Run a stage on a worker of a work pool; start it again if its machine was lost.

Stages are dispatched from threads. Signals reach the main thread alone, which sets ``stopping``; the threads
look at it.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelling

from tasks.artifacts.artifact import Artifact, Step, code_of
from tasks.config.machine import Machine
from tasks.execution.launch import interrupted
from tasks.system import events
from tasks.system.errors import DiskFailure, InputError, StageFailed
from tasks.system.retry import retry, stopping
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import Published, find_published, publish

MAX_LOST = 3  # a stage whose worker was lost is started again this often; it resumes from its checkpoint
POLL_SECONDS = 0.5
PATIENCE = 900.0  # seconds that a Prefect server may be away
# How the message of a failed state begins if the pipeline acts on the reason. Not a state name: Prefect's
# pages list and filter runs by a fixed set of names, and leave out a run in a state of any other name.
BAD_INPUT, DISK_FAILURE, INPUT_MISSING, OTHER_CODE = (
    "Bad input: ",
    "Disk failure: ",
    "Inputs missing: ",
    "Other code: ",
)
REASONS = (BAD_INPUT, DISK_FAILURE, INPUT_MISSING, OTHER_CODE)


class Stopped(BaseException):
    """The flow run that waits for this stage is being stopped."""


def dispatch(step: Step, pool: str, *, machine: Machine, tracker: Tracker, tracked: str | None) -> Published:
    """Let a worker of ``pool`` build the step's artifact, and return the published one.

    Raises InputError and StageFailed, as for a stage on this machine.
    """
    lost, supplied = 0, False
    while True:
        joined = _joined(step)
        run = joined or _started(step, pool, machine, tracked)
        try:
            state = _end_of(run.id, step)
        except BaseException as error:
            # the server would cancel it too, only later; if this process was only stopped, the stage goes on
            if not joined and (_is_ctrl_c(error) or _is_cancelling()):
                _cancel(run)
            raise
        if state.type == StateType.COMPLETED:
            found = find_published(tracker, step.recipe.key)
            if found is None:
                text = (
                    f"The stage {step.stage} ended well on the pool {pool}, but its artifact is not in MLflow"
                )
                raise StageFailed(f"{text}. {_link(run)}")
            return found
        if _reason(state) == INPUT_MISSING and not supplied:
            supplied = _supply(step, str(state.message), tracker, tracked)
            if supplied:
                continue
        if _is_lost(state, run) and lost < MAX_LOST:
            lost += 1
            events.tell(
                "warning",
                step.stage,
                text=f"{step.stage}: its worker was lost ({state.message}); it is started again",
            )
            continue
        raise _failure(step, pool, run, state)


def _tag(step: Step) -> str:
    return f"key:{step.recipe.key[:40]}"


def _runs(step: Step) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[_tag(step)]))
        return list(_retry(lambda: client.read_flow_runs(flow_run_filter=wanted, limit=200)))


def _joined(step: Step) -> FlowRun | None:
    """Return the flow run that builds this artifact now, for this flow or another; None if there is none."""
    return next(
        (
            run
            for run in _runs(step)
            if run.state and not run.state.is_final() and run.state.type != StateType.CANCELLING
        ),
        None,
    )


def _started(step: Step, pool: str, machine: Machine, tracked: str | None) -> FlowRun:
    over = sum(bool(run.state and run.state.is_final()) for run in _runs(step))
    try:
        # the idempotency key gives two flows that ask at the same time the same run
        return _retry(lambda: run_deployment(
            f"stage/{pool}", parameters=parameters(step, machine, tracked), flow_run_name=step.stage,
            timeout=0,
            tags=[_tag(step)], idempotency_key=f"{step.recipe.key}:{over}",
        ))  # fmt: skip
    except ObjectNotFound:
        raise InputError(
            f"There is no deployment stage/{pool} on the Prefect server; `alignflow deploy` makes it, "
            "or leave pools.* empty"
        ) from None


def parameters(step: Step, machine: Machine, tracked: str | None) -> dict[str, Any]:
    """Return the parameters of the flow ``stage``: the step as JSON, without the metrics of its inputs."""
    slim = {name: {**artifact, "metrics": {}, "warnings": []} for name, artifact in step.inputs.items()}
    return {
        "stage": step.stage, "job": step.job.model_dump(mode="json"), "inputs": slim,
        "shown": list(step.shown), "sources": code_of(step.stage),
        "machine": machine.model_dump(mode="json"), "tracked": tracked,
    }  # fmt: skip


def _end_of(run_id: UUID, step: Step) -> State:
    """Wait for a run's final state and return it; wait during an outage of the server, too."""
    told = ""
    with get_client(sync_client=True) as client:
        while True:
            state = _retry(lambda: client.read_flow_run(run_id)).state
            if state and state.is_final():
                return state
            if state and state.name != told:
                told = str(state.name)
                events.tell("wait", step.stage, note=f"on a worker: {told}")
            if stopping.wait(POLL_SECONDS) or interrupted.is_set():
                raise Stopped


def _is_ctrl_c(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt) or interrupted.is_set()


def _is_cancelling() -> bool:
    """Return whether the current flow run is being cancelled."""
    if not flow_run.id:
        return False
    with get_client(sync_client=True) as client, suppress(Exception):
        state = client.read_flow_run(UUID(str(flow_run.id))).state
        return bool(state and state.type == StateType.CANCELLING)
    return False


def _cancel(run: FlowRun) -> None:
    with (
        get_client(sync_client=True) as client,
        suppress(Exception),
    ):  # what cannot be told now, the server sees to
        client.set_flow_run_state(run.id, Cancelling())


def _retry(call: Callable[[], Any]) -> Any:
    """Return what ``call`` returns; retry during an outage of the Prefect server."""
    return retry(call, is_outage=_is_outage, patience=PATIENCE, pause=POLL_SECONDS)


def _is_outage(error: Exception) -> bool:
    """Return whether the Prefect server may be back soon. What it refuses stays refused."""
    if isinstance(error, PrefectHTTPStatusError):
        return bool(error.response.status_code >= 500)
    return isinstance(error, httpx.TransportError)


def _is_lost(state: State, run: FlowRun) -> bool:
    """Return whether a run ended without an error of its stage.

    Its process or machine died, or it was cancelled together with another flow run that had started it.
    """
    return state.type == StateType.CRASHED or (state.type == StateType.CANCELLED and _asked_by_another(run))


def _asked_by_another(run: FlowRun) -> bool:
    asked_by = run.parent_task_run_id
    if asked_by is None or flow_run.id is None:
        return False
    with get_client(sync_client=True) as client:
        asked = _retry(lambda: client.read_task_run(asked_by))
        if str(asked.flow_run_id) == str(flow_run.id):
            return False
        other = _retry(lambda: client.read_flow_run(asked.flow_run_id))
        return bool(other.state and other.state.type in (StateType.CANCELLED, StateType.CANCELLING))


def _supply(step: Step, message: str, tracker: Tracker, tracked: str | None) -> bool:
    """Upload the inputs that the worker lacks; return False if this machine lacks one as well."""
    names = [name.strip() for name in message.rpartition(":")[2].split(",")]
    inputs: list[Artifact] = [step.inputs[name] for name in names if name in step.inputs]
    return bool(inputs) and all(publish(artifact, tracker, parent=tracked) for artifact in inputs)


def _reason(state: State) -> str:
    """Return which of the reasons above a failed state begins with, "" for none of them."""
    if state.type != StateType.FAILED:
        return ""
    return next((reason for reason in REASONS if str(state.message).startswith(reason)), "")


def _failure(step: Step, pool: str, run: FlowRun, state: State) -> Exception:
    reason = _reason(state)
    message = str(state.message or state.name).removeprefix(reason).rstrip(".")
    if reason == BAD_INPUT:
        return InputError(message)
    if reason == DISK_FAILURE:
        return DiskFailure(message)
    if reason == INPUT_MISSING:
        return StageFailed(f"The stage {step.stage} lacks inputs. {message}. {_link(run)}")
    if reason == OTHER_CODE:
        return StageFailed(f"{message}. {_link(run)}")
    return StageFailed(f"{message} (on the pool {pool}, {state.name}). {_link(run)}")


def _link(run: FlowRun) -> str:
    page = PREFECT_UI_URL.value()
    return f"See {page}/runs/flow-run/{run.id}" if page else f"Its flow run: {run.name} {run.id}"
