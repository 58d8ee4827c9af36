"""Test deployments/prefect.yaml and what is added to it: names, entry points, parameters, schedules,
automations.
"""

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.sandbox import SandboxedEnvironment
from prefect.flows import Flow

from flows.commands import deploy
from flows.profiles import load
from flows.services import automations
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError
from tests.support.paths import ROOT

CONTENT = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
DEPLOYMENTS = CONTENT["deployments"]


def named(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{one['entrypoint'].rpartition('.')[2]}/{one['name']}": one for one in content["deployments"]}


def test_workers_fetch_no_code_and_know_no_path_of_the_machine_that_deployed() -> None:
    assert CONTENT["pull"] == []


@pytest.mark.parametrize("name", named(CONTENT))
def test_every_entry_point_is_a_flow_of_the_name_and_every_pool_exists(name: str) -> None:
    one = named(CONTENT)[name]
    module, _, function = one["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), function)
    assert isinstance(flow, Flow)
    assert flow.name == name.partition("/")[0]
    assert one["work_pool"]["name"] in deploy.POOLS


def test_the_house_has_a_chain_per_profile_a_stage_per_pool_and_retraining() -> None:
    assert set(named(CONTENT)) == {
        "rlhf/demo",
        "rlhf/travel-tiny",
        "rlhf/dpo",
        "retrain/demo",
        "rounds/demo",
        "promote/demo",
        "stage/cpu",
        "stage/gpu",
    }


def test_retraining_is_off_until_switched_on_and_one_at_a_time() -> None:
    one = named(CONTENT)["retrain/demo"]
    assert [schedule["active"] for schedule in one["schedules"]] == [False]
    assert one["concurrency_limit"]["limit"] == 1


@pytest.mark.parametrize(
    "one",
    [one for one in DEPLOYMENTS if "build" in one],
    ids=lambda one: one["entrypoint"] + "/" + one["name"],
)
def test_a_forms_values_are_the_whole_profile_with_its_gpu_stages_on_the_gpu_pool(
    one: dict[str, Any],
) -> None:
    (build,) = one["build"]
    settings = {name: value for name, value in build["flows.commands.deploy.profile"].items() if name != "id"}
    found = deploy.profile(**settings)
    config = Pipeline.model_validate(found["config"])
    assert config.pools.gpu == "gpu"
    assert found["config"].keys() == Pipeline.model_fields.keys()
    assert config.method == ("dpo" if one["name"] == "dpo" else "both")
    section = "promotion" if one["entrypoint"] == "flows.promote.promote" else "config"
    assert one["parameters"] == {section: f"{{{{ chosen.{section} }}}}", "profile": "{{ chosen.title }}"}
    assert found["promotion"] == found["config"]["promotion"]


def test_a_profiles_own_pools_and_paths_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Posts.xml").write_text("<posts/>")
    (tmp_path / "mine.yaml").write_text(
        "pools: {gpu: big}\nsource: {kind: stack-exchange, path: Posts.xml}\n"
    )
    found = deploy.profile("mine.yaml", gpu="gpu")
    assert found["config"]["pools"]["gpu"] == "big"
    assert found["config"]["source"]["path"] == str(tmp_path / "Posts.xml")  # a worker runs in another folder
    assert found["title"] == "mine"


def test_a_further_profile_gets_a_chain_and_retraining_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\n")
    found = named(deploy._with_profiles(deploy._read_definition(), [str(file)]))
    added = {"rlhf/mine", "retrain/mine", "rounds/mine", "promote/mine"}
    assert set(found) - set(named(CONTENT)) == added
    for name in added:
        assert found[name]["build"][0]["flows.commands.deploy.profile"]["name"] == str(file)
        assert found[name]["tags"] == ["pipeline"]
    names = [trigger["name"] for one in found.values() for trigger in one.get("triggers", [])]
    assert len(names) == len(set(names)) == 2
    assert found["retrain/mine"]["triggers"][0]["match"] == {"prefect.resource.id": "alignflow.data.mine"}
    assert found["retrain/demo"]["triggers"][0]["match"] == {"prefect.resource.id": "alignflow.data.demo"}
    assert load(str(file), []).seed == 3


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [("demo", "", "built-in deployment demo"), ("bad", "sft: {ranks: 3}", "no setting sft.ranks")],
)
def test_a_profile_that_cannot_be_deployed_is_refused_before_anything_is_made(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=sentence):
        deploy._with_profiles(deploy._read_definition(), [str(file)])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a working folder without the files that a built-in profile names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_deployment_that_could_never_run_is_left_out_with_the_reason(elsewhere: Path) -> None:
    found = deploy.define([])
    assert set(found.names) == {*named(CONTENT)} - {"rlhf/travel-tiny"}
    assert list(found.left_out) == ["rlhf/travel-tiny"]
    assert (
        "no ../shared/data/stackexchange/travel/Posts.csv.gz here, and workers run in other folders"
        in found.left_out["rlhf/travel-tiny"]
    )


def test_a_deployment_whose_files_are_here_has_their_absolute_paths(elsewhere: Path) -> None:
    work = elsewhere / "work"
    for name in (
        "shared/data/stackexchange/travel/Posts.csv.gz",
        "shared/models/stories260k-hf/config.json",
        "work/x",
    ):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text("")
    with contextlib.chdir(work):
        found = deploy.define([])
    assert not found.left_out
    step = named(found.content)["rlhf/travel-tiny"]["build"][0]["flows.commands.deploy.profile"]
    config = deploy.profile(**{name: value for name, value in step.items() if name != "id"})[
        "config"
    ]  # as Prefect does, in another folder
    assert config["source"]["path"] == str(elsewhere / "shared/data/stackexchange/travel/Posts.csv.gz")
    assert config["base"]["path"] == str(elsewhere / "shared/models/stories260k-hf")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "source: {kind: own, path: ./rows.jsonl}",
            "source.path: there is no ./rows.jsonl here, and workers run in other folders",
        ),
        (
            "data: {decontaminate_against: [x/y/z]}",
            "data.decontaminate_against x/y/z: there is no x/y/z here",
        ),
        (
            "machine: {launch: {ppo: {accelerate_config: a.yaml}}}",
            "machine.launch.ppo.accelerate_config: there is no a.yaml here",
        ),
        ("sft: {start: old}", "sft.start: there is no old here"),
        ("base: {kind: hugging-face, path: ../m}", "base.path: there is no ../m here"),
    ],
)
def test_a_profile_that_could_never_run_is_refused(elsewhere: Path, text: str, sentence: str) -> None:
    (elsewhere / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=f"The profile mine cannot be deployed: {sentence}"):
        deploy.define(["mine.yaml"])


def test_a_profile_with_hub_ids_or_files_of_another_machine_is_deployed(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text(
        "source: {kind: hh-rlhf}\nbase: {kind: hugging-face, path: /inputs/model}\n"
    )
    assert {"rlhf/mine", "retrain/mine"} <= set(deploy.define(["mine.yaml", "instructgpt"]).names)


def test_a_pool_of_a_profiles_own_gets_a_deployment_of_stages(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("pools: {gpu: big, cpu: small}\n")
    found = deploy.define(["mine.yaml"])
    assert {"stage/big", "stage/small"} <= set(found.names)
    assert found.pools == {"cpu": 4, "gpu": None, "small": 4, "big": None}
    assert named(found.content)["stage/big"]["work_pool"] == {"name": "big"}


@pytest.mark.parametrize("names", [["demo"], ["demo", "demo"], ["travel-tiny"]])
def test_a_built_in_profile_that_is_deployed_anyway_may_be_named(names: list[str]) -> None:
    if names == ["travel-tiny"] and not Path("../shared/models/stories260k-hf").exists():
        pytest.skip("travel-tiny's files (../shared) are not here")
    assert set(deploy.define(names).names) >= {"rlhf/demo"}


@pytest.mark.parametrize(("first", "second"), [("a/mine.yaml", "b/mine.yaml"), ("a/x&y.yaml", "")])
def test_names_that_cannot_be_deployments_are_refused(elsewhere: Path, first: str, second: str) -> None:
    for name in filter(None, (first, second)):
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_text("seed: 3")
    with pytest.raises(
        InputError,
        match=r"Two profiles are called mine|cannot be called x&y: give the profile a name without &",
    ):
        deploy.define([name for name in (first, second) if name])
    (elsewhere / "a.yaml").write_text("seed: 3")
    assert deploy.define(["a.yaml", "./a.yaml"]).names.count("rlhf/a") == 1  # the same file


def test_an_alert_is_json_whatever_the_message_holds() -> None:
    class Run:
        name, state = (
            "demo",
            type(
                "State", (), {"name": "Failed", "message": 'The stage "ppo" failed:\nkilled {{ 1 + 1 }} \\ '}
            ),
        )

    templates = SandboxedEnvironment()
    templates.filters["ui_url"] = lambda run: "http://127.0.0.1/runs/1"
    text = templates.from_string(automations.PAYLOAD).render(
        flow=type("Flow", (), {"name": "rlhf"}), flow_run=Run
    )
    assert json.loads(text)["text"] == f"rlhf/demo Failed: {Run.state.message} http://127.0.0.1/runs/1"


def test_a_machine_counts_as_lost_after_three_heartbeats() -> None:
    lost = automations._lost()
    assert lost.trigger.within.total_seconds() == 3 * 30
    assert [str(action.state.value) for action in lost.actions] == ["CRASHED"]


@pytest.mark.parametrize("section", ["source", "base"])
def test_forms_offer_the_kinds_of_a_section(section: str) -> None:
    """Prefect's forms draw anyOf as a choice, and oneOf as a text of JSON."""
    schema = Pipeline.model_json_schema()
    offered = [
        schema["$defs"][one["$ref"].rpartition("/")[2]] for one in schema["properties"][section]["anyOf"]
    ]
    assert "oneOf" not in schema["properties"][section]
    assert [one["title"] for one in offered] == [one["properties"]["kind"]["default"] for one in offered]
