"""Test the settings of rounds: what is refused, and which setting is in which stage's key."""

from typing import Any

import pytest

from tasks.config.jobs import AskedJob, CandidatesJob, ComparisonsJob, Job, MixtureJob
from tasks.config.pipeline import Pipeline

JOBS = (CandidatesJob, AskedJob, ComparisonsJob, MixtureJob)
LOCAL = {"kind": "local", "path": "judge"}
ENSEMBLE = {"members": 4}


def keys(**rounds: Any) -> dict[type[Job], dict[str, Any]]:
    config = Pipeline.model_validate({"rounds": rounds, "judge": LOCAL})
    return {job: job.of(config).key_settings() for job in JOBS}


@pytest.mark.parametrize(
    ("changed", "rebuilt"),
    [
        ({"count": 5}, []),
        ({"stop": "never"}, []),
        ({"promote": False}, []),
        ({"continue_policy": False}, []),
        ({"sample": {"policies": 1}}, [CandidatesJob]),
        ({"sample": {"prompts": 7}}, [CandidatesJob]),
        ({"comparisons": 100}, [AskedJob]),
        ({"choose": {"alike": 0.5}}, [AskedJob]),
        ({"old_share": 0.0}, [MixtureJob]),
        ({"labels": {"kind": "gold", "noise": 0.0}}, [ComparisonsJob]),
        ({"labels": {"kind": "people"}}, [AskedJob, ComparisonsJob]),
        ({"labels": {"kind": "judge"}}, [ComparisonsJob]),
    ],
)
def test_a_setting_rebuilds_only_the_stages_that_read_it(
    changed: dict[str, Any], rebuilt: list[type[Job]]
) -> None:
    before, after = keys(), keys(**changed)
    assert [job for job in JOBS if before[job] != after[job]] == rebuilt


def test_the_place_of_a_file_of_labels_is_in_no_key() -> None:
    one, other = (keys(labels={"kind": "file", "path": path}) for path in ("a.jsonl", "b.jsonl"))
    assert one == other


def test_only_a_language_model_that_gives_the_labels_is_in_the_key() -> None:
    found = {
        by: ComparisonsJob.of(
            Pipeline.model_validate(
                {
                    "rounds": {"labels": {"kind": "judge", "by": by}},
                    "judge": LOCAL,
                    "reward": {"held_out_member": True},
                }
            )
        ).judge.kind
        for by in ("lm", "held_out")
    }
    assert found == {"lm": "local", "held_out": "none"}


def test_prompts_of_the_independent_score_are_held_out_if_there_is_one() -> None:
    scored: dict[str, Any] = {"by": "gold", "prompts": 50}
    assert CandidatesJob.of(Pipeline.model_validate({"ppo": {"score": scored}})).held_out_prompts == 50
    assert (
        CandidatesJob.of(Pipeline.model_validate({"ppo": {"score": scored | {"by": None}}})).held_out_prompts
        == 0
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "dpo"}, "set method to ppo"),
        ({"source": {"kind": "stack-exchange", "path": "x"}}, "rounds.labels.kind=gold"),
        ({"rounds": {"labels": {"kind": "judge"}}}, "set judge.kind to local or endpoint"),
        ({"rounds": {"labels": {"kind": "judge", "by": "held_out"}}}, "reward.held_out_member to true"),
        (
            {"rounds": {"start": "sft", "old_share": 0, "labels": {"kind": "judge", "by": "held_out"}},
             "reward": {"held_out_member": True}},
            "a reward model before the first round",
        ),
        ({"rounds": {"choose": {"by": "disagreement"}}}, "set reward.members to 4"),
        ({"reward": {"comparisons": "rankings"}}, "set reward.comparisons to pairs"),
        ({"reward": {"start": "folder"}}, "set reward.start to ''"),
        ({"machine": {"launch": {"ppo": {"shard": True, "processes": 2}}}, "ppo": {"sampler": "plain"}},
         "rounds.continue_policy"),
    ],
)  # fmt: skip
def test_what_rounds_cannot_do_is_refused(settings: dict[str, Any], named: str) -> None:
    config = Pipeline.model_validate(settings)  # which the chain alone accepts
    with pytest.raises(ValueError, match=named):
        config.check_rounds()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rounds": {"labels": {"kind": "judge"}}, "judge": LOCAL},
        {"rounds": {"labels": {"kind": "judge", "by": "held_out"}}, "reward": {"held_out_member": True}},
        {"rounds": {"choose": {"by": "disagreement"}}, "reward": ENSEMBLE},
        {"rounds": {"start": "sft", "old_share": 0.0, "choose": {"by": "disagreement"}}, "reward": ENSEMBLE},
    ],
)
def test_what_rounds_can_do_is_accepted(settings: dict[str, Any]) -> None:
    Pipeline.model_validate(settings).check_rounds()
