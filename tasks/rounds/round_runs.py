"""Identify the runs of rounds in MLflow, and choose the run whose policy is promoted."""

from collections.abc import Mapping
from typing import NamedTuple

from tasks.promotion.finished_runs import NAME, FinishedRun, find_run, find_tracked
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
    """Return the run that ``find_run`` finds. If the newest is a round, or ``name`` is the run that rounds
    have in common, return the last round that won.

    Rounds that have not ended yet are left out. Raises InputError.
    """
    run, rounds = _find(tracker, name, profile)
    return _choose_round(rounds) if rounds else ChosenRun(run, "")


def find_policy_run(tracker: Tracker, name: str = "") -> FinishedRun:
    """Return the run whose policies are used: that of ``choose_run``, but the newest round if none has won.

    Raises InputError.
    """
    run, rounds = _find(tracker, name)
    best = _best(rounds)
    return run if best is None else rounds[best]


def _find(tracker: Tracker, name: str, profile: str = "") -> tuple[FinishedRun, dict[int, FinishedRun]]:
    """Return the run with this name or the newest one, and all rounds that are meant by it, if any."""
    if not name:
        run = find_run(tracker, profile=profile)
        parent = run.tags.get(PARENT)
        return run, _finished_rounds(tracker, parent) if parent else {}
    named = find_tracked(tracker, name)
    if named and (rounds := _finished_rounds(tracker, named.run_id)):
        return rounds[max(rounds)], rounds
    return find_run(tracker, name), {}


def _finished_rounds(tracker: Tracker, parent: str) -> dict[int, FinishedRun]:
    """Return the finished rounds below a run, by number; only rounds are pipelines below another run."""
    of_parent = f"tags.`{PARENT}` = '{parent}' AND tags.`{PROFILE}` LIKE '%'"
    found = tracker.search(f"{of_parent} AND attributes.status = 'FINISHED'", limit=MAX_RUNS)
    return {_round_number(one.tags): find_run(tracker, one.run_id) for one in found}


def _best(rounds: Mapping[int, FinishedRun]) -> int | None:
    starts_with_policy = 0 in rounds and "ppo" in rounds[0].stages
    return best_round(_judge(rounds), starts_with_policy=starts_with_policy)


def _choose_round(rounds: Mapping[int, FinishedRun]) -> ChosenRun:
    """Return the best of the finished rounds of a flow run. Raises InputError."""
    best = _best(rounds)
    if best is None:
        newest = _title(rounds[max(rounds)])
        raise InputError(
            f"No round up to {newest} was shown to win, so there is nothing to promote; "
            "`alignflow promote RUN` judges a round that you name"
        )
    title = _title(rounds[best])
    if not best:
        reason = f"{title} is taken, whose policy was trained on votes: no later round was shown to win."
    else:
        figure = _judge(rounds)[best].sentence.removeprefix("won: ")
        reason = f"{title} is taken: it is the last round that won ({figure})."
    return ChosenRun(rounds[best], reason)


def _title(run: FinishedRun) -> str:
    return run.tags.get(NAME, run.run_id)


def _judge(rounds: Mapping[int, FinishedRun]) -> dict[int, RoundVerdict]:
    """Return the verdicts of the rounds after round 0, by number."""
    verdicts: dict[int, RoundVerdict] = {}
    standing = None
    for number, run in sorted(rounds.items()):
        verdicts[number] = judge_round(run.summary["metrics"], number=number, standing=standing)
        if "ppo" in run.stages and verdicts[number].outcome != "lost":
            standing = number
    return {number: verdict for number, verdict in verdicts.items() if number}
