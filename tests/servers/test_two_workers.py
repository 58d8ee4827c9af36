"""Test two workers of one pool: independent stages run, fail and are cancelled at the same time.

Real servers over SQLite, real workers that share nothing but them; the programs are fakes.
"""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun
from prefect.states import Cancelling

from flows.pipeline import chain
from tasks.config.pipeline import Pipeline
from tests.support import fake_programs
from tests.support.fake_programs import wait_until
from tests.support.installation import REQUEST_SECONDS, Installation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    root = tmp_path_factory.mktemp("two-workers")
    with pytest.MonkeyPatch.context() as patched:
        made = Installation(root, fake_programs.make_tree(root / "tree"), "", "")
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patched.setenv(name, made.login[name])
        try:
            for pool, name in (("cpu", "cpu-1"), ("gpu", "gpu-1"), ("gpu", "gpu-2")):
                made.start_worker(pool, name)
            yield made
        finally:
            made.stop()


@pytest.fixture(autouse=True)
def behaved(servers: Installation) -> Iterator[None]:
    yield
    for stage in fake_programs.STAGES:
        fake_programs.misbehave(servers.tree, stage, "")


def trigger(servers: Installation, kl: float, **modes: str) -> UUID:
    """Start a run of both policies; ``kl`` makes other keys of PPO and DPO."""
    for stage, mode in modes.items():
        fake_programs.misbehave(servers.tree, stage, mode)
    settings = {"method": "both", "ppo": {"kl_coefficient": kl}, "dpo": {"beta": kl}}
    machine = {"upload_seconds": 1, "checkpoint_steps": 1}
    return servers.trigger(
        "rlhf/demo", config={**settings, "pools": {"gpu": "gpu"}, "machine": machine}, profile="demo"
    )


def task_runs(servers: Installation, run: UUID) -> list[TaskRun]:
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    with servers.client() as client:
        return client.read_task_runs(flow_run_filter=wanted, limit=200)


def stage_runs(servers: Installation, *names: str) -> dict[str, FlowRun]:
    """The newest run of the flow ``stage`` for each of these stages."""
    return {run.name: run for run in servers.stage_runs() if run.name in names}


def overlap(one: TaskRun | FlowRun, other: TaskRun | FlowRun) -> float:
    """Seconds that both ran at the same time, as the server knows it."""
    assert one.start_time
    assert one.end_time
    assert other.start_time
    assert other.end_time
    return (min(one.end_time, other.end_time) - max(one.start_time, other.start_time)).total_seconds()


def edges(runs: list[TaskRun]) -> dict[str, set[str]]:
    names = {run.id: run.name.partition("-")[0] for run in runs}
    return {
        names[run.id]: {names[one.id] for inputs in run.task_inputs.values() for one in inputs}
        for run in runs
    }


def chain_edges() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def do(stage: Any, **inputs: str) -> str:
        name: str = stage.run.name
        found[name] = set(inputs.values())
        return name

    chain(Pipeline(method="both"), do)
    return found | {"report": set(found)}


def test_ppo_and_dpo_of_one_run_overlap_and_the_graph_is_true(servers: Installation) -> None:
    run = trigger(
        servers, 0.11, ppo="meet dpo", dpo="meet ppo", reward="meet reference", reference="meet reward"
    )
    end = servers.wait_for_run(run)
    assert end.state
    assert end.state.type == StateType.COMPLETED, end.state.message
    wait_until(
        lambda: all(one.end_time for one in task_runs(servers, run) if one.name in fake_programs.STAGES),
        every=REQUEST_SECONDS,
    )
    tasks = task_runs(servers, run)
    by_name = {one.name: one for one in tasks}
    on_workers = stage_runs(servers, "ppo", "dpo", "reward", "reference")
    for pair in (("ppo", "dpo"), ("reward", "reference")):
        assert overlap(*(by_name[name] for name in pair)) > 0
        assert overlap(*(on_workers[name] for name in pair)) > 0  # these begin when a worker takes them
    trained = [
        {path.parent.name for path in (servers.root / home / "objects").glob("*/*")}
        for home in ("gpu-1", "gpu-2")
    ]
    assert [len({"ppo", "dpo"} & stages) for stages in trained] == [1, 1]
    assert {
        name: found for name, found in edges(tasks).items() if name in fake_programs.STAGES
    } == chain_edges()
    for one in tasks:  # Prefect notes each dispatched stage as a task run of its own
        if one.name not in fake_programs.STAGES:
            assert {kind for kind, inputs in one.task_inputs.items() if inputs} <= {"__parents__"}


def test_a_branch_that_fails_on_a_worker_leaves_the_other(servers: Installation) -> None:
    run = trigger(servers, 0.12, dpo="fail")
    end = servers.wait_for_run(run)
    assert end.state
    assert end.state.type == StateType.FAILED
    assert "The stage dpo failed: CUDA went away" in str(end.state.message)
    found = json.loads(servers.run_file(run, "summary.json").read_text())
    assert [stage["name"] for stage in found["stages"] if not stage["cached"]] == [
        "ppo",
        "answers",
        "winrate",
        "benchmarks",
        "report",
    ]
    assert list(found["failed"]) == ["dpo"]
    assert "The stage dpo failed: CUDA went away" in found["failed"]["dpo"]


def test_cancel_ends_both_stages_at_work(servers: Installation) -> None:
    run = trigger(servers, 0.13, ppo="hang-at 3", dpo="hang-at 3")
    programs = [wait_until(lambda stage=stage: servers.program(stage), every=0.2) for stage in ("ppo", "dpo")]
    assert all(fake_programs.is_alive(program.pid) for program in programs)
    with servers.client() as client:
        client.set_flow_run_state(run, Cancelling())
    wait_until(lambda: not any(fake_programs.is_alive(program.pid) for program in programs))
    end = servers.wait_for_run(run)
    assert end.state
    assert end.state.type == StateType.CANCELLED
    ends = stage_runs(servers, "ppo", "dpo")
    wait_until(
        lambda: (
            {one.state.type for one in stage_runs(servers, *ends).values() if one.state}
            == {StateType.CANCELLED}
        ),
        every=REQUEST_SECONDS,
    )
