"""Identify the runs of rounds in MLflow, and choose the run whose policy is promoted."""

from collections.abc import Mapping
from typing import NamedTuple

from tasks.promotion.finished_runs import NAME, FinishedRun, find_run
from tasks.rounds.verdict import RoundVerdict, best_round, judge_round
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tasks.tracking.runs import FLOW_RUN, MAX_RUNS, PARENT, PROFILE


class ChosenRun(NamedTuple):
    """The run whose policy is promoted."""

    run: FinishedRun
    reason: str  # a sentence on which round it is and why; "" if the user has named it, or it is no round


def round_id(flow_run_id: str, number: int) -> str:
    """Return the id that a round has in place of a flow run's own: a retried flow run finds it again."""
    return f"{flow_run_id}-{number}"


def _round_number(tags: Mapping[str, str]) -> int:
    """Return the number of the round whose run in MLflow has these tags."""
    return int(tags[FLOW_RUN].rpartition("-")[2])


def choose_run(tracker: Tracker, name: str = "", *, profile: str = "") -> ChosenRun:
    """Return the run that ``find_run`` finds; if that is the newest, and a round, the last round that won.

    Rounds that have not ended yet are left out. Raises InputError.
    """
    found = find_run(tracker, name, profile=profile)
    parent = found.tags.get(PARENT)  # only rounds are runs of the pipeline below another run
    return ChosenRun(found, "") if name or not parent else _choose_round(tracker, parent)


def _choose_round(tracker: Tracker, parent: str) -> ChosenRun:
    """Return the best of the finished rounds below a flow run's own run. Raises InputError."""
    of_parent = f"tags.`{PARENT}` = '{parent}' AND tags.`{PROFILE}` LIKE '%'"
    found = tracker.search(f"{of_parent} AND attributes.status = 'FINISHED'", limit=MAX_RUNS)
    rounds = {_round_number(one.tags): find_run(tracker, one.run_id) for one in found}
    verdicts = _judge(rounds)
    best = best_round(verdicts, starts_with_policy=0 in rounds and "ppo" in rounds[0].stages)
    if best is None:
        newest = rounds[max(rounds)].tags.get(NAME, parent)
        raise InputError(
            f"No round up to {newest} was shown to win, so there is nothing to promote; "
            "`alignflow promote RUN` judges a round that you name"
        )
    title = rounds[best].tags.get(NAME, rounds[best].run_id)
    if not best:
        reason = f"{title} is taken, whose policy was trained on votes: no later round was shown to win."
    else:
        figure = verdicts[best].sentence.removeprefix("won: ")
        reason = f"{title} is taken: it is the last round that won ({figure})."
    return ChosenRun(rounds[best], reason)


def _judge(rounds: Mapping[int, FinishedRun]) -> dict[int, RoundVerdict]:
    """Return the verdicts of the rounds after round 0, by number."""
    trained = [number for number, run in rounds.items() if "ppo" in run.stages]
    return {
        number: judge_round(run.summary["metrics"], has_predecessor=number > min(trained, default=number))
        for number, run in sorted(rounds.items())
        if number
    }
