"""Test MLflow through real stages: parents, children, resuming, reuse, and a tracker that is down."""

import json
import os
import pwd
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import code_version
from tasks.artifacts.artifact import Step, user_artifact
from tasks.artifacts.store import Store
from tasks.config.jobs import DataJob, PpoJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import program_environment
from tasks.execution.run_stage import RunContext, run_stage
from tasks.system import events
from tasks.system.errors import InputError, StageFailed
from tasks.system.hashing import file_digest
from tasks.tracking import program_log, run_origin, runs, tracked_run
from tasks.tracking.client import Tracker, process_tracker
from tasks.tracking.run_notes import machine_and_home
from tasks.tracking.tracked_run import TrackedRun
from tests.support import fake_programs


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking") / "home"


@pytest.fixture(scope="module")
def shared_tracker(shared_home: Path) -> Tracker:
    """One connection for all tests here."""
    return Tracker(shared_home, f"sqlite:///{shared_home / 'mlflow.db'}")


@pytest.fixture
def tracker(shared_tracker: Tracker, tree: Path) -> Tracker:
    assert shared_tracker.connect()
    return shared_tracker


@pytest.fixture
def tree(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a tree of fake programs, and MLflow over one database for all tests here: creating it takes
    seconds.
    """
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(code_version, "ROOT", made)
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


def context(tracker: Tracker, parent: TrackedRun) -> RunContext:
    return RunContext(Machine(), parent.run_id, tracker=tracker)


def children(tracker: Tracker, parent: TrackedRun) -> list[Any]:
    condition = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    return tracker._mlflow.search_runs([tracker._experiment], condition)


def test_a_stage_is_a_child_with_settings_metrics_data_and_files(tree: Path, tracker: Tracker) -> None:
    with runs.pipeline_run(
        tracker, "demo", Pipeline(seed=11).model_dump(mode="json"), flow_run_id="f1"
    ) as parent:
        posts = tree / "Posts.xml"
        posts.write_text("<posts/>")
        artifact = run_stage(
            Step("data", DataJob.of(Pipeline(seed=11)), {"source": user_artifact(posts)}),
            context(tracker, parent),
        )
    client = tracker._mlflow
    root = client.get_run(parent.run_id)
    assert root.info.status == "FINISHED"
    assert root.data.tags["prefect.flow_run_id"] == "f1"
    assert root.data.params["ppo.kl_coefficient"] == "0.05"
    (child,) = children(tracker, parent)
    assert child.info.status == "FINISHED"
    assert (
        child.info.run_name == f"data {artifact['key'][:6]}"
    )  # in a legend, two runs' stages are told apart
    assert child.data.params["data.max_pairs"] == "10"
    assert child.data.tags["stage.key"] == artifact["key"]
    assert child.data.tags["stage.digest"] == artifact["digest"]
    curve = "data/progress/data/loss"
    assert [point.step for point in client.get_metric_history(child.info.run_id, curve)] == [1, 2, 3, 4, 5]
    assert child.data.metrics["eval/win_rate/gold/data"] == 0.7
    assert child.data.metrics["intervals/eval/win_rate/gold/data.low"] == 0.6
    for run in (child, root):
        (read,) = run.inputs.dataset_inputs
        assert read.dataset.name == "Posts.xml"
        assert read.dataset.digest == file_digest(posts)[:36]
        assert json.loads(read.dataset.profile) == {"bytes": 8}
        assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "source")]
    files = {file.path for file in client.list_artifacts(child.info.run_id, artifact["key"])}
    assert f"{artifact['key']}/manifest.json" in files
    assert {file.path for file in client.list_artifacts(child.info.run_id)} == {artifact["key"], "log.txt"}


def test_a_reused_stage_points_to_the_run_that_built_it(tree: Path, tracker: Tracker) -> None:
    with runs.pipeline_run(tracker, "one", {}) as first:
        run_stage(step(21), context(tracker, first))
    with runs.pipeline_run(tracker, "two", {}) as second:
        run_stage(step(21), context(tracker, second))
    (built,), (reused,) = children(tracker, first), children(tracker, second)
    assert reused.data.tags["cached"] == "true"
    assert reused.data.tags["stage.built_by"] == built.info.run_id
    assert reused.data.metrics["eval/kl/ppo"] == 0.5
    assert reused.info.status == "FINISHED"
    assert tracker._mlflow.list_artifacts(reused.info.run_id) == []


def test_a_retried_flow_run_finds_its_run_with_its_tags_and_those_below_it(tracker: Tracker) -> None:
    for _ in range(2):
        with runs.pipeline_run(tracker, "rounds", {}, flow_run_id="r9") as parent:
            known = dict(parent.known)
            parent.set_tags({"compared with": "the champion"})
            with runs.pipeline_run(tracker, "1", {}, flow_run_id="r9-1", parent=parent.run_id) as one:
                pass
        assert [child.info.run_id for child in children(tracker, parent)] == [one.run_id]
    assert (parent.resumed, one.resumed) == (True, True)
    assert known["compared with"] == "the champion"


def test_a_crash_is_failed_and_the_resumed_stage_continues_its_run(tree: Path, tracker: Tracker) -> None:
    fake_programs.misbehave(tree, "ppo", "hang-at 3")

    def kill_at_3(event: events.Event) -> None:
        if event.kind == "step" and event.about["line"]["step"] == 3:
            raise StageFailed("killed")

    unlisten = events.listen(kill_at_3)
    with pytest.raises(StageFailed), runs.pipeline_run(tracker, "one", {}) as first:
        run_stage(step(31), context(tracker, first))
    unlisten()
    (crashed,) = children(tracker, first)
    assert (crashed.info.status, tracker._mlflow.get_run(first.run_id).info.status) == ("FAILED", "FAILED")
    fake_programs.misbehave(tree, "ppo", "")
    with runs.pipeline_run(tracker, "two", {}) as second:
        run_stage(step(31), context(tracker, second))
    (resumed,) = children(tracker, second)
    assert resumed.info.run_id == crashed.info.run_id
    assert resumed.info.status == "FINISHED"
    assert [
        point.step for point in tracker._mlflow.get_metric_history(resumed.info.run_id, "train/ppo/loss")
    ] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_resumed_run_takes_no_step_twice(tree: Path, tracker: Tracker) -> None:
    with runs.pipeline_run(tracker, "one", {}) as parent:
        before = TrackedRun(tracker, parent.run_id, stage="ppo")
        for number in (1, 2, 3):
            before.log_step({"step": number, "total": 4, "time": 100.0 + number, "loss": 1.0})
        before.flush()
        after = TrackedRun(tracker, parent.run_id, stage="ppo", resumed=True)
        for seconds, number in enumerate(
            (3, 4, 4)
        ):  # 3 is taken again, from the checkpoint of 2; then the program dies once more
            after.log_step({"step": number, "total": 4, "time": 200.0 + seconds, "loss": 1.0, "kl": 0.5})
        after.flush()

    def steps(name: str) -> list[int]:
        history = tracker._mlflow.get_metric_history(parent.run_id, f"train/ppo/{name}")
        return [point.step for point in history]

    assert (steps("loss"), steps("kl"), steps("total")) == ([1, 2, 3, 4], [3, 4], [])


def test_an_interrupted_pipeline_is_killed(tree: Path, tracker: Tracker) -> None:
    with pytest.raises(KeyboardInterrupt), runs.pipeline_run(tracker, "one", {}) as parent:
        raise KeyboardInterrupt
    assert tracker._mlflow.get_run(parent.run_id).info.status == "KILLED"


def test_a_parent_that_a_kill_9_left_running_is_closed_by_the_next_pipeline(
    tree: Path, tracker: Tracker
) -> None:
    left = tracker.start("left", {runs.HOME: machine_and_home()})
    stage = tracker.start("sft", {runs.PARENT: left})
    with runs.pipeline_run(tracker, "next", {}) as alive:
        assert tracker._mlflow.get_run(left).info.status == "KILLED"
        assert tracker._mlflow.get_run(stage).info.status == "KILLED"
        with runs.pipeline_run(tracker, "beside", {}):
            assert tracker._mlflow.get_run(alive.run_id).info.status == "RUNNING"


def test_long_and_many_settings_fit(tree: Path, tracker: Tracker) -> None:
    with runs.pipeline_run(
        tracker, "big", {"text": "x" * 20_000, **{f"k{number}": number for number in range(250)}}
    ) as parent:
        pass
    params = tracker._mlflow.get_run(parent.run_id).data.params
    assert len(params) == 251
    assert len(params["text"]) == tracked_run.MAX_VALUE


def test_without_a_tracker_everything_runs_and_one_line_says_so(
    tree: Path, heard: list[Any], shared_home: Path
) -> None:
    unreachable = Tracker(shared_home, "http://127.0.0.1:9")  # no server listens there
    with runs.pipeline_run(unreachable, "demo", {"seed": 1}) as parent:
        artifact = run_stage(step(41), context(unreachable, parent))
    assert not artifact["cached"]
    assert [event.about["text"][:24] for event in heard if event.kind == "warning"] == [
        "MLflow is not reachable;"
    ]


def test_a_tracker_that_goes_away_in_mid_run_stops_nothing(
    tree: Path, heard: list[Any], shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(shared_home, f"sqlite:///{shared_home / 'mlflow.db'}")
    with runs.pipeline_run(tracker, "demo", {"seed": 1}) as parent:

        class Gone:
            def __getattr__(self, name: str) -> Any:
                raise ConnectionError("gone")

        monkeypatch.setattr(tracker, "_client", Gone())
        assert not run_stage(step(51), context(tracker, parent))["cached"]
    assert len([event for event in heard if event.kind == "warning"]) == 1


def test_two_threads_connect_once_and_log_into_runs_of_their_own(
    tree: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(shared_home, f"sqlite:///{shared_home / 'mlflow.db'}")
    opened: list[str] = []
    connect = tracker._open
    monkeypatch.setattr(tracker, "_open", lambda: (opened.append("open"), connect())[1])
    together = threading.Barrier(2)

    def log(name: str) -> TrackedRun:
        together.wait(900)
        assert tracker.connect()
        run = TrackedRun(tracker, tracker.start(name, {}), stage=name)
        for number in range(1, 21):
            run.log_step({"step": number, "loss": float(number)})
        run.end("FINISHED")
        return run

    with ThreadPoolExecutor(2) as pool:
        ppo, dpo = pool.map(log, ("ppo", "dpo"))
    assert opened == ["open"]
    for name, run in (("ppo", ppo), ("dpo", dpo)):
        history = tracker._mlflow.get_metric_history(run.run_id, f"train/{name}/loss")
        assert [point.step for point in history] == list(range(1, 21))
        assert set(tracker._mlflow.get_run(run.run_id).data.metrics) == {f"train/{name}/loss"}


def test_of_errors_in_two_threads_one_warning_is_shown(heard: list[Any], tmp_path: Path) -> None:
    tracker, together = Tracker(tmp_path, "sqlite://"), threading.Barrier(2)

    def fail(_: int) -> None:
        with tracker.turned_off_by_errors():
            together.wait(900)
            raise ConnectionError("gone")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fail, range(2)))
    assert [event.kind for event in heard] == ["warning"]
    assert not tracker.connect()


def test_a_process_has_one_tracker_for_each_server_and_home(
    tree: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = process_tracker()
    assert (first.root, first.uri) == (shared_home, f"sqlite:///{shared_home / 'mlflow.db'}")
    assert process_tracker() is first
    assert RunContext(Machine()).tracker is first
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert process_tracker() is not first
    assert process_tracker().is_remote


def test_links_lead_to_where_people_open_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tracker(tmp_path, "sqlite:///x.db").page("r") == ""  # a database file has no page
    tracker = Tracker(tmp_path, "http://mlflow:5000/")
    assert tracker.page("r").startswith("http://mlflow:5000/#/experiments/")
    monkeypatch.setenv("ALIGNFLOW_MLFLOW_URL", "https://mlflow.example.org")
    assert tracker.page("r").startswith("https://mlflow.example.org/#/experiments/")


# -------------------------------------------------------------------------- logs, names and origins


def log_of(tracker: Tracker, run: Any, folder: Path) -> str:
    """Return the log that MLflow has of a run."""
    folder.mkdir()
    return Path(tracker._mlflow.download_artifacts(run.info.run_id, "log.txt", str(folder))).read_text()


def test_a_failed_stage_leaves_its_log_in_mlflow_and_tells_its_last_lines(
    tree: Path, tracker: Tracker, heard: list[Any], tmp_path: Path
) -> None:
    fake_programs.misbehave(tree, "ppo", "fail")
    with pytest.raises(StageFailed), runs.pipeline_run(tracker, "one", {}) as parent:
        run_stage(step(61), context(tracker, parent))
    (failed,) = children(tracker, parent)
    assert failed.info.status == "FAILED"
    assert "RuntimeError: CUDA went away" in log_of(tracker, failed, tmp_path / "log")
    (lines,) = [event.about["lines"] for event in heard if event.kind == "log"]
    assert lines[-1] == "RuntimeError: CUDA went away"


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, SystemExit])
def test_a_stopped_stage_leaves_its_log(
    tree: Path, tracker: Tracker, stopped_by: type[BaseException], tmp_path: Path
) -> None:
    fake_programs.misbehave(tree, "ppo", "hang-at 3")

    def stop_at_3(event: events.Event) -> None:
        if event.kind == "step" and event.about["line"]["step"] == 3:
            raise stopped_by

    unlisten = events.listen(stop_at_3)
    with pytest.raises(stopped_by), runs.pipeline_run(tracker, "one", {}) as parent:
        run_stage(step(62 + (stopped_by is SystemExit)), context(tracker, parent))
    unlisten()
    (killed,) = children(tracker, parent)
    assert killed.info.status == "KILLED"
    assert "hello from ppo" in log_of(tracker, killed, tmp_path / "log")


def test_a_refused_stage_leaves_its_log_in_mlflow_and_nothing_on_disk(
    tree: Path, tracker: Tracker, heard: list[Any], shared_home: Path, tmp_path: Path
) -> None:
    fake_programs.misbehave(tree, "ppo", "input")
    with pytest.raises(InputError), runs.pipeline_run(tracker, "one", {}) as parent:
        run_stage(step(64), context(tracker, parent))
    (refused,) = children(tracker, parent)
    assert "hello from ppo" in log_of(tracker, refused, tmp_path / "log")
    assert not [event for event in heard if event.kind == "log"]  # the sentence says it all
    assert not Store(shared_home).partial(step(64).recipe.key).exists()


def test_the_log_of_a_stage_that_kill_9_ended_is_brought_by_the_next_pipeline(
    tree: Path, tracker: Tracker, shared_home: Path, tmp_path: Path
) -> None:
    left = tracker.start("left", {runs.HOME: machine_and_home()})
    stage = tracker.start("sft", {runs.PARENT: left, runs.KEY: "k" * 64})
    partial = Store(shared_home).partial("k" * 64)
    partial.mkdir(parents=True)
    (partial / "log.txt").write_text("its last words\n")
    with runs.pipeline_run(tracker, "next", {}):
        assert log_of(tracker, tracker._mlflow.get_run(stage), tmp_path / "log") == "its last words\n"


def test_runs_say_who_started_what_from_which_code(
    tree: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "somebody-else")
    settings = Pipeline(seed=65).model_dump(mode="json")
    with runs.pipeline_run(
        tracker, "evil `name`", settings, profile="de`mo", source="alignflow run demo"
    ) as parent:
        run_stage(step(65), context(tracker, parent))
    (child,) = children(tracker, parent)
    root = tracker._mlflow.get_run(parent.run_id)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert [run.data.tags["mlflow.user"] for run in (root, child)] == [user, user]
    assert [run.info.user_id for run in (root, child)] == [user, user]
    assert root.data.tags["mlflow.source.name"] == "alignflow run demo"
    assert child.data.tags["mlflow.source.name"] == "tasks.programs.ppo"
    assert "- Profile: `de'mo`" in root.data.tags["mlflow.note.content"]
    assert f"- Key: `{child.data.tags['stage.key'][:12]}`" in child.data.tags["mlflow.note.content"]


def test_the_commit_is_that_of_our_own_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.py").write_text("A = 1\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    run_origin._code.cache_clear()
    monkeypatch.setattr(run_origin, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_DIR")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert run_origin._code() == {"mlflow.source.git.commit": commit, "alignflow.source.modified": "false"}
    (tmp_path / "tasks" / "a.py").write_text("A = 2\n")
    run_origin._code.cache_clear()
    assert run_origin._code()["alignflow.source.modified"] == "true"
    monkeypatch.setattr(run_origin, "ROOT", tmp_path / "tasks")  # installed inside somebody's repository
    run_origin._code.cache_clear()
    assert run_origin._code() == {}
    run_origin._code.cache_clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  5%|#   | 1/20\r 10%|##  | 2/20\r", " 10%|##  | 2/20"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07text", "red text"),
        ("a\x00b\x08c\x1b", "a\ufffdb\ufffdc\ufffd"),
        ("a\u202eb", "a\ufffdb"),
        ("postgresql+psycopg2://alignflow:s3cr3t@db/x", "postgresql+psycopg2://***@db/x"),
        ("Authorization: Bearer abcdefgh.12345678", "Authorization: Bearer ***"),
        ("using hf_abcdefghijklmnopqrst now", "using hf_*** now"),
        ('{"api_key": "k1k2k3k4"}', '{"api_key": "***"}'),
        ("MLFLOW_TRACKING_PASSWORD=hunter22", "MLFLOW_TRACKING_PASSWORD=***"),
        ("the word is plain-and-secret", "the word is ***"),
        ("max_new_tokens=128  pad token: </s>  loss 0.5", "max_new_tokens=128  pad token: </s>  loss 0.5"),
        (
            "tokens=1048576 trained, of all tokens: 3,145,728",
            "tokens=1048576 trained, of all tokens: 3,145,728",
        ),
        ("tokenizer: /models/llama-2-7b/tokenizer.json", "tokenizer: /models/llama-2-7b/tokenizer.json"),
        ("token=a1b2c3d4 access_key: 12345678", "token=*** access_key: ***"),
    ],
)
def test_a_log_is_shown_without_secrets_and_control_characters(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "plain-and-secret")
    assert program_log.clean(text) == shown


@pytest.mark.parametrize(
    "unit",
    [
        "a-",
        "a",
        "a.",
        "token-",
        "token=",
        "token.",
        "x://a:",
        "x://",
        "bearer ",
        "token ",
        "secret= ",
        "\x1b]",
        "sk-",
    ],
)
def test_a_long_line_of_untrusted_text_is_cleaned_in_no_time(unit: str) -> None:
    started = time.process_time()
    program_log.clean(unit * (200_000 // len(unit)))
    assert time.process_time() - started < 5


def test_of_a_long_log_the_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_log, "MAX_BYTES", 1000)
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {number}\n" for number in range(1000)) + "x" * 5000)
    assert program_log.last_lines(tmp_path / "gone.txt") == []
    assert len(program_log.last_lines(log)[-1]) <= program_log.LONGEST_LINE
    log.write_text("".join(f"line {number}\n" for number in range(1000)))
    program_log.write_clean(log, tmp_path / "clean.txt")
    lines = (tmp_path / "clean.txt").read_text().splitlines()
    assert lines[0].endswith("earlier bytes are left out)")
    assert lines[-1] == "line 999"
    assert program_log.last_lines(log) == [f"line {number}" for number in range(970, 1000)]
