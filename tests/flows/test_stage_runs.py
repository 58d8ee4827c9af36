"""Stages as Prefect task runs: which run at the same time, what a failure does to the others, and the edges.

The flows are real and the stages toys; a last part runs the whole pipeline in place with tiny programs.
"""

import inspect
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_LOGGING_LEVEL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import chain
from flows.services.prefect_workarounds import true_edges
from flows.stage_runs import Outcome, StageRuns, stopping_threads
from tasks.artifacts.artifact import Artifact, Step
from tasks.config.jobs import AnswersJob, DataJob, Job, MixtureJob, PpoJob, ReportJob, RewardJob
from tasks.config.machine import Machine, Pools
from tasks.config.pipeline import Pipeline
from tasks.execution import dispatch
from tasks.execution.dispatch import Stopped
from tasks.execution.launch import interrupted
from tasks.execution.run_stage import RunContext
from tasks.stages import stage as stage_module
from tasks.stages.stage import NothingToDo, Stage, stage
from tasks.system.errors import DiskFailure, InputError, StageFailed
from tasks.system.retry import retry, stopping
from tests.support import fake_programs

IN_PLACE, DISPATCHED = Pools(), Pools(gpu="gpu")
Work = Callable[[str], None]


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    chosen = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_LEVEL: "CRITICAL"}
    with prefect_test_harness(server_startup_timeout=900), temporary_settings(chosen):
        yield


@pytest.fixture(autouse=True)
def not_stopping() -> Iterator[None]:
    yield
    stopping.clear()
    interrupted.clear()


def artifact(stage: str) -> Artifact:
    return Artifact(
        stage=stage,
        key=f"{stage}-key",
        digest=f"{stage}-digest",
        path="",
        files={},
        seconds=1.0,
        peak_mb=1.0,
        cached=False,
        metrics={},
        warnings=[],
    )


def toy(name: str, *needed: str, job: type[Job] = ReportJob) -> Stage:
    """A stage that needs some artifacts; winrate takes what there is of others too, and needs one."""

    def choose_inputs(config: Pipeline, **artifacts: Artifact) -> dict[str, Artifact]:
        assert artifacts.keys() >= set(needed)
        if name == "winrate" and artifacts.keys() == set(needed):
            raise NothingToDo("nothing to work on")
        return {}

    kinds = {
        "config": inspect.Parameter.POSITIONAL_OR_KEYWORD,
        **dict.fromkeys(needed, inspect.Parameter.KEYWORD_ONLY),
        "others": inspect.Parameter.VAR_KEYWORD,
    }
    signature = inspect.Signature([inspect.Parameter(*one) for one in kinds.items()])
    choose_inputs.__name__, choose_inputs.__signature__ = name, signature  # type: ignore[attr-defined]
    return stage(job)(choose_inputs)


def run_chain(pools: Pools, work: Work, *, edges: bool = True) -> tuple[Outcome, dict[str, set[str]]]:
    """Run first -> {ppo, dpo} -> winrate -> last, and return how they ended and each one's edges."""
    first, last = toy("first"), toy("last", "winrate")
    ppo, dpo, winrate = (toy(name, "data") for name in ("ppo", "dpo", "winrate"))

    def run_toy(step: Step, context: RunContext) -> Artifact:
        work(step.stage)
        return artifact(step.stage)

    @flow(name="toys", persist_result=False)
    def toys() -> Outcome:
        stages = StageRuns(Pipeline(), RunContext(Machine(), None, pools))
        with stopping_threads():
            data = stages.run(first)
            found = {"ppo": stages.run(ppo, data=data), "dpo": stages.run(dpo, data=data)}
            stages.run(last, winrate=stages.run(winrate, data=data, **found))
            return stages.wait()

    @flow(name="toys", persist_result=False)
    def with_true_edges() -> Outcome:
        with true_edges():
            return toys.fn()

    with patch.object(stage_module, "run_stage", run_toy):
        state = (with_true_edges if edges else toys)(return_state=True)
    outcome: Outcome = state.result()
    return outcome, edges_of(state.state_details.flow_run_id)


def edges_of(flow_run_id: Any) -> dict[str, set[str]]:
    def read() -> list[Any]:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(limit=200)
        return [run for run in runs if run.flow_run_id == flow_run_id]

    runs = fake_programs.wait_until(
        lambda: len(found := read()) == 5 and all(run.state for run in found) and found
    )
    names = {run.id: run.name.partition("-")[0] for run in runs}  # Prefect gives one that is not run a suffix
    return {
        names[run.id]: {names[one.id] for inputs in run.task_inputs.values() for one in inputs}
        for run in runs
    }


TRUE_EDGES = {
    "first": set(),
    "ppo": {"first"},
    "dpo": {"first"},
    "winrate": {"first", "ppo", "dpo"},
    "last": {"winrate"},
}


class Together:
    """Work that waits until ppo and dpo are both at it."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.order: list[str] = []

    def __call__(self, name: str) -> None:
        self.order.append(name)
        if name in ("ppo", "dpo"):
            self.barrier.wait(900)


def test_stages_on_a_pool_that_do_not_wait_for_each_other_run_at_the_same_time() -> None:
    together = Together()
    outcome, edges = run_chain(DISPATCHED, together)
    assert list(outcome.built) == ["first", "ppo", "dpo", "winrate", "last"]
    assert sorted(together.order[1:3]) == ["dpo", "ppo"]
    assert (together.order[0], together.order[3:]) == ("first", ["winrate", "last"])
    assert edges == TRUE_EDGES


def test_stages_in_place_run_one_after_another_on_the_main_thread() -> None:
    at_work: list[str] = []
    order: list[str] = []

    def work(name: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert not at_work
        at_work.append(name)
        time.sleep(0.02)
        order.append(at_work.pop())

    outcome, edges = run_chain(IN_PLACE, work)
    assert list(outcome.built) == order == ["first", "ppo", "dpo", "winrate", "last"]
    assert edges == TRUE_EDGES


def test_prefect_draws_edges_of_its_own_accord() -> None:
    """What true_edges is there for: once this fails, it can go."""
    _, edges = run_chain(IN_PLACE, lambda _: None, edges=False)
    assert edges != TRUE_EDGES


def failing(**errors: Exception) -> Work:
    def work(name: str) -> None:
        if name in errors:
            raise errors[name]

    return work


@pytest.mark.parametrize("pools", [IN_PLACE, DISPATCHED])
def test_a_failed_stage_leaves_the_other_branch_and_what_can_do_without_it(pools: Pools) -> None:
    error = StageFailed("The stage dpo failed: no.")
    outcome, edges = run_chain(pools, failing(dpo=error))
    assert list(outcome.built) == ["first", "ppo", "winrate", "last"]
    assert outcome.failed == {"dpo": error}
    assert outcome.not_run == {}
    assert edges == TRUE_EDGES


@pytest.mark.parametrize("pools", [IN_PLACE, DISPATCHED])
def test_what_needs_a_failed_stage_is_not_run_and_says_because_of_which(pools: Pools) -> None:
    errors = {"ppo": InputError("No."), "dpo": ValueError("A mistake of ours.")}
    outcome, edges = run_chain(pools, failing(**errors))
    assert list(outcome.built) == ["first"]
    assert outcome.failed == errors
    assert outcome.not_run == {"winrate": ["ppo", "dpo"], "last": ["ppo", "dpo"]}
    assert edges == TRUE_EDGES


@pytest.mark.parametrize("pools", [IN_PLACE, DISPATCHED])
def test_without_the_first_stage_nothing_is_run(pools: Pools) -> None:
    outcome, _ = run_chain(pools, failing(first=StageFailed("No.")))
    assert outcome.not_run == {name: ["first"] for name in ("ppo", "dpo", "winrate", "last")}


def test_a_stage_of_a_round_needs_every_input_and_draws_with_the_rounds_seed() -> None:
    """A reward model that is trained without the round's comparisons would be another one."""
    seeds: dict[str, int] = {}

    def run_toy(step: Step, context: RunContext) -> Artifact:
        del context
        if step.stage == "mixture":
            raise StageFailed("No.")
        seeds[step.stage] = step.job.seed  # type: ignore[attr-defined]
        return artifact(step.stage)

    @flow(name="toys", persist_result=False)
    def toys() -> Outcome:
        seeded = dict.fromkeys(("mixture", "reward", "ppo"), Pipeline(seed=7))
        stages = StageRuns(Pipeline(seed=1), RunContext(Machine(), None, IN_PLACE), seeded=seeded)
        data = stages.run(toy("data", job=DataJob))
        mixture = stages.run(toy("mixture", "data", job=MixtureJob), data=data)
        stages.run(toy("reward", "data", job=RewardJob), data=data, mixture=mixture)
        stages.run(toy("ppo", "data", job=PpoJob), data=data)
        stages.run(toy("answers", "data", job=AnswersJob), data=data, mixture=mixture)
        return stages.wait()

    with patch.object(stage_module, "run_stage", run_toy):
        outcome = toys()
    assert seeds == {"data": 1, "ppo": 7, "answers": 1}
    assert outcome.not_run == {"reward": ["mixture"]}


def test_a_full_disk_of_this_machine_ends_the_run_at_once() -> None:
    begun: list[str] = []

    def work(name: str) -> None:
        begun.append(name)
        if name == "ppo":
            raise DiskFailure("The disk is full.")

    with pytest.raises(DiskFailure):
        run_chain(IN_PLACE, work)
    assert begun == ["first", "ppo"]


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_what_stops_the_flow_ends_the_threads_that_wait_for_workers(
    monkeypatch: pytest.MonkeyPatch, is_swallowed: bool
) -> None:
    """A signal reaches the main thread alone, where a library may catch what it raises.

    Prefect waits for all threads."""
    wait = StageRuns.wait
    started, begun, ended = time.monotonic(), threading.Barrier(3), []

    class Client:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read_flow_run(self, _: object) -> Any:
            assert time.monotonic() - started < 100, "nothing has ended the thread"
            return SimpleNamespace(state=None)

    monkeypatch.setattr(dispatch, "get_client", lambda **_: Client())

    def work(name: str) -> None:
        if name in ("ppo", "dpo"):
            begun.wait(900)
            try:
                dispatch._end_of(None, SimpleNamespace(stage=name))  # type: ignore[arg-type]
            except Stopped:
                ended.append(name)
                raise

    def press(stages: StageRuns) -> Outcome:
        begun.wait(900)
        if not is_swallowed:
            raise KeyboardInterrupt
        interrupted.set()
        return wait(stages)

    monkeypatch.setattr(StageRuns, "wait", press)
    with pytest.raises(KeyboardInterrupt):
        run_chain(DISPATCHED, work)
    assert sorted(ended) == ["dpo", "ppo"]


def test_a_call_is_not_retried_any_more_when_the_run_is_being_stopped() -> None:
    tries: list[int] = []

    def call() -> None:
        tries.append(1)
        if len(tries) == 2:
            stopping.set()
        raise ConnectionError

    with pytest.raises(ConnectionError):
        retry(call, is_outage=lambda _: True, patience=60, pause=0.01)
    assert len(tries) == 2


# ---------------------------------------------------------------- whole runs in place, with tiny programs


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_programs.make_tree(tmp_path_factory.mktemp("stage-runs") / "tree")


@pytest.fixture(scope="module")
def home(tree: Path) -> Path:
    return tree.parent / "home"


def run(tree: Path, home: Path, *settings: str, **modes: str) -> tuple[int, str, str]:
    for name, mode in modes.items():
        fake_programs.misbehave(tree, name, mode)
    options = [word for setting in settings for word in ("--set", setting)]
    try:
        return fake_programs.run_cli(tree, home, "run", "demo", *options, "--summary", "summary.json")
    finally:
        for name in modes:
            fake_programs.misbehave(tree, name, "")


def newest_summary(home: Path) -> dict[str, Any]:
    newest = max(home.glob("runs/*/summary.json"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = json.loads(newest.read_text())
    return found


def rows(home: Path, table: str, columns: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        found = database.execute(f"select {columns} from {table}").fetchall()
    database.close()
    return found


def chain_edges() -> dict[str, set[str]]:
    """Return the inputs of every stage of the chain."""
    edges: dict[str, set[str]] = {}

    def do(stage: Any, **inputs: str) -> str:
        edges[stage.name] = set(inputs.values())
        name: str = stage.name
        return name

    chain(Pipeline(method="both"), do)
    return edges | {"report": set(edges)}


def test_a_failed_policy_leaves_the_other_one_its_win_rate_and_a_report_that_says_so(
    tree: Path, home: Path
) -> None:
    status, out, error = run(tree, home, dpo="fail")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith("alignflow: The stage dpo failed: CUDA went away. Its log: ")
    shown = [line.split()[:3] for line in out.splitlines() if "/13 " in line]
    assert [name for _, name, _ in shown] == list(fake_programs.STAGES)  # in the same order as ever
    assert [name for _, name, what in shown if what != "built"] == ["dpo"]
    assert f"Report       {home / 'report.html'}" in out
    assert not (home.parent / "summary.json").exists()
    found = newest_summary(home)
    assert [stage["name"] for stage in found["stages"]] == [
        name for name in fake_programs.STAGES if name != "dpo"
    ]
    assert found["failed"] == {"dpo": error.removeprefix("alignflow: ").strip()}
    page = (home / "report.html").read_text()
    assert "<td>ppo</td>" in page
    assert "<td>dpo</td>" not in page
    (manifest,) = [json.loads(path.read_text()) for path in home.glob("objects/answers/*/manifest.json")]
    assert set(manifest["inputs"]) == {"data", "base", "model", "ppo"}
    states = dict(rows(home, "task_run", "name, state_name"))
    assert {name for name, state in states.items() if state != "Completed"} == {"dpo"}
    ((state, message),) = rows(
        home, "flow_run", "state_name, (select message from flow_run_state where id = state_id)"
    )
    assert state == "Failed"
    assert "The stage dpo failed: CUDA went away" in message


def test_the_edges_are_those_of_the_chain(tree: Path, home: Path) -> None:
    names = {UUID(id): name for id, name in rows(home, "task_run", "id, name")}
    found = {
        name: {names[UUID(one["id"])] for inputs in json.loads(text).values() for one in inputs}
        for name, text in rows(home, "task_run", "name, task_inputs")
    }
    assert found == chain_edges()


def test_the_repaired_run_builds_what_failed_and_what_was_compared_without_it(tree: Path, home: Path) -> None:
    status, _, error = run(tree, home)
    assert (status, error) == (0, "")
    found = newest_summary(home)
    assert [stage["name"] for stage in found["stages"] if not stage["cached"]] == [
        "dpo",
        "answers",
        "winrate",
        "benchmarks",
        "report",
    ]
    assert (found["failed"], found["not_run"]) == ({}, {})


def test_bad_input_in_one_branch_and_what_is_not_run_because_of_it(tree: Path, home: Path) -> None:
    status, out, error = run(tree, home, "reward.epochs=3", "dpo.beta=0.3", reward="input")
    assert (status, error) == (2, "alignflow: reward: These posts hold no question with two answers.\n")
    assert "ppo        not run: reward failed" in out
    found = newest_summary(home)
    assert found["not_run"] == {"ppo": ["reward"], "winrate": ["reward"]}
    built = {stage["name"]: stage["cached"] for stage in found["stages"]}
    assert not built["dpo"]
    assert not built["report"]
    states = {name.partition("-")[0]: state for name, state in rows(home, "task_run", "name, state_name")}
    assert (states["reward"], states["ppo"], states["winrate"]) == ("Failed", "NotReady", "NotReady")


def test_two_failures_are_both_named(tree: Path, home: Path) -> None:
    changed = ("ppo.kl_coefficient=0.2", "dpo.beta=0.2")
    status, out, error = run(tree, home, *changed, ppo="fail", dpo="input")
    assert status == 1
    assert error.startswith("alignflow: 2 stages failed: The stage ppo failed: CUDA went away. Its log: ")
    assert error.endswith("; dpo: These posts hold no question with two answers.\n")
    assert "winrate    not run: ppo and dpo failed" in out
