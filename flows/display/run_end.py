"""Say in one or two sentences what a run has shown."""

from typing import Any


def describe_end(summary: dict[str, Any]) -> str:
    """Return what a run has shown, and what the gates say, as the message of its final state."""
    shown = f"{summary['headline']}." if summary["headline"] else "No policies were compared."
    return " ".join(filter(None, [shown, summary["gates"]]))
