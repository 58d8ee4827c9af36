"""Test which files the stages of rounds read, and that the plain chain takes what it took."""

from typing import Any

import pytest

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.config.jobs import CandidatesJob
from tasks.config.pipeline import Pipeline
from tasks.stages.answers import answers
from tasks.stages.ppo import ppo
from tasks.stages.reward import reward
from tasks.stages.rounds.asked import asked
from tasks.stages.rounds.candidates import candidates
from tasks.stages.rounds.comparisons import comparisons
from tasks.stages.rounds.mixture import mixture
from tasks.stages.stage import Stage

TABLES = ("rl", "finetune", "reward", "evaluation", "evaluation_pairs")
FILES = {
    "data": [f"{name}.parquet" for name in TABLES],
    "base": ["model/config.json"],
    "model": ["model/config.json"],
    "policy": ["adapter/adapter_config.json", "samples.jsonl"],
    "reward": ["adapter/w", "adapter-1/w", "adapter-2/w", "reward.json", "measures.json"],
    "candidates": ["candidates.parquet", "summary.json"],
    "asked": ["asked.parquet", "summary.json"],
    "comparisons": ["comparisons.parquet", "labels.parquet", "agreement.json"],
    "mixture": ["reward.parquet", "summary.json"],
}
WHOLE = {
    "reward": {"members": 2, "held_out_member": True},
    "judge": {"kind": "none"},
}


def built(kind: str, *, number: int = 0) -> Artifact:
    files = dict.fromkeys(FILES[kind], f"{number}")
    return Artifact(
        stage=kind, key="k" * 64, digest="d" * 64, path="", files=files, seconds=0.0, peak_mb=0.0,
        cached=True, metrics={}, warnings=[],
    )  # fmt: skip


def read(stage: Stage, settings: dict[str, Any], **artifacts: Artifact) -> dict[str, list[str]]:
    """Return the files of each input that a stage reads."""
    step = stage.step(Pipeline.model_validate(WHOLE | settings), **artifacts)
    return {name: sorted(one["files"]) for name, one in step.inputs.items()}


DATA, MODEL, REWARD = built("data"), built("model"), built("reward")


def test_candidates_read_policies_and_the_members_that_ppo_sees() -> None:
    policies = {"policy": built("policy"), "policy2": built("policy")}
    assert read(candidates, {}, data=DATA, model=MODEL, reward=REWARD, **policies) == {
        "data": ["rl.parquet"],
        "model": ["model/config.json"],
        "policy": ["adapter/adapter_config.json"],
        "policy2": ["adapter/adapter_config.json"],
        "reward": ["adapter-1/w", "adapter/w", "reward.json"],
    }
    assert set(read(candidates, {}, data=DATA, model=MODEL)) == {"data", "model"}


def test_candidates_of_a_round_depend_on_the_last_policy() -> None:
    keys = {
        candidates.step(Pipeline(), data=DATA, model=MODEL, policy=built("policy", number=n)).recipe.inputs[
            "policy"
        ]
        for n in (1, 2)
    }
    assert len(keys) == 2
    assert candidates.job_type is CandidatesJob


def test_asked_reads_data_for_gold_questions_only() -> None:
    inputs = {"candidates": built("candidates"), "before1": built("asked"), "before2": built("asked")}
    files = {"candidates": ["candidates.parquet"], "before1": ["asked.parquet"], "before2": ["asked.parquet"]}
    assert read(asked, {}, data=DATA, **inputs) == files
    people = {"rounds": {"labels": {"kind": "people"}}}
    assert read(asked, people, data=DATA, **inputs) == files | {"data": ["finetune.parquet"]}
    assert asked.kind == mixture.kind == "cpu"


def test_comparisons_read_what_their_labels_need(tmp_path: Any) -> None:
    pairs, files = built("asked"), {"asked": ["asked.parquet"]}
    others = {"model": MODEL, "reward": REWARD}
    assert read(comparisons, {}, asked=pairs, **others) == files
    held_out = {"rounds": {"labels": {"kind": "judge", "by": "held_out"}}}
    assert read(comparisons, held_out, asked=pairs, **others) == files | {
        "model": ["model/config.json"],
        "reward": ["adapter-1/w", "adapter-2/w", "adapter/w", "reward.json"],
    }
    (tmp_path / "labels.jsonl").write_text("{}")
    given = user_artifact(tmp_path / "labels.jsonl")
    for labels in ({"kind": "people"}, {"kind": "file", "path": "x"}):
        found = read(comparisons, {"rounds": {"labels": labels}}, asked=pairs, labels=given, **others)
        assert found == files | {"labels": []}
    endpoint = {"kind": "endpoint", "model": "m", "prompt_price": 0, "reply_price": 0}
    by_model = {"rounds": {"labels": {"kind": "judge"}}, "judge": endpoint}
    assert set(read(comparisons, by_model, asked=pairs, **others)) == {"asked", "prompt"}


def test_mixture_reads_votes_if_they_have_a_share() -> None:
    rounds = {"comparisons1": built("comparisons"), "comparisons2": built("comparisons")}
    files = {name: ["comparisons.parquet"] for name in rounds}
    assert read(mixture, {}, data=DATA, **rounds) == files | {"data": ["reward.parquet"]}
    assert read(mixture, {"rounds": {"old_share": 0.0}}, data=DATA, **rounds) == files


def test_the_reward_model_reads_the_mixture_in_place_of_the_votes() -> None:
    plain = read(reward, {}, data=DATA, model=MODEL)
    assert plain == {
        "data": ["evaluation_pairs.parquet", "finetune.parquet", "reward.parquet"],
        "model": ["model/config.json"],
    }
    mixed = read(reward, {}, data=DATA, model=MODEL, mixture=built("mixture"))
    assert mixed == {
        "data": ["evaluation_pairs.parquet", "finetune.parquet"],
        "model": ["model/config.json"],
        "mixture": ["reward.parquet"],
    }
    assert reward.needed == {"data", "model"}


@pytest.mark.parametrize("has_predecessor", [False, True])
def test_the_last_policy_answers_beside_the_new_one(has_predecessor: bool) -> None:
    more = {"predecessor": built("policy")} if has_predecessor else {}
    found = read(answers, {}, data=DATA, base=built("base"), model=MODEL, ppo=built("policy"), **more)
    assert found.pop("predecessor", None) == (["adapter/adapter_config.json"] if has_predecessor else None)
    assert set(found) == {"data", "base", "model", "ppo"}


def test_ppo_goes_on_from_the_adapter_of_the_round_before() -> None:
    inputs = read(ppo, {}, data=DATA, model=MODEL, reward=REWARD, start=built("policy"))
    assert inputs["start"] == ["adapter/adapter_config.json"]
    assert "start" not in read(ppo, {}, data=DATA, model=MODEL, reward=REWARD)
