"""Rank the policies of several runs by one judge's verdicts, and say what these show."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tasks.config.commands.comparison import ComparedRun, ComparingJudge
from tasks.config.policies import TRAINED
from tasks.programs.comparison.run_answers import Contestant
from tasks.programs.comparison.standings import LETTERS, NAMES, Estimate, join_names, title
from tasks.programs.runtime import battles
from tasks.programs.runtime.battles import Judged
from tasks.rlhf.judging.verdicts import Counts
from tasks.rlhf.judging.win_rate import win_rate

Groups = Sequence[list[Contestant]]  # policies with the same answers, which are one contestant


def name_group(group: Sequence[Contestant]) -> str:
    """Return the names of policies with the same answers: "SFT of A and B"."""
    names = []
    for policy in dict.fromkeys(one.policy for one in group):
        letters = [LETTERS[one.run] for one in group if one.policy == policy]
        names.append(f"{NAMES[policy]} of {join_names(letters)}")
    return join_names(names)


def describe_equal(groups: Groups) -> list[str]:
    """Return a sentence about the groups of several policies, none if there is no such group."""
    names = [name_group(group) for group in groups if len(group) > 1]
    return [f"These gave the same answers: {'; '.join(names)}."] if names else []


def build_board(judged: Judged, groups: Groups) -> list[dict[str, Any]]:
    """Return the leaderboard, the best first; policies with the same answers share a line."""
    by_name = {group[0].name: group for group in groups}
    rows: list[dict[str, Any]]
    if len(groups) == 1:
        length = float(judged.lengths[groups[0][0].name].mean())
        even = {"value": 0.0, "low": 0.0, "high": 0.0, "n": len(judged.questions)}
        only = {"policy": groups[0][0].name, "strength": even, "elo": 1000.0, "ranks": [1.0]}
        rows = [{**only, "characters": length}]
    else:
        rows = battles.leaderboard(judged, list(by_name))
    return [
        {
            "title": name_group(by_name[row["policy"]]),
            "members": [{"run": LETTERS[one.run], "policy": one.policy} for one in by_name[row["policy"]]],
            **row,
        }
        for row in rows
    ]


def build_battles(
    judged: Judged, groups: Groups, board: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], judge: str
) -> list[dict[str, Any]]:
    """Return the win rate of every two lines of the leaderboard, the better one as "ours".

    After them come trained policies with the same answers in two runs: all their battles are ties.
    """
    numbers = {pair: number for number, pair in enumerate(judged.pairs)}
    found = []
    for better, worse in combinations(board, 2):
        pair = (str(better["policy"]), str(worse["policy"]))
        swapped = pair not in numbers
        pair = pair[::-1] if swapped else pair
        outcomes = judged.outcomes[judged.of_pair(numbers[pair])]
        rates = [metrics[f"{judge}_win_rate{kind}.{'_vs_'.join(pair)}"] for kind in ("", "_at_equal_length")]
        rate, at_equal_length = map(_reverse, rates) if swapped else rates
        found.append(
            {
                "ours": better["title"],
                "theirs": worse["title"],
                "rate": rate,
                "at_equal_length": at_equal_length,
                "tally": Counts.of(1 - outcomes if swapped else outcomes)._asdict(),
            }
        )
    return found + _ties(judged, groups)


def _reverse(rate: Estimate) -> Estimate:
    """Return the win rate of the other policy."""
    return {**rate, "value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"]}


def _ties(judged: Judged, groups: Groups) -> list[dict[str, Any]]:
    outcomes = np.full(len(judged.questions), 0.5)
    rate = win_rate(outcomes, judged.questions)._asdict()
    return [
        {
            "ours": title(one),
            "theirs": title(other),
            "rate": rate,
            "at_equal_length": rate,
            "tally": Counts.of(outcomes)._asdict(),
        }
        for group in groups
        for one, other in combinations(group, 2)
        if one.run != other.run and one.policy == other.policy and (one.policy in TRAINED or len(groups) == 1)
    ]


def describe_board(
    judge: ComparingJudge,
    runs: Sequence[ComparedRun],
    board: Sequence[Mapping[str, Any]],
    fought: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Return sentences on which policy is first, and whether that is shown."""
    said = []
    if not board:
        said.append(f"No verdict of {judge.title} could be read.")
    elif len(board) == 1:
        said.append(f"{board[0]['title']} gave the same answers, so every battle is a tie.")
    else:
        first, second, rate = board[0], board[1], fought[0]["rate"]
        interval = f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"
        shown = "shown to be better" if rate["low"] > 0.5 else "not shown to be better"
        said.append(
            f"{first['title']} is first with a probability of {100 * first['ranks'][0]:.0f} %. Against the "
            f"second, {second['title']}, it wins {100 * rate['value']:.1f} % ({interval}) of {rate['n']:,} "
            f"questions by {judge.title}: {shown}."
        )
    pleased = [
        LETTERS[number]
        for number, run in enumerate(runs)
        if run.judges.get("reward") == judge.identity and "ppo" in run.policies
    ]
    if judge.name == "reward" and pleased:
        said.append(
            f"PPO of {join_names(pleased)} was trained to please this judge: its wins are an upper bound."
        )
    return said
