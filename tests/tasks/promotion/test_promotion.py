"""Test registering, promoting, rolling back and tracing over MLflow's SQLite database."""

import json
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flows.commands.gc import clean
from tasks.artifacts.store import Store
from tasks.config.sections.gates import Promotion
from tasks.promotion import lineage, posts, promotion
from tasks.promotion.finished_runs import find_run
from tasks.promotion.promotion import Ending
from tasks.system.errors import InputError
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import GOOD, MadeRun, interval, make_run

MODEL = Promotion().model_name("demo")
DAY = 86_400.0


def promote(tracker: Tracker, made: MadeRun | None, **settings: Any) -> Ending:
    """Promote a run as `alignflow promote --yes` does."""
    chosen = Promotion(**settings)
    run = find_run(tracker, made.run_id if made else "")
    proposal = promotion.propose(tracker, chosen, run)
    ending = promotion.challenge(tracker, proposal)
    if ending.outcome == "Challenger":
        ending = promotion.promote(tracker, proposal, by="anna", note="looks good")
    return ending


def champion(tracker: Tracker) -> registry.ModelVersion | None:
    return registry.find_version(tracker, MODEL, registry.CHAMPION)


def test_a_version_says_what_it_is_and_what_it_was_made_from(tracker: Tracker, tmp_path: Path) -> None:
    made = make_run(tracker, 1)
    ending = promote(tracker, made)
    assert ending.outcome == "Promoted"
    version = champion(tracker)
    assert version is not None
    manifests = made.manifests
    expected = {
        "stage.key": manifests["ppo"]["key"],
        "policy": "ppo",
        "run": made.run_id,
        "prefect.flow_run_id": "flow-1",
        "alignflow.profile": "demo",
        "licence": "CC BY-SA 4.0",
        "seed": "1",
        "raw.source": manifests["site"]["digest"],
        "gate.kl": "passed: PPO is up to 1.60 nats per answer away from SFT.",
        "gate.data_days": "off",
        "decision.made": "promoted",
        "decision.by": "anna",
        "decision.note": "looks good",
    }
    assert {name: version.tags.get(name) for name in expected} == expected
    for tag, fact in (("stage.keys", "key"), ("stage.digests", "digest")):
        found = json.loads(version.tags[tag])
        assert found == {name: manifest[fact] for name, manifest in manifests.items()}  # type: ignore[literal-required]
    assert version.run_id == made.run_id
    described = tracker.call(lambda client: client.get_model_version(MODEL, version.version)).description
    assert described.startswith(f"Promoted: {ending.sentence}\n\n| gate | verdict |")
    for name in ("version", "policy"):
        (tmp_path / name).mkdir()
    place = mlflow.artifacts.download_artifacts(
        f"models:/{MODEL}@champion", dst_path=str(tmp_path / "version"), tracking_uri=tracker.uri
    )
    content = json.loads(Path(place, "model.json").read_text())
    assert content["artifacts"]["policy"]["key"] == manifests["ppo"]["key"]
    assert [path.name for path in Path(place).iterdir()] == ["model.json"]  # the files are not copied
    policy = mlflow.artifacts.download_artifacts(
        content["artifacts"]["policy"]["files"], dst_path=str(tmp_path / "policy"), tracking_uri=tracker.uri
    )
    assert Path(policy, "adapter", "adapter_model.safetensors").read_text() == "ppo 1"
    run = tracker.run(made.run_id)
    assert run is not None
    assert run.tags[promotion.OUTCOME] == f"Promoted: {ending.sentence}"


def test_a_policy_is_registered_once(tracker: Tracker) -> None:
    made = make_run(tracker, 1, GOOD | {"ppo.kl": 30.0})
    assert promote(tracker, made, gates={"alignment_tax": 2.0}).outcome == "Refused"
    (version,) = registry.list_versions(tracker)
    assert version.tags["gate.alignment_tax.arc"].startswith("passed")
    assert version.tags["gate.kl"].startswith("failed")
    assert promote(tracker, made, gates={"kl": None}).outcome == "Promoted"
    (version,) = registry.list_versions(tracker)
    assert (version.tags["gate.kl"], version.tags["gate.alignment_tax.arc"]) == ("off", "off")


def test_the_champion_is_left_as_it_is(tracker: Tracker) -> None:
    made = make_run(tracker, 1)
    assert promote(tracker, made).outcome == "Promoted"
    before = champion(tracker)
    assert promote(tracker, made, gates={"kl": 0.1}).outcome == "Unchanged"
    assert champion(tracker) == before
    assert len(registry.list_versions(tracker)) == 1


@pytest.mark.parametrize("name", ["", "flow-2", "demo 2"])
def test_a_run_is_found_by_id_name_or_as_the_newest(tracker: Tracker, name: str) -> None:
    make_run(tracker, 1)
    made = make_run(tracker, 2)
    assert find_run(tracker, name).run_id == made.run_id


@pytest.mark.parametrize(
    ("name", "profile", "sentence"),
    [
        ("", "other", "no finished run of the profile other"),
        ("nothing", "", "There is no run nothing in MLflow"),
        ("flow-9", "", "The run flow-9 was not tracked in MLflow"),
        ("a'b", "", "it has a quotation mark"),
    ],
)
def test_a_run_that_is_not_there_is_named(
    home: Path, tracker: Tracker, name: str, profile: str, sentence: str
) -> None:
    make_run(tracker, 1)
    (home / "runs" / "flow-9").mkdir()
    (home / "runs" / "flow-9" / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=sentence):
        find_run(tracker, name, profile=profile)


def test_a_policy_that_was_not_trained_cannot_be_promoted(tracker: Tracker) -> None:
    with pytest.raises(InputError, match="has trained no dpo"):
        promote(tracker, make_run(tracker, 1), policy="dpo")


def test_a_second_champion_keeps_the_first_and_the_way_back(tracker: Tracker) -> None:
    for seed in (1, 2, 3):
        assert promote(tracker, make_run(tracker, seed)).outcome == "Promoted"
    assert champion(tracker).tags[registry.PREVIOUS] == "2"  # type: ignore[union-attr]
    for expected in ("2", "1"):
        left, restored = registry.roll_back(tracker, MODEL, "", by="anna")
        assert restored.version == expected
        assert champion(tracker).version == expected  # type: ignore[union-attr]
        tags = registry.find_version(tracker, MODEL, left.version).tags  # type: ignore[union-attr]
        assert (tags["rolled_back.to"], tags["rolled_back.by"]) == (expected, "anna")
    with pytest.raises(InputError, match="is its first champion"):
        registry.roll_back(tracker, MODEL, "", by="anna")
    registry.roll_back(tracker, MODEL, "3", by="anna")
    assert champion(tracker).version == "3"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("to", "sentence"),
    [("9", "has no version 9"), ("1", "is the champion already"), ("2", "was never the champion")],
)
def test_a_way_back_that_is_none_is_refused(tracker: Tracker, to: str, sentence: str) -> None:
    promote(tracker, make_run(tracker, 1))
    promote(tracker, make_run(tracker, 2, GOOD | {"ppo.kl": 99.0}))
    with pytest.raises(InputError, match=sentence):
        registry.roll_back(tracker, MODEL, to, by="anna")
    with pytest.raises(InputError, match="The model other has no champion"):
        registry.roll_back(tracker, "other", "", by="anna")


def test_a_challenger_waits_until_someone_decides(tracker: Tracker) -> None:
    made = make_run(tracker, 1)
    proposal = promotion.propose(tracker, Promotion(), find_run(tracker, made.run_id))
    assert promotion.challenge(tracker, proposal).outcome == "Challenger"
    version = registry.find_version(tracker, MODEL, registry.CHALLENGER)
    assert version is not None
    assert version.tags[registry.DECISION] == "pending"
    ending = promotion.reject(tracker, proposal, by="anna", note="too early")
    assert ending.outcome == "Rejected"
    assert "rejected by anna: too early" in ending.sentence
    (version,) = registry.list_versions(tracker)
    assert (version.aliases, version.tags[registry.DECISION]) == ((), "rejected")


def test_a_table_shows_text_of_gates_as_text(tracker: Tracker) -> None:
    made = make_run(tracker, 1, GOOD | {"tax.<b>a|b</b>.ppo_vs_sft": interval(0.1, 0, 0.2)})
    chosen = Promotion.model_validate({"gates": {"alignment_tax": 1}})
    text = promotion.describe(promotion.propose(tracker, chosen, find_run(tracker, made.run_id)))
    assert r"alignment_tax.\<b\>a\|b\</b\>" in text
    assert "<b>" not in text
    assert r"Gates that are off: perplexity_tax, data_days" in text


# ------------------------------------------------------------------------------------------- clean-up


def test_everything_of_a_registered_version_stays(home: Path, tracker: Tracker) -> None:
    """Also in a home that lacks the policy, as that of a cpu worker, which has data alone."""
    kept, gone = make_run(tracker, 1), make_run(tracker, 2)
    promote(tracker, kept)
    store = Store(home)
    for stage in ("ppo", "reward", "merge", "sft"):
        folder = store.entry(stage, kept.manifests[stage]["key"])
        folder.rename(home / f"away-{stage}")
    clean(home, keep_runs=0, days=0, now=time.time() + 30 * DAY)
    stored = {path.name for path in home.glob("objects/*/*")}
    assert stored == {
        kept.manifests[stage]["key"] for stage in ("site", "data", "pretrain", "answers", "winrate")
    }
    assert gone.manifests["data"]["key"] not in stored


# ------------------------------------------------------------------------------------------- lineage


def test_a_version_is_traced_down_to_the_raw_data(tracker: Tracker) -> None:
    made = make_run(tracker, 7)
    promote(tracker, made)
    version = champion(tracker)
    assert version is not None
    found = lineage.trace_version(lineage.load_graph(tracker), version)
    assert found["licence"] == "CC BY-SA 4.0"
    policy = found["policy"]
    assert (policy["stage"], policy["key"], policy["seed"]) == ("ppo", made.manifests["ppo"]["key"], "7")
    assert set(policy["inputs"]) == {"data", "model", "reward"}
    source = policy["inputs"]["data"]["inputs"]["source"]
    assert source["digest"] == made.manifests["site"]["digest"]
    assert policy["inputs"]["reward"]["inputs"]["data"]["repeated"]


def test_lineage_is_the_same_from_mlflow_alone(
    home: Path, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tracker, 1)
    promote(tracker, made)
    version = champion(tracker)
    assert version is not None
    here = lineage.trace_version(lineage.load_graph(tracker), version)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "other"))
    (tmp_path / "other" / "locks").mkdir(parents=True)
    graph = lineage.load_graph(tracker)
    assert lineage.trace_version(graph, version) == here
    (found,) = posts.trace_post(tracker, graph, "21")
    assert [one["version"] for one in found["versions"]] == ["1"]


def test_data_is_traced_to_every_model_that_learnt_from_it(tracker: Tracker) -> None:
    first, second = make_run(tracker, 1), make_run(tracker, 2)
    promote(tracker, first)
    promote(tracker, second)
    graph = lineage.load_graph(tracker)
    for stage in ("data", "site"):
        for name in (first.manifests[stage]["digest"], first.manifests[stage]["key"]):
            digests = graph.find_digests(name[:10])
            found = lineage.find_learners(tracker, graph, digests)
            assert [(one["model"], one["version"]) for one in found["versions"]] == [(MODEL, "1")]
            learnt = {one["stage"]: one["key"] for one in found["learnt"]}
            assert learnt == {
                name: first.manifests[name]["key"] for name in ("pretrain", "sft", "merge", "reward", "ppo")
            }
            assert "winrate" in {one["stage"] for one in found["derived"]}


EVERY_MODEL = {"pretrain", "sft", "merge", "reward", "ppo", "dpo"}
TRACES = {  # tables that have a post, and stages that have learnt from it
    "10": ({"finetune", "corpus"}, EVERY_MODEL),
    "12": ({"corpus"}, EVERY_MODEL),
    "22": ({"reward", "reward_groups"}, {"reward", "ppo", "dpo"}),
    "30": ({"rl"}, {"ppo"}),
    "51": ({"evaluation", "evaluation_pairs"}, set[str]()),
}


def test_a_post_is_traced_to_the_models_that_learnt_from_it(tracker: Tracker) -> None:
    promote(tracker, make_run(tracker, 1, policies=("ppo", "dpo")))
    graph = lineage.load_graph(tracker)
    for post, (tables, learnt) in TRACES.items():
        (one,) = posts.trace_post(tracker, graph, post)
        assert {place["table"] for place in one["places"]} == tables
        assert {artifact["stage"] for artifact in one["learnt"]} == learnt
        versions = ["1"] if "ppo" in learnt else []
        assert [version["version"] for version in one["versions"]] == versions
    assert posts.trace_post(tracker, graph, "5") == []  # the beginning of other ids


def test_a_post_of_rows_without_links_is_found_by_its_question(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question_id": 3, "prompt": "", "site": "own data", "question_url": ""}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rl.parquet")
    (place,) = posts.find_post(tmp_path, "3")
    assert (place.table, place.rows, place.roles) == ("rl", 1, ("question",))


def test_a_champion_that_is_refused_later_can_be_returned_to(tracker: Tracker) -> None:
    first, second = make_run(tracker, 1), make_run(tracker, 2)
    for made in (first, second):
        assert promote(tracker, made, gates={"win_rate_vs_champion": None}).outcome == "Promoted"
    assert promote(tracker, first, gates={"kl": 0.1}).outcome == "Refused"
    _, target = registry.roll_back(tracker, MODEL, "", by="anna")
    assert target.version == "1"
