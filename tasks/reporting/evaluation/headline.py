"""Say in one sentence what a run has shown: the best policy, its win rate, and what its judge is worth."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from tasks.reporting.evaluation.judges import Comparison, Judge
from tasks.reporting.evaluation.policies import NAMES, TRAINED, Rate, with_article
from tasks.reporting.numbers import format_interval, format_percent

GOLD, REWARD = "gold", "reward"  # judges: the truth itself; the model that PPO was trained to please
BETTER, WORSE, OPEN = "better", "worse", "not shown to be better"
UPPER_BOUND = "an upper bound"


class Headline(TypedDict):
    """The comparison that the report begins with."""

    sentence: str
    policy: str
    opponent: str
    rate: Rate
    verdict: str  # BETTER, WORSE or OPEN
    judge: str  # with its article
    doubt: str  # why the judge cannot decide; "" if its report card speaks for it
    about: str


def choose_headline(judges: Sequence[Judge]) -> Headline | None:
    """Return the best trained policy against SFT, by the most trustworthy judge.

    Without a trained policy, the comparison that the first model wins most of; None without any.
    """
    if not judges:
        return None
    judge = judges[0]
    trained = [row for row in judge["rows"] if row["theirs"] == "sft" and row["ours"] in TRAINED]
    best = max(trained or judge["rows"], key=lambda row: float(row["rate"]["value"]))
    doubt = describe_doubt(judge, best["ours"])
    verdict = _decide(best["rate"], doubt)
    title = f"the {judge['name']}"
    said = f"; {doubt}" if doubt else f", judged by {title}"
    return {
        "sentence": f"{_describe_rate(best)}: {verdict}{said}",
        "policy": best["ours"],
        "opponent": best["theirs"],
        "rate": best["rate"],
        "verdict": verdict,
        "judge": title,
        "doubt": doubt,
        "about": judge["about"],
    }


def _describe_rate(row: Comparison) -> str:
    ours, theirs = NAMES.get(row["ours"], row["ours"]), with_article(row["theirs"])
    rate = f"{format_percent(row['rate']['value'])} ({format_interval(row['rate'])})"
    return f"{ours} wins {rate} against {theirs}"


def _decide(rate: Rate, doubt: str) -> str:
    """Return the verdict: a judge that cannot decide shows nothing, but for a loss against its own pupil."""
    if rate["high"] < 0.5 and (not doubt or doubt.startswith(UPPER_BOUND)):
        return WORSE
    return BETTER if rate["low"] > 0.5 and not doubt else OPEN


def describe_doubt(judge: Judge, policy: str) -> str:
    """Return why a judge's verdict on a policy does not count, "" if its report card speaks for it.

    The gold scorer is the truth, which votes are noisy about.
    """
    if judge["by"] == GOLD:
        return ""
    if judge["by"] == REWARD and policy == "ppo":
        upper_bound = f"{UPPER_BOUND}, as PPO was trained to please its judge, the {judge['name']}"
    else:
        upper_bound = ""
    return _describe_card(judge) or upper_bound


def _describe_card(judge: Judge) -> str:
    """Return what a judge's report card has against it, "" if nothing."""
    card, title = judge["card"], f"the judge, the {judge['name']},"
    if card is None or not card["agreement"]["n"]:
        return f"{title} has not been graded on held-out votes"
    agrees = f"{title} agrees with {format_percent(card['agreement']['value'])} of held-out votes"
    if card["agreement"]["low"] <= 0.5:
        return f"{agrees}, which is not shown to be better than guessing"
    if card["agreement"]["low"] <= card["longer_wins"]["value"]:
        rule = format_percent(card["longer_wins"]["value"])
        return f"{agrees}, which is not shown to be better than “the longer answer wins” with {rule}"
    return ""


def as_json(headline: Headline | None) -> Mapping[str, Any]:
    """Return what other programs need of the headline; an empty sentence if no policies were compared."""
    return {"sentence": ""} if headline is None else headline
