"""MLflow through real stages: parents, children, resuming, reuse, and a tracker that is not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tree
import pytest

from tasks import events, launch, sources, tracker, tracking
from tasks.artifact import Step, given
from tasks.launch import StageFailed
from tasks.programs.config import DataJob, Machine, Pipeline, PpoJob
from tasks.stage import Seat, run_stage


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tracker._client = None  # another module's connection is to another database
    return tmp_path_factory.mktemp("tracking") / "home"


@pytest.fixture
def tree(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake tree, and MLflow over one database for all tests here: making it takes seconds."""
    made = fake_tree.make_tree(tmp_path / "tree")
    monkeypatch.setattr(launch, "ROOT", made)
    monkeypatch.setattr(sources, "ROOT", made)
    monkeypatch.setattr(tracker, "_down", False)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(shared_home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared_home / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return made


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    told: list[Any] = []
    unlisten = events.listen(told.append)
    yield told
    unlisten()


def step(seed: int) -> Step:
    return Step("ppo", PpoJob.of(Pipeline(seed=seed)), {})


def children(parent: str) -> list[Any]:
    return tracker._client.search_runs([tracker._experiment], f"tags.`mlflow.parentRunId` = '{parent}'")


def test_a_stage_is_a_child_with_settings_metrics_data_and_files(tree: Path) -> None:
    with tracking.pipeline_run("demo", Pipeline(seed=11).model_dump(mode="json"), flow_run_id="f1") as parent:
        posts = tree / "Posts.xml"
        posts.write_text("<posts/>")
        artifact = run_stage(Step("data", DataJob.of(Pipeline(seed=11)), {"source": given(posts)}), Seat(Machine(), parent.run_id))
    client = tracker._client
    root = client.get_run(parent.run_id)
    assert root.info.status == "FINISHED"
    assert root.data.tags["prefect.flow_run_id"] == "f1"
    assert root.data.params["ppo.kl_coefficient"] == "0.05"
    (child,) = children(parent.run_id)
    assert child.info.status == "FINISHED"
    assert child.info.run_name == "data"
    assert child.data.params["data.max_pairs"] == "10"
    assert child.data.tags["stage.key"] == artifact["key"]
    assert child.data.tags["stage.digest"] == artifact["digest"]
    assert [point.step for point in client.get_metric_history(child.info.run_id, "loss")] == [1, 2, 3, 4, 5]
    assert child.data.metrics["gold_win_rate.data"] == 0.7
    assert child.data.metrics["gold_win_rate.data.low"] == 0.6
    assert {found.dataset.name for found in child.inputs.dataset_inputs} == set(fake_tree.TABLES)
    files = {file.path for file in client.list_artifacts(child.info.run_id, artifact["key"])}
    assert f"{artifact['key']}/manifest.json" in files
    assert {file.path for file in client.list_artifacts(child.info.run_id)} == {artifact["key"], "log.txt"}


def test_a_reused_stage_points_to_the_run_that_built_it(tree: Path) -> None:
    with tracking.pipeline_run("one", {}) as first:
        run_stage(step(21), Seat(Machine(), first.run_id))
    with tracking.pipeline_run("two", {}) as second:
        run_stage(step(21), Seat(Machine(), second.run_id))
    (built,), (reused,) = children(first.run_id), children(second.run_id)
    assert reused.data.tags["cached"] == "true"
    assert reused.data.tags["stage.built_by"] == built.info.run_id
    assert reused.data.metrics["ppo.kl"] == 0.5
    assert reused.info.status == "FINISHED"
    assert tracker._client.list_artifacts(reused.info.run_id) == []


def test_a_crash_is_failed_and_the_resumed_stage_continues_its_run(tree: Path) -> None:
    fake_tree.misbehave(tree, "ppo", "hang-at 3")

    def kill_at_3(event: events.Event) -> None:
        if event.kind == "step" and event.about["line"]["step"] == 3:
            raise StageFailed("killed")

    unlisten = events.listen(kill_at_3)
    with pytest.raises(StageFailed), tracking.pipeline_run("one", {}) as first:
        run_stage(step(31), Seat(Machine(), first.run_id))
    unlisten()
    (crashed,) = children(first.run_id)
    assert (crashed.info.status, tracker._client.get_run(first.run_id).info.status) == ("FAILED", "FAILED")
    fake_tree.misbehave(tree, "ppo", "")
    with tracking.pipeline_run("two", {}) as second:
        run_stage(step(31), Seat(Machine(), second.run_id))
    (resumed,) = children(second.run_id)
    assert resumed.info.run_id == crashed.info.run_id
    assert resumed.info.status == "FINISHED"
    assert [point.step for point in tracker._client.get_metric_history(resumed.info.run_id, "loss")] == [1, 2, 3, 4, 5]


def test_a_resumed_run_takes_no_step_twice(tree: Path) -> None:
    with tracking.pipeline_run("one", {}) as parent:
        before = tracking.Tracked(parent.run_id)
        for number in (1, 2, 3):
            before.step({"step": number, "total": 4, "time": 100.0 + number, "loss": 1.0})
        before.flush()
        after = tracking.Tracked(parent.run_id, resumed=True)
        for seconds, number in enumerate((3, 4, 4)):  # 3 is taken again, from the checkpoint of 2; then the program dies once more
            after.step({"step": number, "total": 4, "time": 200.0 + seconds, "loss": 1.0, "kl": 0.5})
        after.flush()

    def steps(name: str) -> list[int]:
        return [point.step for point in tracker._client.get_metric_history(parent.run_id, name)]

    assert (steps("loss"), steps("kl"), steps("total")) == ([1, 2, 3, 4], [3, 4], [])


def test_an_interrupted_pipeline_is_killed(tree: Path) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.pipeline_run("one", {}) as parent:
        raise KeyboardInterrupt
    assert tracker._client.get_run(parent.run_id).info.status == "KILLED"


def test_a_parent_that_a_kill_9_left_running_is_closed_by_the_next_pipeline(tree: Path) -> None:
    tracker.connect()
    left = tracker.start("left", {tracking.HOME: tracking._whereabouts()})
    stage = tracker.start("sft", {tracking.PARENT: left})
    with tracking.pipeline_run("next", {}) as alive:
        assert tracker._client.get_run(left).info.status == "KILLED"
        assert tracker._client.get_run(stage).info.status == "KILLED"
        with tracking.pipeline_run("beside", {}):
            assert tracker._client.get_run(alive.run_id).info.status == "RUNNING"


def test_long_and_many_settings_fit(tree: Path) -> None:
    with tracking.pipeline_run("big", {"text": "x" * 20_000, **{f"k{number}": number for number in range(250)}}) as parent:
        pass
    params = tracker._client.get_run(parent.run_id).data.params
    assert len(params) == 251
    assert len(params["text"]) == tracking.MAX_VALUE


def test_without_a_tracker_everything_runs_and_one_line_says_so(tree: Path, heard: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_client", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    with tracking.pipeline_run("demo", {"seed": 1}) as parent:
        artifact = run_stage(step(41), Seat(Machine(), parent.run_id))
    assert not artifact["cached"]
    assert [event.about["text"][:24] for event in heard if event.kind == "warning"] == ["MLflow is not reachable;"]


def test_a_tracker_that_goes_away_in_mid_run_stops_nothing(tree: Path, heard: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.pipeline_run("demo", {"seed": 1}) as parent:

        class Gone:
            def __getattr__(self, name: str) -> Any:
                raise ConnectionError("gone")

        monkeypatch.setattr(tracker, "_client", Gone())
        assert not run_stage(step(51), Seat(Machine(), parent.run_id))["cached"]
    assert len([event for event in heard if event.kind == "warning"]) == 1


def test_links_lead_to_where_people_open_the_pages(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracker.page("r") == ""  # a database file has no page
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000/")
    assert tracker.page("r").startswith("http://mlflow:5000/#/experiments/")
    monkeypatch.setenv("ALIGNFLOW_MLFLOW_URL", "https://mlflow.example.org")
    assert tracker.page("r").startswith("https://mlflow.example.org/#/experiments/")
