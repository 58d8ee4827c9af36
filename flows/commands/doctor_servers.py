"""Check the Prefect and MLflow servers for `alignflow doctor`."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from flows.commands.deploy import POOLS
from flows.commands.doctor_findings import Finding, Findings, Level, judge, run_check
from flows.commands.work import online_workers
from tasks.tracking.client import EXPERIMENT

SECONDS = 5.0  # that a server may take to answer
APART_SECONDS = 5.0  # that two clocks may be
REFUSED = (401, 403)
OPEN = "none is asked for: anyone who reaches the server may change what it holds"


def check_prefect() -> Findings:
    """Check Prefect's server; only its answer and the login if one of these fails."""
    with _prefect_client() as client:
        answer = client.request("GET", "/health")
        yield Finding("ok", "prefect", "it answers and is healthy")
        yield check_clock("prefect clock", answer.headers.get("date"))
        login = [*run_check("prefect login", partial(check_prefect_login, client))]
        yield from login
        if login[0].level == "FAIL":
            return
        for what, check in {
            "pools": check_pools,
            "deployments": check_deployments,
            "automations": check_automations,
            "labels": check_label_automation,
        }.items():
            yield from run_check(what, partial(check, client))
        for pool in POOLS:
            yield from run_check(f"workers {pool}", partial(check_workers, pool))


@contextmanager
def _prefect_client(*, with_login: bool = True) -> Iterator[Any]:
    """Yield a client that does not retry, with or without the login; Prefect's settings are set for it."""
    from prefect import settings
    from prefect.client.orchestration import get_client

    keys = {
        key: os.environ.get(key.name) if with_login else None
        for key in (settings.PREFECT_API_AUTH_STRING, settings.PREFECT_API_KEY)
    }
    chosen = {
        settings.PREFECT_API_URL: os.environ["PREFECT_API_URL"],
        settings.PREFECT_API_REQUEST_TIMEOUT: SECONDS,
    }
    chosen |= {settings.PREFECT_CLIENT_MAX_RETRIES: 0, **keys}
    with settings.temporary_settings(chosen), get_client(sync_client=True) as client:
        yield client


def check_clock(what: str, date: str | None) -> Finding:
    """Compare this machine's clock with a server's, by the Date header of its answer."""
    apart = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    text = f"this machine is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the server"
    return judge(
        what,
        "as here" if date else "unknown",
        text if abs(apart) > APART_SECONDS else "",
        "set both by NTP",
    )


def _server_version(client: Any) -> str | None:
    """Return the version of the server; None if it refuses the login."""
    try:
        return str(client.api_version())
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 0) not in REFUSED:
            raise
        return None


def check_prefect_login(client: Any) -> Findings:
    """Check that the login is accepted, that the server asks for one, and that its version is ours."""
    theirs, ours = _server_version(client), version("prefect")
    if theirs is None:
        yield Finding(
            "FAIL",
            "prefect login",
            "the server refuses it",
            "PREFECT_API_AUTH_STRING must be what the server has",
        )
        return
    with _prefect_client(with_login=False) as client_without_login:
        problem = "" if _server_version(client_without_login) is None else OPEN
    yield judge("prefect login", "accepted", problem, "PREFECT_SERVER_API_AUTH_STRING sets one")
    text = f"the server is {theirs}, here is {ours}"
    yield judge(
        "prefect version",
        text,
        "" if theirs.split(".")[:2] == ours.split(".")[:2] else text,
        "install the same on both",
    )


def check_pools(client: Any) -> Findings:
    """Check that the work pools exist."""
    yield judge_presence("pools", [*POOLS], {pool.name for pool in client.read_work_pools()})


def check_workers(pool: str) -> Findings:
    """Check that a worker of the pool is online."""
    names = online_workers(pool)
    yield judge(
        f"workers {pool}", ", ".join(names), "" if names else "none is online", f"alignflow work {pool}"
    )


def check_deployments(client: Any) -> Findings:
    """Check that the deployments of the pipeline and of its stages exist."""
    found = {f"{flow}/{one.name}" for flow in ("rlhf", "stage") for one in _deployments_of(client, flow)}
    chains = [name for name in sorted(found) if name.startswith("rlhf/")] or ["rlhf/demo"]
    yield judge_presence("deployments", [*chains, *(f"stage/{pool}" for pool in POOLS)], found)


def _deployments_of(client: Any, flow: str) -> list[Any]:
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    return list(client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow]))))


def check_automations(client: Any) -> Findings:
    """Check that the automations exist and are enabled."""
    from flows.services.automations import AGAIN, LOST

    wanted = [LOST, AGAIN]
    found = {name for name in wanted if any(one.enabled for one in client.read_automations_by_name(name))}
    yield judge_presence("automations", wanted, found)


def check_label_automation(client: Any) -> Findings:
    """Check the automation that resumes rounds, if a deployment of rounds waits for people's labels."""
    from flows.services.automations import LABELLED

    deployed = _deployments_of(client, "rounds")
    names = ", ".join(f"rounds/{one.name}" for one in deployed if _asks_people(one.parameters))
    if not names:
        return
    found = client.read_automations_by_name(LABELLED)
    problem, mend = "", ""
    if not found:
        problem, mend = "is not there", "alignflow deploy makes it"
    elif not any(one.enabled for one in found):
        problem, mend = "is switched off", "switch it on in Prefect's page Automations"
    end = f"goes on when its labels are in: the automation {LABELLED!r}"
    yield judge(
        "labels",
        f"a suspended run of {names} {end} is on",
        f"no suspended run of {names} {end} {problem}" if problem else "",
        f"{mend}; Resume in its page lets one go on that is suspended already",
        "FAIL",
    )


def _asks_people(parameters: dict[str, Any]) -> bool:
    """Return whether a deployment of rounds has people label the pairs."""
    place: Any = parameters
    for name in ("config", "rounds", "labels", "kind"):
        place = place.get(name) if isinstance(place, dict) else None
    return bool(place == "people")


def judge_presence(what: str, wanted: list[str], found: set[str]) -> Finding:
    """Return a failure if some of ``wanted`` are missing; a warning if all are, as on a new server."""
    missing = ", ".join(name for name in wanted if name not in found)
    problem = f"not there, or switched off: {missing}" if missing else ""
    return judge(
        what,
        ", ".join(wanted),
        problem,
        "alignflow deploy makes what is missing",
        "FAIL" if found else "warn",
    )


def check_mlflow() -> Findings:
    """Check MLflow's server."""
    import httpx

    with httpx.Client(base_url=os.environ["MLFLOW_TRACKING_URI"], timeout=SECONDS) as client:
        answer = client.get("/health")
        answer.raise_for_status()
        yield Finding("ok", "mlflow", "it answers and is healthy")
        yield check_clock("mlflow clock", answer.headers.get("date"))
        yield from run_check("mlflow login", partial(check_mlflow_login, client))


def check_mlflow_login(client: Any) -> Findings:
    """Check that the login is accepted, that the server asks for one, and that the experiment is there."""
    user, password, token = (
        os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD", "TOKEN")
    )
    path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}"
    answer_without_login = client.get(path, auth=None)
    answer = client.get(
        path,
        auth=(user, password) if user else None,
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    if answer.status_code in REFUSED:
        yield Finding(
            "FAIL",
            "mlflow login",
            "the server refuses it",
            "MLFLOW_TRACKING_USERNAME and _PASSWORD must be what the server has",
        )
        return
    yield judge(
        "mlflow login",
        "accepted",
        "" if answer_without_login.status_code in REFUSED else OPEN,
        "mlflow server --app-name basic-auth asks for one",
    )
    if answer.status_code != 404:
        answer.raise_for_status()
    state = (
        answer.json()["experiment"]["lifecycle_stage"]
        if answer.is_success
        else "not there yet, the first run makes it"
    )
    level: Level = "FAIL" if state == "deleted" else "warn"
    yield judge(
        "mlflow experiment",
        f"{EXPERIMENT} is there",
        "" if state == "active" else f"{EXPERIMENT} is {state}",
        level=level,
    )


SERVERS = {"PREFECT_API_URL": ("prefect", check_prefect), "MLFLOW_TRACKING_URI": ("mlflow", check_mlflow)}
