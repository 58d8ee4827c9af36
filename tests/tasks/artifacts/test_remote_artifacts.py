"""Test artifacts in MLflow: two homes that share nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.artifacts import code_version
from tasks.artifacts.artifact import Artifact, Step, user_artifact, within, without_weights
from tasks.artifacts.store import Store
from tasks.config.jobs import PpoJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import program_environment
from tasks.execution import run_stage as execution_run_stage
from tasks.execution.run_stage import RunContext, run_stage
from tasks.system.errors import InputMissing
from tasks.tracking import remote_artifacts, runs
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import find_published, locate, publish
from tests.support import fake_programs


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create one tracker for all tests here: creating its database takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def tracker(mlflow: Path) -> Tracker:
    return Tracker(mlflow, f"sqlite:///{mlflow / 'mlflow.db'}")


@pytest.fixture
def machine(
    mlflow: Path, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Switch to a machine with a home of its own; return the home."""
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(code_version, "ROOT", made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(mlflow))  # where the artifacts of the experiment lie
    assert tracker.connect()

    def be(name: str) -> Path:
        monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / name))
        (tmp_path / name / "locks").mkdir(parents=True, exist_ok=True)
        return tmp_path / name

    return be


def made_by(machine: Callable[[str], Path], tracker: Tracker, name: str, seed: int) -> Artifact:
    machine(name)
    with runs.pipeline_run(tracker, "demo", {}) as parent:
        return run_stage(
            Step("ppo", PpoJob.of(Pipeline(seed=seed)), {}),
            RunContext(Machine(), parent.run_id, tracker=tracker),
        )


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stored_in_mlflow(tracker: Tracker, key: str, name: str) -> Path:
    """Return the file of an artifact in MLflow."""
    found = find_published(tracker, key)
    assert found
    uri = tracker._mlflow.get_run(found.run_id).info.artifact_uri
    return Path(uri.removeprefix("file://")) / key / name


def test_what_one_machine_made_another_finds_by_its_key(
    machine: Callable[[str], Path], tracker: Tracker
) -> None:
    artifact = made_by(machine, tracker, "a", 1)
    home = machine("b")
    found = find_published(tracker, artifact["key"])
    assert found
    assert found.manifest["digest"] == artifact["digest"]
    assert found.summary["metrics"] == artifact["metrics"]
    place = locate(artifact, tracker)
    assert place.is_relative_to(home / "fetched")
    assert files(place) == {*found.manifest["files"], "manifest.json"}
    assert find_published(tracker, "0" * 64) is None


def test_only_the_part_that_is_meant_is_fetched(machine: Callable[[str], Path], tracker: Tracker) -> None:
    artifact = made_by(machine, tracker, "a", 2)
    home = machine("b")
    folder = home / "fetched" / "ppo" / artifact["key"]
    assert locate(within(artifact, "model"), tracker) == folder / "model"
    assert files(folder) == {"model/config.json", "manifest.json"}
    assert locate(within(artifact, "Posts.xml"), tracker).read_text() == "<posts/>"
    assert files(folder) == {"model/config.json", "manifest.json", "Posts.xml"}


def test_weights_are_not_fetched_for_whoever_does_not_look_at_them(
    machine: Callable[[str], Path], tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = made_by(machine, tracker, "a", 3)
    machine("b")
    monkeypatch.setattr(remote_artifacts, "NUM_DOWNLOADS", 1)
    monkeypatch.setattr("tasks.artifacts.artifact.WEIGHTS", ".json")
    light = without_weights(artifact)
    assert not {name for name in files(locate(light, tracker)) if name.endswith(".json")} - {"manifest.json"}


def test_what_is_here_is_not_fetched(machine: Callable[[str], Path], tracker: Tracker) -> None:
    artifact = made_by(machine, tracker, "a", 4)
    assert locate(artifact, tracker) == Store(machine("a")).entry("ppo", artifact["key"])


def test_a_fetched_copy_that_was_altered_is_fetched_again(
    machine: Callable[[str], Path], tracker: Tracker
) -> None:
    artifact = made_by(machine, tracker, "a", 5)
    machine("b")
    copy = locate(artifact, tracker) / "weights.json"
    whole = copy.read_text()
    copy.write_text("altered")
    assert (locate(artifact, tracker) / "weights.json").read_text() == whole


@pytest.mark.parametrize(
    ("name", "seed"), [("weights.json", 60), ("summary.json", 61), ("manifest.json", 62)]
)
def test_what_was_altered_in_mlflow_is_refused_and_never_offered_again(
    machine: Callable[[str], Path], tracker: Tracker, name: str, seed: int
) -> None:
    artifact = made_by(machine, tracker, "a", seed)
    path = stored_in_mlflow(tracker, artifact["key"], name)
    path.write_text(path.read_text().replace("0", "1"))
    home = machine("b")
    with pytest.raises(InputMissing):
        locate(artifact, tracker)
    assert not (home / "fetched" / "ppo" / artifact["key"] / name).exists() or name == "manifest.json"
    assert find_published(tracker, artifact["key"]) is None
    machine("a")
    with runs.pipeline_run(tracker, "again", {}) as parent:
        assert publish(artifact, tracker, parent=parent.run_id)
    machine("b")
    assert (locate(artifact, tracker) / name).exists()


def test_a_shared_stage_that_is_only_in_this_store_is_published_when_it_is_used(
    machine: Callable[[str], Path],
    tracker: Tracker,
) -> None:
    home = machine("a")
    artifact = run_stage(
        Step("ppo", PpoJob.of(Pipeline(seed=7)), {}), RunContext(Machine(), tracker=tracker)
    )  # untracked
    assert find_published(tracker, artifact["key"]) is None
    with runs.pipeline_run(tracker, "demo", {}) as parent:
        again = run_stage(
            Step("ppo", PpoJob.of(Pipeline(seed=7)), {}),
            RunContext(Machine(), parent.run_id, shared=True, tracker=tracker),
        )
    assert again["cached"]
    shutil.rmtree(home)
    machine("b")
    assert (locate(artifact, tracker) / "weights.json").exists()


def test_on_a_server_a_stage_that_another_machine_built_is_reused(
    machine: Callable[[str], Path], tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = made_by(machine, tracker, "a", 8)
    home = machine("b")
    monkeypatch.setattr(Tracker, "is_remote", True)
    step = Step("ppo", PpoJob.of(Pipeline(seed=8)), {})
    assert execution_run_stage.look_up(step, tracker) == {**artifact, "cached": True, "seconds": 0.0}
    again = run_stage(step, RunContext(Machine(), tracker=tracker))
    assert again["cached"]
    assert again["metrics"] == artifact["metrics"]
    assert not (home / "objects").exists()


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_the_user_brought_reaches_another_machine(
    machine: Callable[[str], Path], tracker: Tracker, tmp_path: Path, is_folder: bool
) -> None:
    place = tmp_path / "brought" / ("model" if is_folder else "Posts.csv.gz")
    place.parent.mkdir()
    if is_folder:
        (place / "deep").mkdir(parents=True)
        (place / "deep" / "config.json").write_text("{}")
        (place / "weights.bin").write_bytes(b"1")
    else:
        place.write_bytes(b"posts")
    machine("a")
    artifact = user_artifact(place)
    assert locate(artifact, tracker) == place
    with runs.pipeline_run(tracker, "demo", {}) as parent:
        assert publish(artifact, tracker, parent=parent.run_id)
    shutil.rmtree(place) if is_folder else place.unlink()
    home = machine("b")
    copy = locate(artifact, tracker)
    assert copy.is_relative_to(home)
    assert is_folder or copy.name == "Posts.csv.gz"  # its name tells its format
    assert user_artifact(copy)["digest"] == artifact["digest"]
    (copy / "weights.bin" if is_folder else copy).write_bytes(b"altered")
    assert user_artifact(locate(artifact, tracker))["digest"] == artifact["digest"]


def test_another_file_under_the_same_path_is_not_taken_for_it(
    machine: Callable[[str], Path], tracker: Tracker, tmp_path: Path
) -> None:
    place = tmp_path / "Posts.xml"
    place.write_text("one")
    machine("a")
    artifact = user_artifact(place)
    place.write_text("two")
    with pytest.raises(InputMissing):
        locate(artifact, tracker)
    assert not publish(artifact, tracker, parent="")


def test_inputs_that_are_missing_are_named_all_at_once(
    machine: Callable[[str], Path], tracker: Tracker, tmp_path: Path
) -> None:
    machine("a")
    lost: Artifact = {**user_artifact(tmp_path / "tree" / "deployments"), "stage": "sft", "key": "1" * 64}
    step = Step("ppo", PpoJob.of(Pipeline()), {"model": lost, "data": lost})
    with pytest.raises(InputMissing, match="data, model"):
        execution_run_stage.describe_job(step, Machine(), tracker)
    assert json.dumps(lost)
