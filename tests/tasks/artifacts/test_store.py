"""Test the artifact store: keys, verified look-ups, locks, commits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.artifacts.artifact import Artifact, Step, user_artifact
from tasks.artifacts.store import SCHEMA, Manifest, Recipe, Store, explain_rebuilds, home, list_changes
from tasks.config.jobs import DataJob, SftJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.system.hashing import file_digest, folder_digest

RECIPE = Recipe(
    "sft",
    {"seed": 0, "sft": {"epochs": 2.0}},
    {"data": "d1"},
    {"tasks/programs/sft.py": "s1"},
    {"data": "whole"},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def commit(store: Store, recipe: Recipe = RECIPE, text: str = "weights") -> Manifest:
    artifact = store.partial(recipe.key) / "artifact"
    (artifact / "model").mkdir(parents=True)
    (artifact / "model" / "weights.bin").write_text(text)
    (artifact / "summary.json").write_text("{}")
    return store.commit(recipe, seconds=1.5, peak_mb=100)


def test_what_was_committed_is_found_and_nothing_is_left_in_partial(store: Store) -> None:
    made = commit(store)
    assert store.lookup("sft", RECIPE.key) == made
    assert set(made["files"]) == {"model/weights.bin", "summary.json"}
    assert not (store.partial(RECIPE.key) / "artifact").exists()
    assert store.lookup("sft", "0" * 64) is None


def alter(entry: Path) -> None:
    (entry / "model" / "weights.bin").write_text("weightz")


def delete(entry: Path) -> None:
    (entry / "model" / "weights.bin").unlink()


def add(entry: Path) -> None:
    (entry / "model" / "adapter.bin").write_text("")


def truncate_manifest(entry: Path) -> None:
    text = (entry / "manifest.json").read_text()
    (entry / "manifest.json").write_text(text[: len(text) // 2])


def drop_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def swap_manifest_digest(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "digest": "0" * 64}))


def swap_manifest_files(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))


def manifest_of_another_shape(entry: Path) -> None:
    (entry / "manifest.json").write_text("[]")


DAMAGES = [
    alter,
    delete,
    add,
    truncate_manifest,
    drop_manifest,
    swap_manifest_digest,
    swap_manifest_files,
    manifest_of_another_shape,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_no_hit_and_goes_to_quarantine(store: Store, damage) -> None:
    commit(store)
    damage(store.entry("sft", RECIPE.key))
    assert store.lookup("sft", RECIPE.key) is None
    away = store.quarantine("sft", RECIPE.key)
    assert away is not None
    assert away.is_dir()
    assert away.parent == store.root / "quarantine"
    assert not store.entry("sft", RECIPE.key).exists()
    assert commit(store)["digest"] == store.lookup("sft", RECIPE.key)["digest"]


def test_equal_content_has_an_equal_digest_whatever_made_it(store: Store) -> None:
    other = RECIPE._replace(job={"seed": 1})
    assert other.key != RECIPE.key
    assert commit(store)["digest"] == commit(store, other)["digest"]
    assert (
        commit(store, RECIPE._replace(job={"seed": 2}), text="other")["digest"]
        != store.lookup("sft", RECIPE.key)["digest"]
    )


@pytest.mark.parametrize(
    "other",
    [
        RECIPE._replace(stage="dpo"),
        RECIPE._replace(job={"seed": 0, "sft": {"epochs": 3.0}}),
        RECIPE._replace(inputs={"data": "d2"}),
        RECIPE._replace(inputs={"base": "d1"}),
        RECIPE._replace(sources={"tasks/programs/sft.py": "s2"}),
    ],
)
def test_everything_a_result_depends_on_is_in_the_key(other: Recipe) -> None:
    assert other.key != RECIPE.key


def test_the_order_of_settings_and_inputs_is_not_in_the_key() -> None:
    turned = RECIPE._replace(job={"sft": {"epochs": 2.0}, "seed": 0})
    assert turned.key == RECIPE.key


def test_where_an_input_is_from_is_not_in_the_key_but_remembered(store: Store) -> None:
    elsewhere = RECIPE._replace(origins={"data": "another whole"})
    assert elsewhere.key == RECIPE.key
    assert commit(store, elsewhere)["origins"] == {"data": "another whole"}


def artifact(path: str, digest: str = "d") -> Artifact:
    return Artifact(
        stage="data",
        key="k",
        digest=digest,
        path=path,
        files={},
        seconds=0.0,
        peak_mb=0.0,
        cached=False,
        metrics={},
        warnings=[],
    )


def test_the_machine_the_paths_and_the_other_stages_settings_are_not_in_the_key() -> None:
    def key(**settings: object) -> str:
        return Step(
            "sft",
            SftJob.of(Pipeline.model_validate(settings)),
            {"data": artifact("/here"), "base": artifact("/there")},
        ).recipe.key

    plain = key()
    assert key(machine=Machine(threads=1, device="cpu", micro_batch=2, checkpoint_steps=1)) == plain
    assert key(ppo={"steps": 3}) == plain
    assert key(sft={"epochs": 3}) != plain
    moved = Step(
        "sft", SftJob.of(Pipeline()), {"data": artifact("/elsewhere"), "base": artifact("/there")}
    ).recipe.key
    assert moved == plain


def test_a_dump_is_known_by_its_content_not_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))

    def key(name: str, text: str) -> str:
        path = tmp_path / name / "Posts.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        source = {"kind": "stack-exchange", "path": str(path)}
        return Step(
            "data", DataJob.of(Pipeline.model_validate({"source": source})), {"source": user_artifact(path)}
        ).recipe.key

    assert key("a", "<posts/>") == key("b", "<posts/>")
    assert key("a", "<posts/>") != key("a", "<posts> </posts>")


def test_a_remembered_digest_is_forgotten_when_the_file_changes_even_with_its_old_times(
    tmp_path: Path,
) -> None:
    path, memory = tmp_path / "model.safetensors", tmp_path / "memory"
    path.write_text("one")
    first = file_digest(path, memory=memory, large=1)
    note = next(memory.iterdir())
    assert file_digest(path, memory=memory, large=1) == first
    note.write_text(note.read_text().replace(first, "remembered"))
    assert file_digest(path, memory=memory, large=1) == "remembered"
    times = path.stat()
    time.sleep(0.02)
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path, memory=memory, large=1) not in (first, "remembered")
    note.write_text("{")
    assert file_digest(path, memory=memory, large=1) == file_digest(path)


def test_a_folder_is_its_files_without_hidden_ones(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "x").write_text("x")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "y").write_text("y")
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")
    (tmp_path / "b" / "sub" / "x").rename(tmp_path / "b" / "x")
    assert folder_digest(tmp_path / "a") != folder_digest(tmp_path / "b")


HOLD = """
import sys, time
from pathlib import Path
from tasks.artifacts.store import Store
with Store(Path(sys.argv[1])).lock("k", on_wait=lambda: print("waiting", flush=True)):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(store: Store, seconds: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_a_lock_is_held_by_one_and_freed_when_its_holder_is_killed(store: Store) -> None:
    with hold(store, 60) as first:
        assert first.stdout.readline() == "held\n"
        with hold(store, 0) as second:
            assert second.stdout.readline() == "waiting\n"
            time.sleep(0.3)
            assert second.poll() is None
            os.kill(first.pid, signal.SIGKILL)
            assert second.stdout.readline() == "held\n"
            assert second.wait(900) == 0
    with store.lock("k", on_wait=lambda: pytest.fail("a stale lock")):
        pass


def test_what_changed_is_named_setting_by_setting(store: Store) -> None:
    before = commit(store)
    after = Recipe(
        "sft",
        {"seed": 0, "sft": {"epochs": 3.0, "rank": 8}},
        {"data": "d2"},
        {"tasks/programs/sft.py": "s1", "tasks/rlhf/algorithms/losses.py": "s"},
        {},
    )
    assert list_changes(after, before) == [
        "sft.epochs 2.0 -> 3.0",
        "sft.rank null -> 8",
        "input data",
        "code tasks/rlhf/algorithms/losses.py",
    ]
    assert list_changes(RECIPE, before) == []


def store_as_of_before(store: Store, stage: str) -> None:
    """Store an artifact of a stage with the schema of an earlier version."""
    manifest = commit(store, RECIPE._replace(stage=stage, job={"made": "before"}))
    path = store.entry(stage, manifest["key"]) / "manifest.json"
    path.write_text(json.dumps(manifest | {"schema": SCHEMA - 1}))


def test_stages_of_an_earlier_version_are_named_until_they_are_rebuilt(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(store.root))
    stages = ["data", "sft", "merge"]
    assert explain_rebuilds(stages) == ""
    store_as_of_before(store, "sft")
    store_as_of_before(store, "merge")
    store_as_of_before(store, "dpo")
    sentence = (
        "The stored artifacts of {} are of an earlier version of alignflow, whose keys are computed "
        "differently; they are rebuilt once"
    )
    assert explain_rebuilds(stages) == sentence.format("sft, merge")
    commit(store)
    assert explain_rebuilds(stages) == sentence.format("merge")


def test_a_manifest_that_cannot_be_read_is_left_out(store: Store) -> None:
    assert store.manifests("sft") == []
    commit(store)
    last = commit(store, RECIPE._replace(job={"seed": 9}))
    truncate_manifest(store.entry("sft", RECIPE.key))
    assert store.manifests("sft") == [last]


def test_home_is_absolute_and_moved_by_one_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGNFLOW_HOME", raising=False)
    assert home() == tmp_path / ".alignflow"
    monkeypatch.setenv("ALIGNFLOW_HOME", "elsewhere")
    assert home() == tmp_path / "elsewhere"
