"""Name the judges in the order of trust, and choose the one whose verdict counts.

The end of a run, its page in MLflow, a comparison of runs and a promotion all ask here.
"""

from collections.abc import Mapping
from typing import Any

JUDGES = {
    "gold": "the gold scorer",
    "lm": "the language model",
    "held_out": "the held-out reward model",
    "reward": "the reward model",
}


def choose_judge(metrics: Mapping[str, Any]) -> str:
    """Return the first judge that its report card does not doubt, else the first; "" if none has judged.

    ``metrics`` are those of a run's summary.
    """
    judges = [judge for judge in JUDGES if has_judged(judge, metrics)]
    return next((judge for judge in judges if is_trusted(judge, metrics)), judges[0] if judges else "")


def has_judged(judge: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a judge has compared policies of the run."""
    return any(name.startswith(f"{judge}_win_rate.") for name in metrics)


def is_trusted(judge: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a judge agrees with held-out votes more than chance and the longer answer do.

    The gold scorer is the truth, which votes are noisy about. A judge without a report card, for want of
    held-out votes, is not doubted.
    """
    card, rule = (metrics.get(f"judge.{judge}.{name}") for name in ("agreement", "longer_wins"))
    if judge == "gold" or not card or not rule:
        return True
    low, longer_wins = card["low"], rule["value"]
    if low is None or longer_wins is None:  # as a summary says it if no verdict could be read
        return False
    return bool(low > 0.5 and low > longer_wins)
