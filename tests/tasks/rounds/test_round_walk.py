"""Test what a round's stages take of earlier rounds, by walking them without running any."""

from typing import Any

import pytest

from tasks.config.pipeline import Pipeline
from tasks.rounds.round_walk import (
    SEEDED,
    Prepared,
    Round,
    collect_candidates,
    finish_round,
    round_config,
    seeded_stages,
)

PREPARED = Prepared("data", "base", "model")
VOTES: Any = Round(0, "ppo0", "reward0", None, None, "run0", {})
SFT: Any = Round(0, None, None, None, None, "run0", {})
FIRST: Any = Round(1, "ppo1", "reward1", "asked1", "compared1", "run1", {})
SECOND: Any = Round(2, "ppo2", "reward2", "asked2", "compared2", "run2", {})
MODEL = {"data": "data", "model": "model"}


def walk(rounds: list[Round], labels: Any = None, **settings: Any) -> dict[str, dict[str, str]]:
    """Return the inputs of each stage of the round after ``rounds``, in the order in which they run."""
    config = Pipeline.model_validate({"rounds": settings})
    inputs: dict[str, dict[str, str]] = {}

    def run(stage: Any, **taken: str) -> str:
        inputs[stage.name] = taken
        return f"new {stage.name}"

    to_label = collect_candidates(config, PREPARED, rounds, run)
    finish_round(config, PREPARED, rounds, to_label, labels, run, {"champion": "old"})
    return inputs


def test_the_first_round_takes_the_policy_that_was_trained_on_votes() -> None:
    assert walk([VOTES]) == {
        "candidates": {**MODEL, "policy": "ppo0", "reward": "reward0"},
        "asked": {"candidates": "new candidates", "data": "data"},
        "comparisons": {"asked": "new asked", "model": "model", "reward": "reward0"},
        "mixture": {"data": "data", "comparisons1": "new comparisons"},
        "reward": {**MODEL, "mixture": "new mixture"},
        "ppo": {**MODEL, "reward": "new reward", "start": "ppo0"},
        "answers": {
            **MODEL, "base": "base", "ppo": "new ppo", "predecessor": "ppo0", "champion": "old",
        },
        "winrate": {**MODEL, "reward": "new reward", "answers": "new answers"},
        "benchmarks": {**MODEL, "base": "base", "reward": "new reward", "ppo": "new ppo"},
    }  # fmt: skip


def test_a_later_round_takes_all_that_was_asked_and_compared() -> None:
    found = walk([VOTES, FIRST, SECOND])
    assert found["candidates"] == {**MODEL, "policy": "ppo2", "policy2": "ppo1", "reward": "reward2"}
    assert found["asked"] == {
        "candidates": "new candidates", "data": "data", "before1": "asked1", "before2": "asked2",
    }  # fmt: skip
    compared = ["compared1", "compared2", "new comparisons"]
    assert [found["mixture"][f"comparisons{number}"] for number in (1, 2, 3)] == compared
    assert found["answers"]["predecessor"] == "ppo2"


def test_a_policy_that_has_lost_is_asked_about_but_not_gone_on_from() -> None:
    lost = SECOND._replace(has_lost=True)
    found = walk([VOTES, FIRST, lost])
    assert found["candidates"] == {**MODEL, "policy": "ppo2", "policy2": "ppo1", "reward": "reward2"}
    assert found["comparisons"]["reward"] == "reward2"
    assert found["mixture"]["comparisons2"] == "compared2"
    assert (found["ppo"]["start"], found["answers"]["predecessor"]) == ("ppo1", "ppo1")
    assert "start" not in walk([VOTES, FIRST, lost], continue_policy=False)["ppo"]


def test_if_every_policy_has_lost_the_next_one_begins_as_the_sft_model() -> None:
    found = walk([SFT, FIRST._replace(has_lost=True)])
    assert found["candidates"]["policy"] == "ppo1"
    assert "start" not in found["ppo"]
    assert "predecessor" not in found["answers"]


def test_the_first_round_on_sft_has_no_policy_to_go_on_from() -> None:
    found = walk([SFT])
    assert found["candidates"] == MODEL
    assert "reward" not in found["comparisons"]
    assert "start" not in found["ppo"]
    assert "predecessor" not in found["answers"]


@pytest.mark.parametrize(("count", "policies"), [(1, ["ppo2"]), (3, ["ppo2", "ppo1", "ppo0"])])
def test_the_last_so_many_policies_answer(count: int, policies: list[str]) -> None:
    taken = walk([VOTES, FIRST, SECOND], sample={"policies": count})["candidates"]
    assert [one for name, one in taken.items() if name.startswith("policy")] == policies


def test_a_policy_may_start_from_sft_every_time() -> None:
    found = walk([VOTES, FIRST], continue_policy=False)
    assert "start" not in found["ppo"]
    assert found["answers"]["predecessor"] == "ppo1"


def test_a_file_of_labels_is_an_input_of_the_comparisons() -> None:
    assert walk([VOTES], labels="the file")["comparisons"]["labels"] == "the file"


def test_each_round_has_a_seed_of_its_own_within_bounds() -> None:
    config = Pipeline(seed=2**31 - 1)
    seeds = [round_config(config, number).seed for number in range(4)]
    assert seeds[0] == config.seed
    assert len(set(seeds)) == 4
    assert all(Pipeline(seed=seed).seed == seed for seed in seeds)
    seeded = seeded_stages(config, 2)
    assert seeded.keys() == set(SEEDED)
    assert {one.seed for one in seeded.values()} == {seeds[2]}
