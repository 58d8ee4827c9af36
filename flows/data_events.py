"""Tell the Prefect server that new data is there for a profile; a retraining starts on that event."""

import logging
import time
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_UI_URL
from pydantic import ValidationError

from flows.profiles import hint
from flows.services.processes import ServerFailed
from tasks.artifacts.corpus import find_corpus
from tasks.config.pipeline import Pipeline
from tasks.config.sections.sources import ShellSite, StackExchangeDump
from tasks.system.errors import InputError

EVENT = "alignflow.data.landed"
FLOW = "retrain"
PATIENCE = 30.0  # seconds for the server to start a run on an event
POLL_SECONDS = 0.5
MAX_RUNS = 200  # runs that are compared before and after the event


def announce_dump(profile: str, dump: Path) -> str:
    """Emit the event that ``dump`` is there for a profile; return a sentence about the run that it started.

    Raises InputError and ServerFailed.
    """
    path = str(dump.resolve())  # workers run in other folders
    with get_client(sync_client=True) as client:
        deployment = _deployment(client, profile)
        _check_kind(deployment, path)
        # without a handler, the worker prints how many events it still has to send
        logging.getLogger(EventsWorker.__name__).addHandler(logging.NullHandler())
        before = {run.id for run in _runs(client, deployment)}
        emit_event(EVENT, resource={"prefect.resource.id": f"alignflow.data.{profile}", "path": path})
        EventsWorker.instance().drain()
        run = _await_run(client, deployment, before)
    if run is None:
        raise ServerFailed(
            f"The server has received the event for {path}, but {FLOW}/{profile} has not started within "
            f"{PATIENCE:.0f} s: is its automation 'data landed for {profile}' there and switched on? "
            "`alignflow deploy` makes "
            "it"
        )
    state = run.state.name if run.state else "there"
    page = f"\n{PREFECT_UI_URL.value()}/runs/flow-run/{run.id}" if PREFECT_UI_URL.value() else ""
    waits = (
        ""
        if deployment.status == "READY"
        else f"; no worker of the pool {deployment.work_pool_name} is at work: `alignflow work` starts one"
    )
    return f"{FLOW}/{profile} takes {path}: its run {run.name} is {state}{waits}{page}"


def _deployment(client: SyncPrefectClient, profile: str) -> DeploymentResponse:
    """Return the deployment that retrains a profile. Raises InputError."""
    of_flow = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    deployments = {deployment.name: deployment for deployment in client.read_deployments(flow_filter=of_flow)}
    deployment = deployments.get(profile)
    if deployment is None:
        near = hint(profile, sorted(deployments)) or "; `alignflow deploy` makes it"
        raise InputError(f"The Prefect server has no deployment {FLOW}/{profile}{near}")
    if deployment.paused:
        raise InputError(f"The deployment {FLOW}/{profile} is paused: switch it on in Prefect's pages")
    return deployment


def _check_kind(deployment: DeploymentResponse, path: str) -> None:
    """Refuse a dump that the source of the deployed profile cannot read. Raises InputError."""
    try:
        source = Pipeline.model_validate((deployment.parameters or {}).get("config", {})).source
    except ValidationError:  # the deployment is of another version; its worker checks the dump itself
        return
    new = (
        StackExchangeDump(path=path)
        if isinstance(source, ShellSite)
        else source.model_copy(update={"path": path})
    )
    find_corpus(new)


def _runs(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    return client.read_flow_runs(
        deployment_filter=of_deployment, sort=FlowRunSort.START_TIME_DESC, limit=MAX_RUNS
    )


def _await_run(
    client: SyncPrefectClient, deployment: DeploymentResponse, before: set[UUID]
) -> FlowRun | None:
    """Wait for the run that the event starts; return None if there is none in time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for run in _runs(client, deployment):
            if run.id not in before and run.parameters.get("dump"):
                return run
        time.sleep(POLL_SECONDS)
    return None
