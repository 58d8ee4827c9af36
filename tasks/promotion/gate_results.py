"""Define what the gates read and return, and how their sentences show figures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Evidence(NamedTuple):
    """What is known of a finished run."""

    metrics: Mapping[str, Any]  # of its summary
    warnings: Mapping[str, Sequence[str]]  # by stage
    data_read: float | None  # when the data stage has read its source, seconds since the epoch; None: unknown
    now: float
    compared: str = ""  # digest of the policy of an earlier run that it was compared with; "" if none
    digests: Mapping[str, str] = {}  # of the policies that it has trained


class Champion(NamedTuple):
    """The policy that is in use."""

    version: str
    digest: str  # of its artifact; "" if it is not known


class GateResult(NamedTuple):
    """What one gate says about a policy."""

    name: str  # of its setting
    passed: bool | None  # None: its figure is missing, so it cannot be decided and does not pass
    figure: str
    threshold: str
    sentence: str  # says by how much it failed


class Choice(NamedTuple):
    """The policy that would be promoted, and the judge that decides."""

    policy: str
    judge: str  # "" if no judge has compared it with SFT
    win_rate: Any  # against SFT; None if there is none


def missing(gate: str, limit: str, sentence: str) -> GateResult:
    """Return the result of a gate whose figure the run lacks."""
    return GateResult(gate, None, "missing", limit, f"{sentence}, so the gate cannot be decided.")


def read_interval(metrics: Mapping[str, Any], name: str) -> Any:
    """Return a metric that has an interval; None if there is none."""
    value = metrics.get(name)
    has_interval = isinstance(value, dict) and all(
        isinstance(value.get(part), int | float) for part in ("value", "low", "high", "n")
    )
    return value if has_interval else None


def format_share(value: Mapping[str, Any]) -> str:
    """Return a share with its interval: "78.5 % (76.1 to 80.9, n 500)"."""
    bounds = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
    return f"{percent(value['value'])} ({bounds}, n {value['n']:,})"


def percent(share: float) -> str:
    """Return a share as text in per cent."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """Return a difference of shares as text in points."""
    return f"{100 * share:.1f} points"


def capitalise(text: str) -> str:
    """Return a text with a capital letter at its beginning."""
    return f"{text[:1].upper()}{text[1:]}"
