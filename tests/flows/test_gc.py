"""Test `alignflow gc`: what is deleted, what stays, and that no reader ever finds half of an artifact."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.commands import gc
from flows.commands.gc import clean, remove, survey
from tasks.artifacts.store import Manifest, Recipe, Store
from tasks.system.errors import InputError
from tasks.system.hashing import digest_of, file_digest, folder_digest
from tasks.tracking import databases
from tasks.tracking.client import Tracker, process_tracker

DAY = 86400.0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "ALIGNFLOW_DATABASE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def aged(path: Path, days: float) -> Path:
    """Set the modification time of ``path`` and everything in it to ``days`` ago."""
    then = time.time() - days * DAY
    for place in (*path.rglob("*"), path):
        os.utime(place, (then, then))
    return path


def commit(home: Path, stage: str, *takes: str, days: float = 30, text: str = "") -> Manifest:
    """Store an artifact of ``stage`` made from inputs with these digests."""
    store = Store(home)
    inputs = {f"input{number}": digest for number, digest in enumerate(takes)}
    recipe = Recipe(
        stage, {"text": text}, {name: f"a part of {digest}" for name, digest in inputs.items()}, {}, inputs
    )
    made = store.partial(recipe.key) / "artifact"
    made.mkdir(parents=True)
    (made / "weights.bin").write_text(f"{stage} {text}")
    manifest = store.commit(recipe, seconds=1, peak_mb=1)
    store.discard_partial(recipe.key)
    aged(store.entry(stage, recipe.key), days)
    return manifest


def ran(home: Path, name: str, keys: Iterable[str], days: float) -> Path:
    """Record a run that ended ``days`` ago with these stages."""
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    stages = [{"name": "x", "key": key} for key in keys]
    (folder / "summary.json").write_text(json.dumps({"stages": stages, "finished": time.time() - days * DAY}))
    return aged(folder, days)


def partial(home: Path, key: str, days: float, **inputs: Path) -> Path:
    """Create what a killed stage leaves."""
    folder = Store(home).partial(key)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "job.json").write_text(
        json.dumps({"stage": "ppo", "inputs": {name: str(path) for name, path in inputs.items()}})
    )
    return aged(folder, days)


def stored(home: Path) -> set[str]:
    return {path.parent.name for path in home.glob("objects/*/*")}


def everything(home: Path) -> dict[str, int]:
    return {path.relative_to(home).as_posix(): path.stat().st_mtime_ns for path in home.rglob("*")}


def chain(home: Path, text: str = "") -> dict[str, Manifest]:
    """Store data -> sft -> ppo, and a dpo that no other artifact depends on."""
    data = commit(home, "data", text=text)
    sft = commit(home, "sft", data["digest"], text=text)
    return {
        "data": data,
        "sft": sft,
        "ppo": commit(home, "ppo", sft["digest"], text=text),
        "dpo": commit(home, "dpo", sft["digest"], text=text),
    }


def test_what_a_run_names_stays_with_all_that_it_was_made_from_and_the_rest_goes(home: Path) -> None:
    made = chain(home)
    commit(home, "reward", text="of a run long forgotten")
    ran(home, "r", [made["ppo"]["key"]], days=20)
    clean(home)
    assert stored(home) == {"data", "sft", "ppo"}
    assert Store(home).lookup("sft", made["sft"]["key"]) == made["sft"]


@pytest.mark.parametrize(
    ("keep_runs", "days", "staying"),
    [(10, 7, "abc"), (0, 7, "a"), (1, 0, "a"), (2, 7, "ab"), (0, 12, "ab"), (0, 0, "")],
)
def test_the_newest_runs_stay_and_all_younger_ones(
    home: Path, keep_runs: int, days: float, staying: str
) -> None:
    for name, age in {"a": 1, "b": 10, "c": 20}.items():
        ran(home, name, [commit(home, "sft", text=name)["key"]], days=age)
    clean(home, keep_runs=keep_runs, days=days)
    assert sorted(path.name for path in home.glob("runs/*")) == list(staying)
    assert len(list(home.glob("objects/sft/*"))) == len(staying)


def test_an_artifact_of_the_last_hour_stays_with_what_it_was_made_from(home: Path) -> None:
    old = commit(home, "data")
    commit(home, "sft", old["digest"], days=0.5 / 24)
    commit(home, "reward", days=2 / 24)
    clean(home, days=0)
    assert stored(home) == {"data", "sft"}


def test_labels_stay_with_their_pairs_and_the_policies_that_a_waiting_round_goes_on_from(home: Path) -> None:
    policy = commit(home, "ppo", text="round 0")
    asked = commit(home, "asked", commit(home, "candidates", policy["digest"])["digest"])
    commit(home, "asked", text="of a judge")
    labels = home / "labels" / asked["key"] / "labels.jsonl"
    labels.parent.mkdir(parents=True)
    labels.write_text("{}\n")
    aged(home / "labels", 400)
    clean(home)
    assert stored(home) == {"ppo", "candidates", "asked"}
    assert len(list(home.glob("objects/asked/*"))) == 1
    assert labels.is_file()


def test_what_was_fetched_stays_while_something_kept_was_made_from_it(home: Path) -> None:
    content = digest_of("what the user brought")
    for key in (content, digest_of("another")):
        folder = home / "fetched" / "given" / key
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(
            json.dumps({"digest": digest_of(["files", key]), "inputs": {}, "origins": {}})
        )
        aged(folder, 30)
    data = commit(home, "data", content)
    ran(home, "r", [data["key"]], days=1)
    databases.lay("mlflow", home / "mlflow.db")
    found = survey_untracked(home)
    assert [thing.path.name for thing in found] == [digest_of("another")]


def survey_untracked(home: Path, **options: Any) -> list[gc.Candidate]:
    """Return what would be deleted if MLflow knew of nothing."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "tracked_keys", lambda *_, **__: set())
        return survey(home, **{"keep_runs": 10, "days": 7.0, "now": time.time(), **options}).removed


def test_a_stage_at_work_keeps_its_folder_and_what_it_takes(home: Path) -> None:
    data, key = commit(home, "data"), "p" * 64
    sft = commit(home, "sft", data["digest"])
    at_work = partial(home, key, 30, model=Store(home).entry("sft", sft["key"]) / "model")
    with Store(home).lock(key):
        clean(home)
        assert at_work.is_dir()
        assert stored(home) == {"data", "sft"}
    clean(home)
    assert not at_work.exists()
    assert stored(home) == set()


@pytest.mark.parametrize(("days", "stays"), [(3, True), (8, False)])
def test_a_stage_that_was_cut_off_can_go_on_for_some_days(home: Path, days: float, stays: bool) -> None:
    sft = commit(home, "sft")
    left = partial(home, "p" * 64, days, model=Store(home).entry("sft", sft["key"]))
    clean(home)
    assert (left.is_dir(), stored(home)) == ((True, {"sft"}) if stays else (False, set()))


def test_what_is_locked_or_touched_after_it_was_looked_at_is_left_and_said(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    locked, touched, other = (commit(home, stage) for stage in ("sft", "ppo", "dpo"))
    found = survey(home, keep_runs=10, days=7, now=time.time())
    aged(Store(home).entry("ppo", touched["key"]), 0)
    monkeypatch.setattr(gc, "survey", lambda *_, **__: found)
    with Store(home).lock(locked["key"]):
        clean(home)
    assert stored(home) == {"sft", "ppo"}
    told = capsys.readouterr().out
    assert f"artifacts: sft {locked['key'][:12]} (in use)" in told
    assert f"artifacts: ppo {touched['key'][:12]} (changed meanwhile)" in told
    assert other["key"][:12] not in told
    assert re.search(r"artifacts +1 ", told)


def test_half_of_a_deleted_thing_is_never_found_and_the_next_one_finishes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = commit(home, "sft")
    left = partial(home, "p" * 64, 30)

    def cut_off(path: Path) -> None:
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gc.shutil, "rmtree", cut_off)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                clean(home)
    assert not Store(home).entry("sft", made["key"]).exists()
    assert not left.exists()
    for path in home.glob("trash/*"):
        aged(path, 1)
    clean(home)
    assert not (home / "trash").exists()


def test_a_thing_that_cannot_be_removed_is_said_and_stops_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    stuck, _ = commit(home, "data"), commit(home, "sft")
    rename = os.rename

    def refuse(path: Path, to: Path) -> None:
        if path.name == stuck["key"]:
            raise PermissionError(1, "Operation not permitted")
        rename(path, to)

    monkeypatch.setattr(gc.os, "rename", refuse)
    clean(home)
    assert stored(home) == {"data"}
    assert f"data {stuck['key'][:12]} (Operation not permitted)" in capsys.readouterr().out


def test_token_ids_go_some_days_after_their_last_use(home: Path) -> None:
    for key, days in {"old": 20.0, "used": 20.0, "new": 1.0, "held": 20.0}.items():
        folder = home / "tokens" / key
        folder.mkdir(parents=True)
        for name in ("part-00000-of-00001.arrow", "table.json"):
            (folder / name).write_text(key)
        aged(folder, days)
    os.utime(home / "tokens" / "used" / "table.json")
    with Store(home).lock("held"):
        clean(home)
    assert {path.name for path in home.glob("tokens/*")} == {"used", "new", "held"}


def hub_tables(home: Path, name: str, days: float) -> Path:
    """Write the tables of a part of a data set."""
    folder = home / "hub" / name
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "rows.parquet").write_text(name)
    return aged(folder, days)


def test_parts_of_data_sets_go_some_days_after_their_last_use(home: Path) -> None:
    places = {
        name: hub_tables(home, name, days) for name, days in {"old": 20.0, "used": 20.0, "new": 1.0}.items()
    }
    os.utime(places["used"])
    hub_tables(home, "at-work", 20)
    commit_note = home / "hub" / "1234.commit"
    commit_note.write_text("c" * 40)
    aged(commit_note, 20)
    with Store(home).lock("hub-at-work"):
        clean(home)
    assert {path.name for path in home.glob("hub/*")} == {"used", "new", "at-work", "1234.commit"}


def test_parts_of_data_sets_stay_while_something_kept_or_unfinished_was_made_from_them(home: Path) -> None:
    kept, wanted, forgotten = (hub_tables(home, name, 30) for name in ("kept", "wanted", "forgotten"))
    data, other = (commit(home, "data", folder_digest(folder)) for folder in (kept, forgotten))
    ran(home, "r", [data["key"]], days=1)
    partial(home, "p" * 64, 3, source=wanted)
    clean(home)
    assert {path.name for path in home.glob("hub/*")} == {"kept", "wanted"}
    assert Store(home).lookup("data", other["key"]) is None


def test_what_a_killed_process_has_fetched_of_a_data_set_goes(home: Path) -> None:
    left, at_work = (hub_tables(home, f".{name}.new", 1) for name in ("left", "at-work"))
    with Store(home).lock("hub-at-work"):
        clean(home)
    assert (left.exists(), at_work.exists()) == (False, True)


def test_quarantine_goes_by_when_it_was_put_there(home: Path) -> None:
    for days in (3, 8):
        folder = home / "quarantine" / f"sft-{'a' * 12}-{time.time_ns() - int(days * DAY * 1e9)}"
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_text("x")
        aged(folder, 30)
    (home / "quarantine" / "by-hand").mkdir()
    aged(home / "quarantine" / "by-hand", 8)
    assert sorted(thing.path.name[:9] for thing in survey_untracked(home)) == ["by-hand", "sft-aaaaa"]
    clean(home)
    assert len(list(home.glob("quarantine/*"))) == 1


def test_notes_of_files_that_are_gone_or_go_are_forgotten(home: Path, tmp_path: Path) -> None:
    made = commit(home, "sft")
    paths = [tmp_path / "there", tmp_path / "gone", Store(home).entry("sft", made["key"]) / "weights.bin"]
    paths[0].write_text("x")
    paths[1].write_text("x")
    for path in paths:
        file_digest(path, memory=home / "digests", large=1)
    paths[1].unlink()
    clean(home)
    assert [json.loads(note.read_text())["path"] for note in home.glob("digests/*")] == [str(paths[0])]


def test_locks_of_dead_pipelines_go_and_those_of_keys_stay(home: Path) -> None:
    made = commit(home, "sft")
    locks = home / "locks"
    locks.mkdir()
    for name in (
        "run-dead.lock",
        "run-alive.lock",
        "run-new.lock",
        f"{made['key']}.lock",
        f"{'f' * 64}.lock",
        "up.lock",
        "mlflow.lock",
    ):
        (locks / name).touch()
        aged(locks / name, 0 if name == "run-new.lock" else 30)
    with (locks / "run-alive.lock").open("a") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        clean(home)
    kept = {
        "run-alive.lock",
        "run-new.lock",
        f"{made['key']}.lock",
        f"{'f' * 64}.lock",
        "up.lock",
        "mlflow.lock",
        "gc.lock",
    }
    assert {path.name for path in locks.iterdir()} == kept


def test_a_life_line_that_is_taken_up_again_is_left(home: Path) -> None:
    lock = home / "locks" / "run-r.lock"
    lock.parent.mkdir()
    lock.touch()
    aged(lock, 30)
    (thing,) = survey_untracked(home)
    with lock.open("a") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert survey_untracked(home) == []
        assert remove(home, [thing]) == {lock: "in use"}
    assert remove(home, [thing]) == {}
    assert not lock.exists()


def test_what_a_killed_process_was_fetching_goes_and_what_one_fetches_now_stays(home: Path) -> None:
    databases.lay("mlflow", home / "mlflow.db")
    entry = home / "fetched" / "sft" / ("k" * 64)
    for name, days in {".new-old": 2.0, ".new-now": 0.0}.items():
        (entry / name).mkdir(parents=True)
        (entry / name / "part").write_text("x")
        aged(entry / name, days)
    (home / ".up.json.123.new").write_text("x")
    aged(home / ".up.json.123.new", 1)
    assert sorted(thing.path.name for thing in survey_untracked(home)) == [".new-old", ".up.json.123.new"]
    shutil.rmtree(entry / ".new-now")
    aged(entry, 1)
    assert sorted(thing.path.name for thing in survey_untracked(home)) == [".up.json.123.new", entry.name]


def test_a_dry_run_lists_what_would_go_and_touches_nothing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = commit(home, "sft", text="x" * 3_000_000, days=12)
    partial(home, "p" * 64, 9)
    ran(home, "old", [], days=30)
    before = everything(home)
    clean(home, keep_runs=0, dry_run=True)
    assert everything(home) == before
    out = capsys.readouterr().out
    assert re.search(rf"artifacts +sft +{made['key'][:12]} +5\.7 +12 days", out)
    assert re.search(rf"partial +ppo +{'p' * 12} +0\.0 +9 days", out)
    assert re.search(
        r"Would free +number +MB\nartifacts +1 +5\.7\npartial +1 +0\.0\nruns +1 +0\.0\nall +3 +5\.7\n",
        re.sub(" +\n", "\n", out),
    )
    clean(home, keep_runs=0)
    assert re.search(r"Freed +number", capsys.readouterr().out)
    assert stored(home) == set()


def test_a_home_that_is_not_there_stays_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert capsys.readouterr().out == "Nothing to free.\n"


@pytest.mark.parametrize("options", [{"keep_runs": -1}, {"days": -0.5}, {"days": float("nan")}])
def test_less_than_nothing_is_refused(home: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be 0 or more"):
        clean(home, **options)


def test_two_at_once_are_refused(home: Path) -> None:
    commit(home, "sft")
    (home / "locks").mkdir()
    with (home / "locks" / "gc.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another `alignflow gc` is at work"):
            clean(home)
        clean(home, dry_run=True)
    assert stored(home) == {"sft"}


# ------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return MLflow's client over the home's own database."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    databases.lay("mlflow", home / "mlflow.db")
    tracker = process_tracker()
    assert tracker.connect()
    return tracker._mlflow


def tracked(client: Any, tags: dict[str, str], days: float = 0) -> str:
    """Create a run in MLflow that started ``days`` ago."""
    started = int((time.time() - days * DAY) * 1000)
    return str(client.create_run(process_tracker()._experiment, start_time=started, tags=tags).info.run_id)


def test_what_mlflow_knows_as_registered_recent_or_alive_stays(home: Path, mlflow: Any) -> None:
    registered, recent, alive, old, parent_old, deleted, of_round = (
        chain(home, text=str(number)) for number in range(7)
    )
    mlflow.create_registered_model("policy")
    run = tracked(mlflow, {"stage.key": registered["ppo"]["key"]}, days=60)
    mlflow.create_model_version("policy", mlflow.get_run(run).info.artifact_uri, run)
    gone = tracked(mlflow, {"stage.key": deleted["ppo"]["key"]}, days=60)
    mlflow.create_model_version("policy", mlflow.get_run(gone).info.artifact_uri, gone)
    mlflow.delete_run(gone)
    tracked(mlflow, {"stage.key": recent["ppo"]["key"]}, days=2)
    tracked(mlflow, {"stage.key": old["ppo"]["key"]}, days=9)
    parent = tracked(mlflow, {}, days=9)
    tracked(mlflow, {"stage.key": alive["ppo"]["key"], "mlflow.parentRunId": parent}, days=9)
    tracked(mlflow, {"stage.key": parent_old["ppo"]["key"], "mlflow.parentRunId": "another"}, days=9)
    finished = tracked(mlflow, {"mlflow.parentRunId": parent}, days=9)  # a round of rounds that go on
    tracked(mlflow, {"stage.key": of_round["ppo"]["key"], "mlflow.parentRunId": finished}, days=9)
    with (home / "locks" / f"run-{parent}.lock").open("a") as life_line:
        fcntl.flock(life_line, fcntl.LOCK_EX)
        clean(home)
    kept = {path.name for path in home.glob("objects/*/*")}
    assert kept == {
        chain[stage]["key"]
        for chain in (registered, recent, alive, deleted, of_round)
        for stage in ("data", "sft", "ppo")
    }


def test_registered_models_are_found_page_after_page(
    home: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.create_registered_model("policy")
    for number in range(3):
        run = tracked(mlflow, {"stage.key": commit(home, "ppo", text=str(number))["key"]}, days=60)
        mlflow.create_model_version("policy", mlflow.get_run(run).info.artifact_uri, run)
    search = mlflow.search_model_versions
    monkeypatch.setattr(mlflow, "search_model_versions", lambda **asked: search(**asked, max_results=2))
    clean(home)
    assert len(list(home.glob("objects/ppo/*"))) == 3


def test_a_registered_version_without_a_run_of_ours_is_no_hindrance(
    home: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = commit(home, "ppo")
    mlflow.create_registered_model("policy")
    mlflow.create_model_version(
        "policy", f"file://{home}/mlartifacts/x", "f" * 32, tags={"stage.key": made["key"]}
    )
    commit(home, "sft")
    clean(home)
    assert stored(home) == {"ppo"}


def break_server(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("tasks.tracking.client.PATIENCE_TO_CONNECT", 0.0)


def break_search(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "mlflow.db").touch()
    monkeypatch.setattr(Tracker, "connect", lambda _: True)
    monkeypatch.setattr(Tracker, "search", lambda *_, **__: (_ for _ in ()).throw(OSError("it went away")))


def name_database(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("ALIGNFLOW_DATABASE", "postgresql://somewhere")


def remember_database(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "mlflow-auth.ini").write_text("[mlflow]\ndatabase_uri = postgresql+psycopg2://somewhere/mlflow\n")
    (home / "mlflow.db").touch()


def have_fetched(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "fetched").mkdir()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("hide", "sentence"),
    [
        (break_server, "MLflow, which knows the registered models, is not reachable"),
        (break_search, "is not reachable, and nothing is freed before it is; .* .it went away."),
        (name_database, "served by `alignflow up`: start it first"),
        (remember_database, "served by `alignflow up`: start it first"),
        (have_fetched, "has worked with an MLflow server"),
    ],
)
def test_nothing_is_freed_while_nobody_knows_what_is_registered(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    hide: Callable[[pytest.MonkeyPatch, Path], None],
    sentence: str,
    dry_run: bool,
) -> None:
    commit(home, "sft")
    hide(monkeypatch, home)
    with pytest.raises(InputError, match=sentence):
        clean(home, dry_run=dry_run)
    assert stored(home) == {"sft"}


def test_a_home_that_never_tracked_anything_makes_no_tracker(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "connect", lambda _: pytest.fail("a tracker was opened"))
    shutil.rmtree(home / "objects", ignore_errors=True)
    commit(home, "sft")
    clean(home)
    assert stored(home) == set()
    assert not (home / "mlflow.db").exists()
