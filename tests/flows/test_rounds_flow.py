"""Test rounds as whole runs with fake programs: what each takes, early stop, kills, and what MLflow shows."""

import json
import os
import re
import signal
import sqlite3
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import cli, rounds
from flows.commands.job import prepare_job, prepare_round_job
from flows.commands.plan import plan_rounds
from flows.profiles import load
from tasks.artifacts import code_version
from tasks.config.pipeline import Pipeline
from tasks.rounds.round_walk import SEED_STEP, SEEDED, Round
from tasks.system.errors import InputError
from tests.support import fake_programs

ROUND = ["rounds", "demo", "--set", "rounds.count=3"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = fake_programs.make_tree(tmp_path_factory.mktemp("rounds") / "tree")
    fake_programs.misbehave(made, "winrate", "verdicts ww")  # those of the rounds 0 and 1
    return made


@pytest.fixture(scope="module")
def first(tree: Path) -> tuple[Path, dict[str, Any], str]:
    """Return a first run from nothing: its home, its summary, its output."""
    home = tree.parent / "home"
    status, out, error = fake_programs.run_cli(tree, home, *ROUND, "--summary", "first.json")
    assert (status, error) == (0, "")
    return home, json.loads((home.parent / "first.json").read_text()), out


def manifests(home: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the manifests of a home's artifacts by stage, oldest first."""
    found = defaultdict(list)
    for path in home.glob("objects/*/*/manifest.json"):
        found[path.parents[1].name].append(json.loads(path.read_text()))
    return {stage: sorted(ones, key=lambda one: one["created"]) for stage, ones in found.items()}


def test_a_round_that_is_not_shown_to_win_is_the_last_and_the_one_before_is_the_best(first: Any) -> None:
    _, summary, out = first
    assert [line["outcome"] for line in summary["rounds"]] == ["won", "won", "undecided"]
    assert (summary["best"], summary["run"]) == (1, summary["rounds"][1]["run"])
    ends = [line for line in out.splitlines() if "by the gold scorer  (" in line]
    assert [line.split()[:3] for line in ends] == [
        ["round", "0", "won:"],
        ["1/3", "round", "1"],
        ["2/3", "round", "2"],
    ]
    assert "Result: Round 1 is the last that won (70.0 % (60.0 to 80.0, n 10) against the last round" in out
    assert out.rstrip().endswith("2 of 3 rounds were run, as round 2 was not shown to win.")
    assert f"`alignflow promote {summary['run']}` judges round 1" in out


def test_a_round_takes_what_the_rounds_before_have_built(first: Any) -> None:
    home, summary, _ = first
    found = manifests(home)
    assert [line["policy"] for line in summary["rounds"]] == [one["key"] for one in found["ppo"]]
    policies, rewards = ([one["digest"] for one in found[stage]] for stage in ("ppo", "reward"))
    (asked, last_asked), (sampled, last_sampled) = found["asked"], found["candidates"]
    taken = sampled["origins"], last_sampled["origins"]
    assert [one.get("policy") for one in taken] == policies[:2]
    assert [one.get("policy2") for one in taken] == [None, policies[0]]
    assert [one["reward"] for one in taken] == rewards[:2]
    assert "before1" not in asked["origins"]
    assert last_asked["origins"]["before1"] == asked["digest"]
    compared = [one["digest"] for one in found["comparisons"]]
    mixed = [one["origins"] for one in found["mixture"]]
    assert [one["comparisons1"] for one in mixed] == compared[:1] * 2
    assert [one.get("comparisons2") for one in mixed] == [None, compared[1]]
    assert [one["origins"].get("mixture") for one in found["reward"]] == [
        None, *(one["digest"] for one in found["mixture"]),
    ]  # fmt: skip
    assert [one["origins"].get("start") for one in found["ppo"]] == [None, *policies[:2]]
    assert [one["origins"].get("predecessor") for one in found["answers"]] == [None, *policies[:2]]
    named = [
        (one["origins"].get("comparisons1"), one["origins"].get("comparisons")) for one in found["report"]
    ]
    assert named == [(None, None), (None, compared[0]), (compared[0], compared[1])]


def test_a_round_draws_with_a_seed_of_its_own_and_is_judged_on_the_same_questions(first: Any) -> None:
    found = manifests(first[0])
    for stage in SEEDED:
        seeds = [one["job"]["seed"] for one in found[stage]]
        assert seeds == [SEED_STEP * number for number in range(3 - len(seeds), 3)]
    assert [one["job"]["seed"] for one in found["answers"]] == [0, 0, 0]
    assert [len(found[stage]) for stage in ("data", "sft", "merge")] == [1, 1, 1]


def test_a_round_is_a_run_below_that_of_the_flow_which_is_no_run_of_the_profile(first: Any) -> None:
    home, summary, _ = first
    with sqlite3.connect(home / "mlflow.db") as database:
        tags: dict[str, dict[str, str]] = defaultdict(dict)
        for run, key, value in database.execute("select run_uuid, key, value from tags"):
            tags[run][key] = value
        points = database.execute(
            "select step, value from metrics where key = 'rounds/against_the_earlier_round' order by step"
        ).fetchall()
    database.close()
    tracked = [line["run"] for line in summary["rounds"]]
    (parent,) = {tags[run]["mlflow.parentRunId"] for run in tracked}
    assert {tags[run]["alignflow.profile"] for run in tracked} == {"demo"}
    assert "alignflow.profile" not in tags[parent]
    assert [tags[run]["mlflow.runName"].rpartition(", ")[2] for run in tracked] == [
        "round 0", "round 1", "round 2",
    ]  # fmt: skip
    stages = {tags[run].get("stage") for run in tags if tags[run].get("mlflow.parentRunId") == tracked[1]}
    assert stages == {*fake_programs.STAGES, *fake_programs.ROUND_STAGES} - {"reference", "dpo"}
    assert points == [(1, 0.7), (2, 0.7)]
    assert tags[parent]["result"].startswith("Round 1 is the last that won")


def test_the_same_command_builds_nothing_and_comes_to_the_same(tree: Path, first: Any) -> None:
    home, summary, _ = first
    before = {path: path.stat().st_mtime_ns for path in home.glob("objects/*/*/manifest.json")}
    fewer = [*ROUND, "--set", "rounds.count=1", "--set", "rounds.stop=never", "--summary", "again.json"]
    status, out, error = fake_programs.run_cli(tree, home, *fewer)
    assert (status, error) == (0, "")
    again = json.loads((home.parent / "again.json").read_text())
    assert [line["policy"] for line in again["rounds"]] == [line["policy"] for line in summary["rounds"][:2]]
    assert before == {path: path.stat().st_mtime_ns for path in home.glob("objects/*/*/manifest.json")}
    assert "1 of 1 rounds was run." in out


@pytest.fixture
def stored(tree: Path, first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process read the store of the first run."""
    monkeypatch.setattr(code_version, "ROOT", tree)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(first[0]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


def settings(**rounds: Any) -> Pipeline:
    return Pipeline.model_validate(load("demo", []).model_dump() | {"rounds": {"count": 3, **rounds}})


@pytest.mark.usefixtures("stored")
def test_a_plan_says_of_each_round_what_would_be_built_and_whether_another_follows() -> None:
    planned, end = plan_rounds(settings(), "demo")
    assert {one.action for one in planned} == {"reuse"}
    names = [[one.stage for one in planned if one.round == number] for number in range(3)]
    assert names[0] == [name for name in fake_programs.STAGES if name not in ("reference", "dpo")]
    assert names[1] == [*fake_programs.ROUND_STAGES, *names[0][names[0].index("reward") :]]
    assert names[2] == names[1]
    assert end == (
        "Round 2 is the last (undecided: 70.0 % (40.0 to 80.0, n 10) against the last round, by the gold "
        "scorer)."
    )
    planned, end = plan_rounds(settings(stop="never"), "demo")
    new = {one.stage: one for one in planned if one.round == 3}
    assert {one.action for one in planned if one.round < 3} == {"reuse"}
    assert "input before2" in new["asked"].reasons
    assert new["ppo"].action == "build"
    assert end == "Round 3 is the last."


@pytest.mark.usefixtures("stored")
def test_a_plan_ends_with_the_round_whose_verdict_is_not_known() -> None:
    for stop, end in (
        ("not_won", "Round 2 follows if round 1 is shown to win."),
        ("lost", "Round 2 follows if round 1 is not shown to lose."),
        ("never", "Round 2 takes what round 1 builds."),
    ):
        planned, told = plan_rounds(settings(comparisons=7, stop=stop), "demo")
        assert told == end
        assert {one.action for one in planned if one.round == 0} == {"reuse"}
    changed = {one.stage: one for one in planned if one.round == 1}
    assert changed["asked"].reasons == ["comparisons 200 -> 7"]
    assert changed["comparisons"].reasons == ["if asked differs"]
    people = settings(labels={"kind": "people"}, stop="never")
    waiting = {one.stage: one for one in plan_rounds(people, "demo")[0] if one.round == 1}
    assert waiting["comparisons"].reasons[-1] == "if asked, labels differ"


@pytest.mark.usefixtures("stored")
def test_the_job_of_a_rounds_stage_is_written(first: Any, tmp_path: Path) -> None:
    prepare_round_job(settings(), "ppo", tmp_path / "work", profile="demo", number=2)
    job = json.loads((tmp_path / "work" / "job.json").read_text())
    assert job["job"]["seed"] == 2 * SEED_STEP
    policy = manifests(first[0])["ppo"][1]["key"]
    assert job["inputs"]["start"] == str(first[0] / "objects" / "ppo" / policy)
    for number, stage, sentence in (
        (1, "dpo", "Round 1 has no stage dpo; it has: site, data, "),
        (3, "ppo", "There is no round 3: round 2 is the last one"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            prepare_round_job(settings(), stage, tmp_path / "no", profile="demo", number=number)
    with pytest.raises(InputError, match="takes the result of asked, not built yet; `alignflow rounds`"):
        prepare_round_job(settings(comparisons=7), "comparisons", tmp_path / "no", profile="demo", number=1)
    with pytest.raises(InputError, match="There is no round 2: round 1 is not built yet"):
        prepare_round_job(settings(comparisons=7), "ppo", tmp_path / "no", profile="demo", number=2)
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("stored")
def test_a_job_takes_no_folder_of_another_one(tmp_path: Path) -> None:
    """Its program would go on from the other's checkpoint."""
    work = tmp_path / "work"
    prepare_job(settings(), "ppo", work, profile="demo")
    (work / "checkpoints").mkdir()
    before = (work / "job.json").read_text()
    with pytest.raises(InputError, match="work is not empty: name a new one"):
        prepare_job(settings(), "reward", work, profile="demo")
    assert (work / "job.json").read_text() == before
    threads = settings().model_copy(update={"machine": settings().machine.model_copy(update={"threads": 7})})
    prepare_job(threads, "ppo", work, profile="demo")  # goes on where the program was ended
    assert json.loads((work / "job.json").read_text())["machine"]["threads"] == 7
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file: name a new folder"):
        prepare_job(settings(), "ppo", tmp_path / "file", profile="demo")


def test_a_round_that_is_lost_is_set_aside_and_the_next_one_goes_on_without_it(tmp_path: Path) -> None:
    tree, home = fake_programs.make_tree(tmp_path / "tree"), tmp_path / "home"
    fake_programs.misbehave(tree, "winrate", "verdicts wlw")  # of the rounds 0 to 2
    command = ["rounds", "demo", "--set", "rounds.count=2", "--set", "rounds.stop=never"]
    status, out, error = fake_programs.run_cli(tree, home, *command, "--summary", "lost.json")
    assert (status, error) == (0, "")
    summary = json.loads((tmp_path / "lost.json").read_text())
    assert [line["outcome"] for line in summary["rounds"]] == ["won", "lost", "won"]
    assert summary["best"] == 2
    assert "won: 70.0 % (60.0 to 80.0, n 10) against round 0, by the gold scorer" in out
    found = manifests(home)
    policies = [one["digest"] for one in found["ppo"]]
    went_on_from = [None, policies[0], policies[0]]
    assert [one["origins"].get("start") for one in found["ppo"]] == went_on_from
    assert [one["origins"].get("predecessor") for one in found["answers"]] == went_on_from
    sampled = found["candidates"][-1]["origins"]
    assert [sampled["policy"], sampled["policy2"]] == [policies[1], policies[0]]
    assert found["mixture"][-1]["origins"].keys() >= {"comparisons1", "comparisons2"}


def test_killed_rounds_go_on_to_the_same_artifacts(tree: Path, first: Any) -> None:
    """The flow is killed with its program in round 1; then a program alone, in the same round."""
    home = tree.parent / "killed"
    fake_programs.misbehave(tree, "winrate", "verdicts wwwwwwww")
    fake_programs.misbehave(tree, "mixture", "hang-at 3")
    process = fake_programs.start_cli(tree, home, *ROUND, "--set", "rounds.count=1")
    fake_programs.wait_until(lambda: "3" in _steps_of(home, "mixture"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    fake_programs.misbehave(tree, "mixture", "")
    fake_programs.misbehave(tree, "reward", "die-at 3")
    status, out, error = fake_programs.run_cli(tree, home, *ROUND, "--set", "rounds.count=1")
    assert (status, error) == (0, "")
    assert "killed by SIGKILL" in out
    starts = {stage: fake_programs.start_steps(tree, stage) for stage in ("mixture", "reward")}
    assert (starts["mixture"][-2:], starts["reward"][-2:]) == ([0, 2], [0, 2])
    undisturbed = {one["key"]: one["digest"] for ones in manifests(first[0]).values() for one in ones}
    resumed = manifests(home)
    compared = [one for stage in (*SEEDED, "merge", "answers", "benchmarks") for one in resumed[stage]]
    assert len(compared) == 4 * 1 + 2 * 2 + 1 + 2 * 2
    assert {one["key"]: one["digest"] for one in compared}.items() <= undisturbed.items()


def test_a_retried_run_is_compared_with_the_champion_of_its_first_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tags: dict[str, str] = {}
    monkeypatch.setattr(rounds, "find_opponents", lambda *_: {"champion": {"stage": "ppo", "key": "old"}})
    monkeypatch.setattr(rounds, "read_pin", lambda _, text: json.loads(text))
    first: Any = SimpleNamespace(known={}, tracker=None, set_tags=tags.update)
    assert rounds.pin_opponents(first, Pipeline(), "demo")["champion"]["key"] == "old"
    monkeypatch.setattr(rounds, "find_opponents", lambda *_: {"champion": {"stage": "ppo", "key": "new"}})
    retried: Any = SimpleNamespace(known=tags, tracker=None, set_tags=tags.update)
    assert rounds.pin_opponents(retried, Pipeline(), "demo") == {"champion": ["ppo", "old"]}


@pytest.mark.parametrize(
    ("deployed", "promote", "best", "started"),
    [
        ("demo", True, 1, ["run1"]),
        ("", True, 1, []),  # of a command, which prints what to do by hand
        ("demo", False, 1, []),
        ("demo", True, None, []),
    ],
)
def test_a_deployed_flow_starts_the_promotion_of_the_best_round(
    deployed: str, promote: bool, best: int | None, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(rounds, "deployment", SimpleNamespace(name=deployed))
    monkeypatch.setattr(rounds, "start_promotion", lambda *_, run: found.append(run))
    config = Pipeline.model_validate({"rounds": {"promote": promote}})
    one = None if best is None else Round(best, None, None, None, None, f"run{best}", {})
    rounds.promote_best(config, "demo", one)
    assert found == started


def _steps_of(home: Path, stage: str) -> str:
    """Return the steps that the stage's program has taken so far, "" before its first."""
    for path in home.glob("partial/*/job.json"):
        taken = path.with_name("taken.txt")
        if f'"{stage}"' in path.read_text() and taken.exists():
            return taken.read_text()
    return ""


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("rounds.labels={kind: file, path: gone.jsonl}", "rounds.labels.path: there is no file gone.jsonl"),
        ("method=dpo", "rounds train the policy with PPO: set method to ppo"),
        ("rounds.count=0", "rounds.count must be greater than or equal to 1, got 0"),
    ],
)
def test_what_rounds_cannot_do_is_one_sentence_and_nothing_is_written(
    setting: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    assert cli.main(["rounds", "demo", "--set", setting]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"alignflow: {sentence}")
    assert list(tmp_path.iterdir()) == []
