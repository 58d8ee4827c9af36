"""Test `alignflow compare` with the real program, on two runs whose artifacts lie in MLflow."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import cli
from tasks.artifacts.store import Recipe, Store, home
from tasks.config.pipeline import Pipeline
from tasks.tracking import databases, runs
from tasks.tracking.client import Tracker, process_tracker

QUESTION = "How do I find all .log files under /etc?"
RIGHT, WRONG = "Use `find /etc -name '*.log'`.", "Use `ls`."
NUM_QUESTIONS = 60


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which commands change
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_")):
            monkeypatch.delenv(name)
    os.environ["ALIGNFLOW_HOME"] = str(tmp_path / "home")
    return tmp_path / "home"


def make_run(tracker: Tracker, name: str, *, right: int, steps: int, question: str = QUESTION) -> None:
    """Make a finished run whose PPO answers so many questions right."""
    ids = list(range(NUM_QUESTIONS))
    columns: dict[str, Any] = {"question_id": ids, "question": [question] * NUM_QUESTIONS}
    for policy, count in (("sft", 10), ("ppo", right)):
        texts = [RIGHT if id < count else WRONG for id in ids]
        columns |= {f"{policy}.answer": texts, f"{policy}.tokens": [[1]] * NUM_QUESTIONS}
        columns[f"{policy}.kl"] = [float(steps)] * NUM_QUESTIONS
    config = Pipeline.model_validate({"ppo": {"steps": steps}}).model_dump(mode="json")
    store, recipe = Store(home()), Recipe("answers", {"name": name}, {}, {}, {})
    folder = store.partial(recipe.key) / "artifact"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "answers.parquet")
    (folder / "summary.json").write_text('{"metrics": {}, "warnings": []}')
    manifest = store.commit(recipe, seconds=1, peak_mb=1)
    with runs.pipeline_run(tracker, name, config, flow_run_id=name, profile="demo") as tracked:
        with runs.stage_run(tracker, "answers", recipe.key, {}, parent=tracked.run_id) as run:
            run.upload_artifact(manifest, store.entry("answers", recipe.key))
        stage = {"name": "answers", "key": recipe.key, "digest": manifest["digest"], "warnings": []}
        metrics = {"sft.length": 1.0, "ppo.length": 1.0}
        summary = {"profile": "demo", "stages": [stage], "metrics": metrics, "finished": steps}
        for file, content in {"summary.json": summary, "config.json": config}.items():
            (home() / file).write_text(json.dumps(content))
            tracked.upload(home() / file)


@pytest.mark.slow
def test_two_runs_are_judged_once_in_whichever_order_they_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.mkdir()
    databases.lay("mlflow", place / "mlflow.db")
    tracker = process_tracker()
    assert tracker.connect()
    make_run(tracker, "worse", right=20, steps=3)
    make_run(tracker, "better", right=45, steps=4)
    page = tmp_path / "page.html"
    shutil.rmtree(place / "objects")  # the answers are read from MLflow

    assert cli.main(["compare", "worse", "better", "--judge", "--html", str(page)]) == 0
    first = capsys.readouterr().out
    assert "built in" in first
    assert "ppo.steps" in first
    assert "PPO of B is first with a probability of 100 %." in first
    assert "it wins 70.8 % (" in first  # 25 of 60 won, 35 tied
    assert "PPO of B beats PPO of A" in page.read_text()
    assert tracker.search("attributes.run_name = 'compare worse and better'")[0].status == "FINISHED"

    assert cli.main(["compare", "better", "worse", "--judge", "gold", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["title"] for one in found["judged"]["board"]] == ["PPO of B", "PPO of A", "SFT of A and B"]
    assert [one["name"] for one in found["runs"]] == ["worse", "better"]
    assert len(list((place / "objects" / "compare").iterdir())) == 1
    assert cli.main(["compare", "latest", "worse"]) == 0  # a comparison is no run of the pipeline
    assert "better" in capsys.readouterr().out


def test_a_judge_of_runs_without_shared_questions_is_refused_and_leaves_no_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.mkdir()
    databases.lay("mlflow", place / "mlflow.db")
    tracker = process_tracker()
    assert tracker.connect()
    make_run(tracker, "one", right=20, steps=3)
    make_run(tracker, "other", right=45, steps=4, question="How do I list /tmp?")
    assert cli.main(["compare", "one", "other", "--judge"]) == 2
    sentence = "The runs share no held-out question, so no judge can decide between their answers"
    assert capsys.readouterr().err == f"alignflow: {sentence}\n"
    assert tracker.search("attributes.run_name LIKE 'compare%'") == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "b", "--html", "gone/page.html"], "--html: gone/page.html cannot"),
        (["a", "b"], "There are no runs"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    arguments: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not place.exists()
