"""Two workers of one pool: stages that do not wait for each other run, fail and are cancelled at the same time.

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
from tests.support import fake_tree
from tests.support.fake_tree import await_
from tests.support.supervised_home import House


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("two-workers")
    with pytest.MonkeyPatch.context() as patched:
        made = House(root, fake_tree.make_tree(root / "tree"), "", "")
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patched.setenv(name, made.login[name])
        try:
            for pool, name in (("cpu", "cpu-1"), ("gpu", "gpu-1"), ("gpu", "gpu-2")):
                made.work(pool, name)
            yield made
        finally:
            made.stop()


@pytest.fixture(autouse=True)
def behaved(house: House) -> Iterator[None]:
    yield
    for stage in fake_tree.STAGES:
        fake_tree.misbehave(house.tree, stage, "")


def trigger(house: House, kl: float, **modes: str) -> UUID:
    """Start a run of both policies; ``kl`` makes other keys of PPO and DPO."""
    for stage, mode in modes.items():
        fake_tree.misbehave(house.tree, stage, mode)
    settings = {"method": "both", "ppo": {"kl_coefficient": kl}, "dpo": {"beta": kl}}
    machine = {"upload_seconds": 1, "checkpoint_steps": 1}
    return house.trigger(
        "rlhf/demo", config={**settings, "pools": {"gpu": "gpu"}, "machine": machine}, profile="demo"
    )


def task_runs(house: House, run: UUID) -> list[TaskRun]:
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    with house.client() as client:
        return client.read_task_runs(flow_run_filter=wanted, limit=200)


def stage_runs(house: House, *names: str) -> dict[str, FlowRun]:
    """The newest run of the flow ``stage`` for each of these stages."""
    return {run.name: run for run in house.stages() if run.name in names}


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


def test_ppo_and_dpo_of_one_run_overlap_and_the_graph_is_true(house: House) -> None:
    run = trigger(house, 0.11, ppo="slow", dpo="slow", reward="slow", reference="slow")
    end = house.end(run, 600)
    assert end.state
    assert end.state.type == StateType.COMPLETED, end.state.message
    await_(lambda: all(one.end_time for one in task_runs(house, run) if one.name in fake_tree.STAGES), 30)
    tasks = task_runs(house, run)
    by_name = {one.name: one for one in tasks}
    on_workers = stage_runs(house, "ppo", "dpo", "reward", "reference")
    for pair in (("ppo", "dpo"), ("reward", "reference")):
        assert overlap(*(by_name[name] for name in pair)) > 0
        assert overlap(*(on_workers[name] for name in pair)) > 0  # these begin when a worker takes them
    trained = [
        {path.parent.name for path in (house.root / home / "objects").glob("*/*")}
        for home in ("gpu-1", "gpu-2")
    ]
    assert [len({"ppo", "dpo"} & stages) for stages in trained] == [1, 1]
    assert {name: found for name, found in edges(tasks).items() if name in fake_tree.STAGES} == chain_edges()
    for one in tasks:  # Prefect notes each dispatched stage as a task run of its own
        if one.name not in fake_tree.STAGES:
            assert {kind for kind, inputs in one.task_inputs.items() if inputs} <= {"__parents__"}


def test_a_branch_that_fails_on_a_worker_leaves_the_other(house: House) -> None:
    run = trigger(house, 0.12, dpo="fail")
    end = house.end(run, 600)
    assert end.state
    assert end.state.type == StateType.FAILED
    assert "The stage dpo failed: CUDA went away" in str(end.state.message)
    found = json.loads(house.file(run, "summary.json").read_text())
    assert [stage["name"] for stage in found["stages"] if not stage["cached"]] == ["ppo", "winrate", "report"]
    assert list(found["failed"]) == ["dpo"]
    assert "The stage dpo failed: CUDA went away" in found["failed"]["dpo"]


def test_cancel_ends_both_stages_at_work(house: House) -> None:
    run = trigger(house, 0.13, ppo="hang-at 3", dpo="hang-at 3")
    programs = [await_(lambda stage=stage: house.program(stage), 120) for stage in ("ppo", "dpo")]
    assert all(fake_tree.is_alive(program.pid) for program in programs)
    with house.client() as client:
        client.set_flow_run_state(run, Cancelling())
    await_(lambda: not any(fake_tree.is_alive(program.pid) for program in programs), 25)
    end = house.end(run, 60)
    assert end.state
    assert end.state.type == StateType.CANCELLED
    ends = stage_runs(house, "ppo", "dpo")
    await_(
        lambda: (
            {one.state.type for one in stage_runs(house, *ends).values() if one.state}
            == {StateType.CANCELLED}
        ),
        30,
    )
