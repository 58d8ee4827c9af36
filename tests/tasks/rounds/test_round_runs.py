"""Test which run is promoted if none is named: the newest, or of rounds the last one that won."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.rounds.round_runs import choose_run, find_policy_run, round_id
from tasks.system.errors import InputError
from tasks.tracking import runs
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import make_run

SFT, PREDECESSOR = "gold_win_rate.ppo_vs_sft", "gold_win_rate.ppo_vs_predecessor"
WON = {"value": 0.6, "low": 0.55, "high": 0.65, "n": 300}
LOST = {"value": 0.4, "low": 0.35, "high": 0.45, "n": 300}


class Rounds:
    """A flow run of rounds in MLflow, whose rounds a test ends one by one."""

    def __init__(self, tracker: Tracker, folder: Path, flow: str = "f-1") -> None:
        self.tracker, self.folder, self.flow = tracker, folder, flow
        with runs.pipeline_run(tracker, f"rounds {flow}", {}, flow_run_id=flow) as parent:
            self.parent = parent.run_id

    def end(self, number: int, metrics: dict[str, Any], *, policy: bool = True, fails: bool = False) -> str:
        """End a round of the profile demo; return the id of its run."""
        title, flow = f"{self.flow}, round {number}", round_id(self.flow, number)
        opened = runs.pipeline_run(
            self.tracker, title, {}, flow_run_id=flow, profile="demo", parent=self.parent
        )
        stages = [{"name": name} for name in ("reward", "ppo")[: 1 + policy]]
        summary = {"profile": "demo", "stages": stages, "metrics": metrics}
        (self.folder / "summary.json").write_text(json.dumps(summary))
        with opened as tracked:
            tracked.upload(self.folder / "summary.json")
        if fails:
            self.tracker.end(str(tracked.run_id), "FAILED")
        return str(tracked.run_id)


@pytest.fixture
def rounds(tracker: Tracker, tmp_path: Path) -> Rounds:
    return Rounds(tracker, tmp_path)


def test_the_last_round_that_won_is_taken_and_not_the_newest(tracker: Tracker, rounds: Rounds) -> None:
    rounds.end(0, {}, policy=False)
    rounds.end(1, {SFT: WON})
    best = rounds.end(2, {SFT: WON, PREDECESSOR: WON})
    rounds.end(3, {SFT: WON, PREDECESSOR: LOST})
    for chosen in (choose_run(tracker), choose_run(tracker, profile="demo")):
        assert chosen.run.run_id == best
        assert chosen.reason == (
            "f-1, round 2 is taken: it is the last round that won (60.0 % (55.0 to 65.0, n 300) against the "
            "last round, by the gold scorer)."
        )


def test_a_round_after_a_lost_one_has_won_against_the_one_before_that(
    tracker: Tracker, rounds: Rounds
) -> None:
    rounds.end(0, {SFT: LOST})  # trained on votes, and set aside
    rounds.end(1, {SFT: WON})
    rounds.end(2, {SFT: WON, PREDECESSOR: LOST})
    rounds.end(3, {SFT: WON, PREDECESSOR: WON})
    assert choose_run(tracker).reason == (
        "f-1, round 3 is taken: it is the last round that won (60.0 % (55.0 to 65.0, n 300) against round 1, "
        "by the gold scorer)."
    )


def test_the_first_policy_is_compared_with_sft_and_a_later_one_with_the_round_before(
    tracker: Tracker, rounds: Rounds
) -> None:
    rounds.end(0, {SFT: WON})  # trained on votes
    rounds.end(1, {SFT: WON, PREDECESSOR: LOST})
    assert choose_run(tracker).reason == (
        "f-1, round 0 is taken, whose policy was trained on votes: no later round was shown to win."
    )


def test_rounds_that_have_not_finished_and_those_of_other_flow_runs_are_left_out(
    tracker: Tracker, rounds: Rounds, tmp_path: Path
) -> None:
    rounds.end(0, {}, policy=False)
    rounds.end(1, {SFT: WON})
    later = Rounds(tracker, tmp_path, "f-2")
    later.end(0, {}, policy=False)
    with pytest.raises(InputError, match="No round up to f-2, round 0 was shown to win, so there is nothing"):
        choose_run(tracker)
    best = later.end(1, {SFT: WON})
    later.end(2, {SFT: WON, PREDECESSOR: WON}, fails=True)
    assert choose_run(tracker).run.run_id == best


def test_a_round_that_is_named_is_taken_whatever_it_has_won(tracker: Tracker, rounds: Rounds) -> None:
    rounds.end(0, {}, policy=False)
    rounds.end(1, {SFT: WON})
    lost = rounds.end(2, {PREDECESSOR: LOST})
    for name in (lost, "f-1, round 2", "f-1-2"):
        assert choose_run(tracker, name)[1:] == ("",)
        assert choose_run(tracker, name).run.run_id == lost


def test_the_newest_run_is_taken_if_it_is_no_round(tracker: Tracker, rounds: Rounds) -> None:
    rounds.end(0, {}, policy=False)
    rounds.end(1, {SFT: WON})
    newest = make_run(tracker, 7, {SFT: LOST})
    chosen = choose_run(tracker)
    assert (chosen.run.run_id, chosen.reason) == (newest.run_id, "")


def test_the_run_that_rounds_have_in_common_means_the_last_round_that_won(
    tracker: Tracker, rounds: Rounds
) -> None:
    rounds.end(0, {}, policy=False)
    best = rounds.end(1, {SFT: WON})
    rounds.end(2, {SFT: WON, PREDECESSOR: LOST})
    make_run(tracker, 7, {SFT: LOST})
    for name in (rounds.parent, "f-1", "rounds f-1"):
        chosen = choose_run(tracker, name)
        assert (chosen.run.run_id, find_policy_run(tracker, name).run_id) == (best, best)
        assert "f-1, round 1 is taken: it is the last round that won" in chosen.reason


def test_policies_are_those_of_the_last_round_that_won_or_of_the_newest_one(
    tracker: Tracker, rounds: Rounds
) -> None:
    rounds.end(0, {}, policy=False)
    newest = rounds.end(1, {SFT: LOST})
    assert find_policy_run(tracker).run_id == find_policy_run(tracker, "f-1").run_id == newest
    best = rounds.end(2, {SFT: WON, PREDECESSOR: WON})
    later = rounds.end(3, {SFT: WON, PREDECESSOR: LOST})
    assert find_policy_run(tracker).run_id == best
    assert find_policy_run(tracker, "f-1, round 3").run_id == later
    alone = make_run(tracker, 7, {SFT: LOST})
    assert find_policy_run(tracker).run_id == alone.run_id
