"""Test which policy a name means, and that its files come from the store or from MLflow."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts.store import Store, home
from tasks.config.sections.gates import Promotion
from tasks.promotion import finished_policies, promotion
from tasks.promotion.finished_policies import Source, adapter_files, content_of, find_sources, policy_files
from tasks.promotion.finished_runs import find_run
from tasks.system.errors import InputError
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import MadeRun, make_run

TEXT = {"template": "human-assistant", "max_answer_tokens": 99, "max_prompt_tokens": 50}
Write = Callable[[str, Path], dict[str, Any]]


def write_artifact(stage: str, folder: Path) -> dict[str, Any]:
    """Write the files that a stage's artifact has; return the settings of its job."""
    weights = {"pretrain": "model", "merge": "model", "sft": "adapter", "ppo": "adapter", "dpo": "model"}
    shutil.rmtree(folder / "adapter")
    if stage in weights:
        (folder / weights[stage]).mkdir()
        (folder / weights[stage] / "config.json").write_text(f'{{"stage": "{stage}"}}')
    job: dict[str, Any] = {"text": TEXT, "weights": {"base": "bfloat16", "merged": "nf4"}}
    return job | ({"winrate": {"temperature": 0.9}} if stage == "answers" else {})


@pytest.fixture
def made(tracker: Tracker) -> MadeRun:
    """Make a run of both policies, and a newer one of PPO alone."""
    older = make_run(tracker, 1, policies=("ppo", "dpo"), write=write_artifact)
    make_run(tracker, 2, write=write_artifact)
    return older


def find(tracker: Tracker, *names: str) -> list[Source | Path]:
    return find_sources(names, lambda: tracker, find_run)


def test_a_policy_of_the_newest_run_and_of_another(tracker: Tracker, made: MadeRun) -> None:
    newest, *others = find(tracker, "ppo", f"{made.run_id}:ppo", f"{made.name}:dpo", "flow-1:base")
    assert isinstance(newest, Source)
    assert (newest.policy, newest.about) == ("ppo", "ppo of the run demo 2")
    older = [one for one in others if isinstance(one, Source)]
    assert [one.policy for one in older] == ["ppo", "dpo", "base"]
    assert {one.stages["sft"][0] for one in older} == {made.manifests["sft"]["key"]}
    assert newest.stages["sft"][0] != made.manifests["sft"]["key"]
    assert finished_policies.trained_names(find_run(tracker)) == ["sft", "ppo"]
    with pytest.raises(InputError, match="The run has trained no dpo; it has base, sft, ppo"):
        find(tracker, "dpo")


def test_what_a_policy_consists_of(tracker: Tracker, made: MadeRun) -> None:
    files = {}
    for name in ("base", "sft", "ppo", "dpo"):
        [source] = find(tracker, f"{made.run_id}:{name}")
        assert isinstance(source, Source)
        files[name] = policy_files(tracker, source)
    built = {stage: Store(home()).entry(stage, one["key"]) for stage, one in made.manifests.items()}
    places = {name: (one.folder, one.tuned, one.precision) for name, one in files.items()}
    assert places == {
        "base": (str(built["pretrain"] / "model"), "", "bfloat16"),
        "sft": (str(built["merge"] / "model"), "", "nf4"),
        "ppo": (str(built["merge"] / "model"), str(built["ppo"]), "nf4"),
        "dpo": (str(built["dpo"] / "model"), "", None),  # all its weights were trained
    }
    one = files["ppo"]
    assert (one.template, one.temperature, one.max_answer_tokens) == ("human-assistant", 0.9, 99)


def test_adapters_and_their_bases(tracker: Tracker, made: MadeRun, tmp_path: Path) -> None:
    sources = [one for one in find(tracker, "sft", "ppo", f"{made.run_id}:dpo") if isinstance(one, Source)]
    sft, ppo, dpo = sources
    assert adapter_files(tracker, ppo)[0].name == ppo.stages["ppo"][0]
    assert ppo.stages["merge"][0] in adapter_files(tracker, ppo)[1]
    assert sft.stages["pretrain"][0] in adapter_files(tracker, sft)[1]
    given = sft._replace(settings={"base": {"kind": "hugging-face", "path": "org/model"}})
    assert adapter_files(tracker, given)[1] == "org/model"
    with pytest.raises(InputError, match="dpo is no adapter in PEFT's format"):
        adapter_files(tracker, dpo)
    assert finished_policies.fetch_card(tracker, ppo, tmp_path) is None
    (tmp_path / "model-cards" / "ppo").mkdir(parents=True)
    (tmp_path / "model-cards" / "ppo" / "README.md").write_text("# Card\n")
    tracker.upload(ppo.run_id, tmp_path / "model-cards", "model-cards")
    (tmp_path / "got").mkdir()
    card = finished_policies.fetch_card(tracker, ppo, tmp_path / "got")
    assert card is not None
    assert card.read_text() == "# Card\n"
    text = finished_policies.text_settings(tracker, ppo)
    assert text.template == "human-assistant"
    assert finished_policies.find_data(tracker, ppo)["key"] == ppo.stages["data"][0]


def test_a_registered_version_outlives_its_run(tracker: Tracker, made: MadeRun) -> None:
    settings = Promotion(policy="ppo")
    proposal = promotion.propose(tracker, settings, find_run(tracker, made.run_id))
    registry.make_champion(tracker, proposal.version, expected="", by="test", note="")
    tracker.call(lambda client: client.delete_run(made.run_id))
    names = ("champion", "rlhf-policy-demo@champion", "rlhf-policy-demo/1")
    found = [one for one in find(tracker, *names) if isinstance(one, Source)]
    assert [one.name for one in found] == [*names]
    assert {one.about for one in found} == {"ppo, rlhf-policy-demo version 1"}
    for one in found:
        files = policy_files(tracker, one)
        assert Path(files.tuned).name == made.manifests["ppo"]["key"]
        assert files.temperature == 0.9
    with pytest.raises(InputError, match="There is no model version rlhf-policy-demo 7; `alignflow models`"):
        find(tracker, "rlhf-policy-demo/7")
    with pytest.raises(InputError, match="No model has a challenger: `alignflow models`"):
        find(tracker, "challenger")


def test_files_that_are_gone_come_from_mlflow(tracker: Tracker, made: MadeRun) -> None:
    [source] = find(tracker, f"{made.run_id}:ppo")
    assert isinstance(source, Source)
    shutil.rmtree(home() / "objects")
    files = policy_files(tracker, source)
    assert "fetched" in Path(files.tuned).parts
    config = Path(files.folder, "config.json")
    assert json.loads(config.read_text()) == {"stage": "merge"}
    lost = source._replace(stages=source.stages | {"ppo": ("0" * 64, "1" * 64)})
    with pytest.raises(InputError, match="the artifact ppo 000000000000 is neither on this machine nor in"):
        policy_files(tracker, lost)


def test_names_that_mean_nothing(tracker: Tracker) -> None:
    with pytest.raises(InputError, match="There is no model 'ppp': name a policy of the newest run"):
        find(tracker, "ppp")
    with pytest.raises(InputError, match="There is no finished run"):
        find(tracker, "ppo")


def test_a_folder_needs_no_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> Tracker:
        raise AssertionError("not needed")

    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(InputError, match=r"MODEL: the model folder .* has no config.json"):
        find_sources([str(folder)], connect, find_run)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    found = find_sources(["model", "./model", str(folder)], connect, find_run)
    assert found == [folder] * 3
    plain = finished_policies.folder_files(folder)
    assert (plain.name, plain.template, plain.temperature) == ("model", None, 0.7)
    (folder / "generation_config.json").write_text('{"temperature": 0.2, "max_new_tokens": 7}')
    named = finished_policies.folder_files(folder)
    assert (named.temperature, named.max_answer_tokens) == (0.2, 7)


def test_equal_policies_are_exported_once(tracker: Tracker, made: MadeRun) -> None:
    names = ("ppo", f"{made.run_id}:ppo", f"{made.run_id}:dpo", f"{made.run_id}:sft", f"{made.run_id}:base")
    digests = [content_of(one) for one in find(tracker, *names)]
    assert len(set(digests)) == 4
    assert digests[0] == digests[1]  # this test's runs have trained the same weights
    assert digests == [content_of(one) for one in find(tracker, *names)]
