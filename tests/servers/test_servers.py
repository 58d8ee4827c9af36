"""Test both servers of `alignflow up`: pages that request no other host, and runs that are lost or only
wait.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelling, Paused, Running, Suspended

from flows.commands import up
from flows.services import automations, credentials, environment, local_servers, prefect_server, processes
from flows.services.processes import PAGE_POLICY, PREFECT_SERVER, free_port
from tests.support import fake_programs
from tests.support.pages.prefect_pages import PrefectPages
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

SERVICES = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
V1 = ("/runs", "/blocks/catalog", "/events", "/settings")
V2 = ("/", "/v2", "/v2/runs", "/v2/index.html")
MLFLOW = ("/", "/#/experiments?workflowType=machine_learning")


class Servers(NamedTuple):
    prefect: str
    mlflow: str
    password: str


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Start both servers as `alignflow up` does, over SQLite."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "environ", fake_programs.environment(ROOT, home))
        environment.prepare(home)
        address, login = (
            local_servers.Address(*(f"http://127.0.0.1:{free_port()}" for _ in range(2))),
            credentials.load_or_create(home),
        )
        processes = up.Supervisor(home)
        for part in local_servers.servers(home, address, login):
            processes.start(part)
    try:
        processes.await_health()
        yield Servers(*address, login.password)
    finally:
        processes.stop()


@pytest.fixture(scope="module")
def pages(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectPages]:
    with PrefectPages(servers, tmp_path_factory.mktemp("pictures")) as opened:
        yield opened


def test_no_page_of_either_server_asks_another_host(servers: Servers, pages: PrefectPages) -> None:
    for path in V1:
        pages.page.goto(servers.prefect + path)
        pages.page.wait_for_load_state("networkidle")
    assert pages.page.get_by_text("Settings").count()
    for path in MLFLOW:
        pages.page.goto(servers.mlflow + path, wait_until="domcontentloaded")
        pages.page.get_by_text("Docs").first.wait_for()
    assert pages.outside == []


def test_no_way_leads_to_the_v2_pages(servers: Servers, pages: PrefectPages) -> None:
    """Neither a link in the V1 pages, nor an address, nor the cookie that remembers the choice."""
    pages.page.goto(servers.prefect + "/dashboard")
    pages.page.get_by_text("Settings").wait_for()
    assert pages.page.get_by_text("V2").count() == 0
    pages.page.context.add_cookies([{"name": "prefect_ui_version", "value": "v2", "url": servers.prefect}])
    for path in V2:
        pages.page.goto(servers.prefect + path)
        pages.page.wait_for_load_state("networkidle")
        assert "Prefect Server" in pages.page.title(), path
        scripts = pages.page.evaluate("[...document.scripts].map(script => new URL(script.src).pathname)")
        assert not [script for script in scripts if script.startswith("/v2")], path
    assert pages.outside == []


@pytest.mark.parametrize(
    "path", ["/", "/dashboard", "/runs", "/v2/", "/docs", "/assets/none.js", "/api/health", "/api/docs"]
)
def test_every_answer_of_prefects_server_has_the_policy(servers: Servers, path: str) -> None:
    assert httpx.get(servers.prefect + path, timeout=900).headers.get_list("content-security-policy") == [
        PAGE_POLICY
    ]


@pytest.mark.parametrize("path", ["/", "/health", "/static-files/favicon.ico"])
def test_every_answer_of_mlflows_server_has_the_policy(servers: Servers, path: str) -> None:
    for login in (None, ("alignflow", servers.password)):
        assert httpx.get(servers.mlflow + path, auth=login, timeout=900).headers.get_list(
            "content-security-policy"
        ) == [PAGE_POLICY]


def test_prefects_settings_for_its_pages_name_v1_alone(servers: Servers) -> None:
    settings = httpx.get(f"{servers.prefect}/ui-settings", timeout=900).json()
    assert (settings["available_uis"], settings["default_ui"], settings["v2_base_url"]) == (
        ["v1"],
        "v1",
        None,
    )


def test_the_policy_names_no_other_host() -> None:
    for directive in PAGE_POLICY.split("; "):
        assert set(directive.split()[1:]) <= {
            "'self'",
            "'none'",
            "'unsafe-inline'",
            "'unsafe-eval'",
            "data:",
            "blob:",
        }


@pytest.mark.parametrize("path", prefect_server.DOCUMENTATION)
def test_a_page_that_would_be_blank_under_the_policy_says_so(servers: Servers, path: str) -> None:
    answer = httpx.get(servers.prefect + path, timeout=900)
    assert answer.status_code == 404
    assert "another host" in answer.text


def test_the_server_of_a_plain_run_is_the_same_without_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda command, env, **_: started.append((command, env))
    )
    (tmp_path / "logs").mkdir()
    processes.PrefectApi(tmp_path)._starting.close()
    ((command, environment),) = started
    assert command[2 : 2 + len(PREFECT_SERVER)] == list(PREFECT_SERVER)
    assert (environment["PREFECT_UI_ENABLED"], environment["PREFECT__SERVER_EPHEMERAL"]) == ("0", "1")


def test_the_servers_in_containers_show_the_same_pages() -> None:
    prefect = SERVICES["prefect"]["command"]
    assert prefect[2 : 2 + len(PREFECT_SERVER)] == list(PREFECT_SERVER)
    (options,) = [word for word in SERVICES["mlflow"]["command"] if word.startswith("--uvicorn-opts=")]
    assert shlex.split(options.removeprefix("--uvicorn-opts=")) == [
        "--header",
        f"Content-Security-Policy:{PAGE_POLICY}",
    ]


@contextlib.contextmanager
def client_of(servers: Servers) -> Iterator[SyncPrefectClient]:
    chosen = {
        PREFECT_API_URL: f"{servers.prefect}/api",
        PREFECT_API_AUTH_STRING: f"{credentials.USER}:{servers.password}",
    }
    with temporary_settings(chosen), get_client(sync_client=True) as client:
        yield client


@contextlib.contextmanager
def process(command: list[str], folder: Path, more: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(command, cwd=folder, env=fake_programs.environment(ROOT, folder) | more) as started:
        try:
            yield started
        finally:
            started.kill()


@flow
def waiting() -> None:
    """Never runs: its flow runs are only set to states."""


def test_a_suspended_run_is_resumed_in_its_page(servers: Servers, pages: PrefectPages) -> None:
    """The dialog sends Prefect's CSRF token; the policy forbids nothing that it needs."""
    with client_of(servers) as client:
        deployment = client.create_deployment(client.create_flow(waiting), "waiting")
        run = client.create_flow_run_from_deployment(deployment).id
        for state in (Running(), Suspended()):
            client.set_flow_run_state(run, state, force=True)
        pages.page.goto(f"{servers.prefect}/runs/flow-run/{run}")
        pages.page.get_by_role("button", name="Resume").click()
        pages.page.locator(".p-modal").get_by_role("button", name="Submit").click()
        fake_programs.wait_until(lambda: client.read_flow_run(run).state_name == "Resuming")
        pages.leave()


# Runs that beat quickly, each in a thread of one process, and never end by themselves.
WORK = """
import sys, time, threading
from prefect import flow
from flows.services.heartbeat import heartbeat

@flow(persist_result=False)
def work(name):
    with heartbeat(1):
        time.sleep(600)

for name in sys.argv[1:]:
    time.sleep(0.7)  # many at once lock SQLite out
    run = work.with_options(name=name, flow_run_name=name)
    threading.Thread(target=run, args=(name,), daemon=True).start()
time.sleep(600)
"""
# The states of a run before its machine is lost. Functions, since states contain times and tests are
# collected long before they run.
STATES: dict[str, list[Callable[[], State]]] = {
    "running": [],
    "resumed": [Suspended, Running],
    "suspended": [Suspended],
    "paused": [Paused],
    "cancelling": [Cancelling],
    "awaiting-retry": [AwaitingRetry],
    "late": [
        lambda: State(
            type=StateType.SCHEDULED, name="Late", state_details={"scheduled_time": datetime.now(UTC)}
        )
    ],
}
LOST = {"running", "resumed"}


def test_a_lost_run_is_found_and_one_that_waits_is_not_taken_for_one(
    servers: Servers, tmp_path: Path
) -> None:
    """The machine is lost with all of them; each has sent a heartbeat before, while it was Running."""
    more = {
        "PREFECT_API_URL": f"{servers.prefect}/api",
        "PREFECT_API_AUTH_STRING": f"{credentials.USER}:{servers.password}",
    }
    command = [sys.executable, "-c", WORK, *STATES]
    with client_of(servers) as client, process(command, tmp_path, more) as machine:

        def runs() -> dict[str, FlowRun]:
            return {run.name: run for run in client.read_flow_runs() if run.name in STATES}

        def are_running() -> bool:
            return {run.state_name for run in runs().values()} == {"Running"} and len(runs()) == len(STATES)

        fake_programs.wait_until(are_running, every=1)
        client.create_automation(automations._lost(seconds=30))
        time.sleep(3)
        for name, states in STATES.items():
            for make_state in states:
                client.set_flow_run_state(runs()[name].id, make_state(), force=True)
        expected = {name: run.state_name for name, run in runs().items()}
        time.sleep(
            15
        )  # its process lives on for a while, as that of a suspended run does to the end of its stage
        machine.kill()
        fake_programs.wait_until(
            lambda: {name for name, run in runs().items() if run.state_name == "Crashed"} >= LOST,
            every=1,
        )
        time.sleep(3)
        assert {name: run.state_name for name, run in runs().items()} == expected | dict.fromkeys(
            LOST, "Crashed"
        )
