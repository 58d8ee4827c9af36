"""Judge a round by the win rate of its policy against that of the round before, and choose the best round."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from tasks.config.policies import PREDECESSOR, TITLES
from tasks.config.trusted_judges import JUDGES, choose_judge
from tasks.promotion.gate_results import format_share, read_interval

EVEN = 0.5  # the win rate of a policy that is as good as its opponent; ties count half


class RoundVerdict(NamedTuple):
    """Whether a round's policy wins against that of the last round that has not lost, or SFT if there is
    none.
    """

    outcome: Literal["won", "lost", "undecided"]
    against: str  # the opponent's name, "predecessor" or "sft"
    judge: str  # "" if no judge has compared policies
    rate: dict[str, Any] | None  # {value, low, high, n}; None if the judge has not compared the two
    sentence: str


def judge_round(metrics: Mapping[str, Any], *, number: int, standing: int | None) -> RoundVerdict:
    """Return the verdict of the judge that is trusted most: "won" if the whole interval lies above one half.

    ``metrics`` are those of the summary of the run of round ``number``; ``standing`` is the last round before
    it whose policy has not lost. Without one its policy is compared with SFT.
    """
    opponent = "sft" if standing is None else PREDECESSOR
    names = {None: TITLES["sft"], number - 1: "the last round"}
    title = names.get(standing, f"round {standing}")
    judge = choose_judge(metrics)
    rate = read_interval(metrics, f"{judge}_win_rate.ppo_vs_{opponent}")
    if rate is None:
        return RoundVerdict(
            "undecided", opponent, judge, None, f"undecided: nothing compared it with {title}"
        )
    outcome: Literal["won", "lost", "undecided"] = "undecided"
    if rate["low"] > EVEN:
        outcome = "won"
    elif rate["high"] < EVEN:
        outcome = "lost"
    sentence = f"{outcome}: {format_share(rate)} against {title}, by {JUDGES[judge]}"
    return RoundVerdict(outcome, opponent, judge, rate, sentence)


def goes_on(verdict: RoundVerdict, stop: Literal["not_won", "lost", "never"]) -> bool:
    """Return whether another round follows one with this verdict, by the setting rounds.stop."""
    ending = {"not_won": ("lost", "undecided"), "lost": ("lost",), "never": ()}[stop]
    return verdict.outcome not in ending


def best_round(verdicts: Mapping[int, RoundVerdict], *, starts_with_policy: bool) -> int | None:
    """Return the number of the last round that won; ``verdicts`` are those of the rounds after round 0.

    If none has: 0, if round 0 has trained a policy on votes (``starts_with_policy``); else None.
    """
    won = [number for number, verdict in verdicts.items() if verdict.outcome == "won"]
    if won:
        return max(won)
    return 0 if starts_with_policy else None
