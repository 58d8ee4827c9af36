"""Test what a judge needs of the environment: checked before a run, and given to its program alone."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.commands import plan
from flows.preflight import check_environment, check_inputs
from tasks.artifacts import judge_model
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.judge_model import judge_inputs
from tasks.config.jobs import PpoJob, SftJob, WinrateJob
from tasks.config.machine import Machine, Pools
from tasks.config.pipeline import Pipeline
from tasks.config.sections.judges import EndpointJudge, LocalJudge, NoJudge
from tasks.config.sections.ppo import IndependentScore, Ppo
from tasks.execution import program_environment, program_forks
from tasks.execution.launch import run_program
from tasks.stages.ppo import ppo
from tasks.system.errors import InputError
from tests.support import fake_programs, tiny

ENDPOINT = EndpointJudge(model="judge-1", prompt_price=1, reply_price=2)
URL, KEY = "https://endpoint.example/v1", "sk-secret-0123456789"
JUDGED = Ppo(score=IndependentScore(by="judge"))
SECRETS = {"ALIGNFLOW_JUDGE_URL": URL, "ALIGNFLOW_JUDGE_KEY": KEY}
OTHERS = {
    "OPENAI_API_KEY": "o",
    "OPENAI_BASE_URL": "https://me:pw@h/",
    "HF_TOKEN": "h",
    "MLFLOW_TRACKING_URI": "m",
}

DUMP = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "environment.json").write_text(json.dumps(dict(os.environ)))
(folder / "done").write_text("")
"""


@pytest.fixture(params=["forked", "spawned"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if request.param == "forked" and sys.platform != "linux":
        pytest.skip("the fork server is for Linux")
    made = fake_programs.make_tree(tmp_path / "tree")
    for stage in ("sft", "winrate", "ppo"):
        (made / "tasks" / "programs" / f"{stage}.py").write_text(DUMP)
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(
        program_environment, "GPU_DEVICES", () if request.param == "forked" else ("/dev/null",)
    )
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    for name, value in (SECRETS | OTHERS).items():
        monkeypatch.setenv(name, value)
    yield made
    program_forks.stop()


def environment_of(stage: str, judge: Any, folder: Path, settings: Ppo | None = None) -> dict[str, str]:
    """Return the environment that the stage's program has, run with this judge."""
    job_type = {"sft": SftJob, "winrate": WinrateJob, "ppo": PpoJob}[stage]
    job = job_type.of(Pipeline(judge=judge, ppo=settings or Ppo())).model_dump(mode="json")
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"stage": stage, "job": job, "inputs": {}, "machine": {}}))
    assert KEY not in (folder / "job.json").read_text()
    run_program(stage, folder, Machine())
    found: dict[str, str] = json.loads((folder / "environment.json").read_text())
    return found


def test_only_the_program_of_an_endpoint_judge_has_its_address_and_key(tree: Path, tmp_path: Path) -> None:
    judged = environment_of("winrate", ENDPOINT, tmp_path / "judged")
    assert {name: judged[name] for name in SECRETS} == SECRETS
    assert judged["ALIGNFLOW_HOME"] == str(tmp_path / "home")
    assert not OTHERS.keys() & judged.keys()
    for number, (stage, judge) in enumerate([("winrate", NoJudge()), ("sft", ENDPOINT), ("ppo", ENDPOINT)]):
        found = environment_of(stage, judge, tmp_path / str(number))
        assert not (SECRETS | OTHERS).keys() & found.keys()
        assert not {URL, KEY} & set(found.values())


def test_ppo_has_them_if_the_judge_scores_its_policy(tree: Path, tmp_path: Path) -> None:
    found = environment_of("ppo", ENDPOINT, tmp_path / "scored", JUDGED)
    assert {name: found[name] for name in SECRETS} == SECRETS
    assert found["ALIGNFLOW_HOME"] == str(tmp_path / "home")


def test_each_of_several_processes_has_them(tree: Path, tmp_path: Path) -> None:
    job = PpoJob.of(Pipeline(judge=ENDPOINT, ppo=JUDGED)).model_dump(mode="json")
    (tmp_path / "job.json").write_text(json.dumps({"stage": "ppo", "job": job, "inputs": {}, "machine": {}}))
    machine = Machine.model_validate({"launch": {"ppo": {"processes": 2}}})
    run_program("ppo", tmp_path, machine)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert {name: found[name] for name in SECRETS} == SECRETS


def test_before_a_run_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Pipeline(judge=ENDPOINT)
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"^judge\.kind=endpoint: ALIGNFLOW_JUDGE_URL is not set"):
        check_environment(config, "demo")
    monkeypatch.setenv("ALIGNFLOW_JUDGE_URL", "endpoint.example/v1")
    with pytest.raises(InputError, match=r"^judge\.kind=endpoint: ALIGNFLOW_JUDGE_URL is no address"):
        check_environment(config, "demo")
    monkeypatch.setenv("ALIGNFLOW_JUDGE_URL", URL)
    with pytest.raises(InputError, match=r"^judge\.kind=endpoint: ALIGNFLOW_JUDGE_KEY is not set"):
        check_environment(config, "demo")
    monkeypatch.setenv("ALIGNFLOW_JUDGE_KEY", KEY)
    check_environment(config, "demo")


def test_the_variables_are_not_needed_where_the_judge_does_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    check_environment(Pipeline(judge=ENDPOINT, pools=Pools(gpu="gpu")), "demo")
    with pytest.raises(InputError):
        check_environment(Pipeline(judge=ENDPOINT, pools=Pools(cpu="cpu")), "demo")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    settings = ["judge.kind=endpoint", "judge.model=m", "judge.prompt_price=0", "judge.reply_price=0"]
    plan.main(Namespace(profile="demo", set=settings, rounds=False))
    assert "winrate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "is_refused"),
    [({"winrate", "ppo"}, False), ({"winrate"}, True), ({"ppo"}, True), (None, True)],
)
def test_the_variables_are_not_needed_for_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: set[str] | None, is_refused: bool
) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    if stored is not None:
        (tmp_path / "objects").mkdir()
    found = [
        plan.Planned(stage, "", "reuse" if stage in (stored or ()) else "build", [])
        for stage in ("sft", "ppo", "winrate")
    ]
    monkeypatch.setattr(plan, "plan", lambda config, profile: found)
    config = Pipeline(judge=ENDPOINT, ppo=JUDGED)
    with pytest.raises(InputError) if is_refused else nullcontext():
        check_environment(config, "demo")
    if stored == {"winrate"}:
        check_environment(Pipeline(judge=ENDPOINT), "demo")


@pytest.mark.parametrize(
    ("missing", "labels", "is_refused"),
    [
        ("winrate", {"kind": "gold"}, True),
        ("comparisons", {"kind": "judge"}, True),
        ("comparisons", {"kind": "judge", "by": "held_out"}, False),
        ("comparisons", {"kind": "gold"}, False),
        ("ppo", {"kind": "gold"}, False),
    ],
)
def test_rounds_need_the_variables_for_what_a_round_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, labels: dict[str, str], is_refused: bool
) -> None:
    """The chain of round 0 is stored; a run of it alone needs none."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    (tmp_path / "objects").mkdir()
    chain = [plan.Planned(stage, "", "reuse", []) for stage in ("ppo", "winrate")]
    of_round = [
        plan.Planned(stage, "", "build" if stage == missing else "reuse", [], 1)
        for stage in ("comparisons", "ppo", "winrate")
    ]
    monkeypatch.setattr(plan, "plan", lambda config, profile: chain)
    monkeypatch.setattr(plan, "plan_rounds", lambda config, profile: ([*chain, *of_round], ""))
    config = Pipeline.model_validate({"judge": ENDPOINT, "rounds": {"labels": labels}})
    check_environment(config, "demo")
    with pytest.raises(InputError) if is_refused else nullcontext():
        check_environment(config, "demo", rounds=True)


def test_before_a_run_model_and_prompt_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"judge\.path: there is no model folder"):
        check_inputs(Pipeline(judge=LocalJudge(path=str(tmp_path / "none"))))
    folder = tiny.base_folder(tmp_path / "model")
    check_inputs(Pipeline(judge=LocalJudge(path=str(folder))))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError):
        check_inputs(Pipeline(judge=LocalJudge(path=str(folder))))
    own = tmp_path / "own.txt"
    own.write_text("{question} {first}")
    with pytest.raises(InputError, match=r"has no \{second\}"):
        judge_inputs(ENDPOINT.model_copy(update={"prompt": str(own)}))


def test_a_prompt_that_asks_for_sentences_cannot_be_answered_by_a_label() -> None:
    with pytest.raises(ValidationError, match=r"set judge\.answer_by to text"):
        LocalJudge(path="m", prompt="rubric")
    LocalJudge(path="m", prompt="rubric", answer_by="text")


def key_of(tmp_path: Path, judge: Any) -> Any:
    """Return what the key of the winrate stage depends on."""
    inputs = {name: found["digest"] for name, found in judge_inputs(judge).items()}  # of the content
    return WinrateJob.of(Pipeline(judge=judge)).key_settings(), inputs


def test_the_key_has_what_can_change_a_verdict_and_no_more(tmp_path: Path) -> None:
    usual = key_of(tmp_path, ENDPOINT)
    for name, value in {
        "requests_per_minute": 7, "concurrency": 2, "timeout": 3.0, "patience": 4.0, "max_cost": 9.0,
        "prompt_price": 3.0, "reply_price": 3.0,
    }.items():  # fmt: skip
        assert key_of(tmp_path, ENDPOINT.model_copy(update={name: value})) == usual
    for name, value in {
        "model": "m", "temperature": 1.0, "max_reply_tokens": 7, "prompt": "rubric",
    }.items():  # fmt: skip
        assert key_of(tmp_path, ENDPOINT.model_copy(update={name: value})) != usual
    assert key_of(tmp_path, ENDPOINT.model_copy(update={"temperature": None})) != usual


@pytest.mark.parametrize("judge", [ENDPOINT, LocalJudge(path="m")], ids=["endpoint", "local"])
def test_a_prompt_of_ones_own_is_known_by_its_content_not_its_path(
    tmp_path: Path, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_model, "_model_input", lambda _: {})
    places = [tmp_path / "one.txt", tmp_path / "two.txt"]
    one, two = (judge.model_copy(update={"prompt": str(place)}) for place in places)
    for place in places:
        place.write_text("{question} {first} {second}")
    assert key_of(tmp_path, one) == key_of(tmp_path, two)
    places[1].write_text("{question} {first} {second}?")
    assert key_of(tmp_path, one) != key_of(tmp_path, two)


def ppo_key_of(config: Pipeline) -> Any:
    """Return what the key of the stage ppo depends on, but for the artifacts of other stages."""
    built = Artifact(
        stage="data", key="", digest="", path="", files={}, seconds=0.0, peak_mb=0.0, cached=True, metrics={},
        warnings=[],
    )  # fmt: skip
    step = ppo.step(config, data=built, model=built, reward=built)
    return step.job.key_settings(), {name: found["digest"] for name, found in step.inputs.items()}


def test_the_judge_is_in_the_key_of_ppo_only_if_it_scores_its_policy() -> None:
    plain = ppo_key_of(Pipeline())
    assert ppo_key_of(Pipeline(judge=ENDPOINT)) == plain
    usual = ppo_key_of(Pipeline(judge=ENDPOINT, ppo=JUDGED))
    assert set(usual[1]) == {*plain[1], "prompt"}
    for name, value in {
        "max_cost": 9.0,
        "prompt_price": 3.0,
        "num_questions": 7,
        "num_graded_pairs": 7,
    }.items():
        assert ppo_key_of(Pipeline(judge=ENDPOINT.model_copy(update={name: value}), ppo=JUDGED)) == usual
    for name, value in {"model": "m", "temperature": 1.0, "prompt": "rubric"}.items():
        assert ppo_key_of(Pipeline(judge=ENDPOINT.model_copy(update={name: value}), ppo=JUDGED)) != usual


def test_a_pipeline_without_a_judge_cannot_score_by_one() -> None:
    with pytest.raises(ValidationError, match=r"ppo\.score\.by=judge needs a language model that judges"):
        Pipeline(ppo=JUDGED)
    assert Pipeline(ppo=JUDGED, method="dpo")
