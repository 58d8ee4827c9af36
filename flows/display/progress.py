"""How far a pipeline is, in words: "4/11 sft", "24.7 of 37.0 MB  1.2 MB/s  9 s left  loss 0.48"."""

import time
from typing import Any

from flows.display.formatting import format_metric
from tasks.system.events import Event

BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class Progress:
    """Follow a pipeline by its events: its stages, and the progress of those at work."""

    def __init__(self) -> None:
        self.stages: list[str] = []  # all of the pipeline, in their order; none for a stage that runs alone
        self.at_work: dict[str, StageProgress] = {}

    def on_event(self, event: Event) -> None:
        if event.kind == "plan":
            self.stages = event.about["stages"]
        elif event.kind == "start":
            self.at_work[event.stage] = StageProgress(event.about["shown"])

    def number(self, stage: str) -> str:
        """Return "4/11" for the fourth of eleven stages; "" if the stage runs alone."""
        return f"{self.stages.index(stage) + 1}/{len(self.stages)}" if stage in self.stages else ""

    def place(self, stage: str) -> str:
        """Return "stage 4 of 11, sft", or "sft" if the stage runs alone."""
        number = self.number(stage)
        return f"stage {number.replace('/', ' of ')}, {stage}:" if number else f"{stage}:"


class StageProgress:
    """How far one stage is, and its rate."""

    def __init__(self, shown: tuple[str, ...]) -> None:
        self.shown = shown
        self.phase = ""  # what the stage does between its steps, such as tokenising
        self.first: tuple[float, int] | None = None  # time and step of the first line of this phase

    def text(self, line: dict[str, Any]) -> str:
        """Return a line of metrics.jsonl as text: steps, rate, time left, and the metrics that are shown."""
        step, total, now = int(line.get("step", 0)), int(line.get("total") or 0), time.monotonic()
        in_bytes = line.get("unit") == "bytes"
        if self.phase != (phase := line.get("phase", "")):
            self.phase, self.first = phase, None
        self.first = self.first or (now, step)
        taken, spent = step - self.first[1], now - self.first[0]
        parts = [phase, _counted(step, total, in_bytes=in_bytes)]
        if taken > 0 and spent > 0.5:
            parts += [
                format_rate(taken / spent, in_bytes=in_bytes),
                f"{format_duration((total - step) * spent / taken)} left" if total > step else "",
            ]
        return "  ".join([*filter(None, parts), *self.metrics(line)])

    def metrics(self, found: dict[str, Any]) -> list[str]:
        """Return the metrics of ``found`` that are shown, as text."""
        return [f"{name} {format_metric(found[name])}" for name in self.shown if name in found]


def _counted(step: int, total: int, *, in_bytes: bool) -> str:
    if not in_bytes:
        return f"{step:,}/{total:,}" if total else f"{step:,}"
    unit = _byte_unit(max(step, total))
    return (
        f"{format_amount(step, unit)} of {format_amount(total, unit)} {unit}"
        if total
        else f"{format_amount(step, unit)} {unit}"
    )


def format_amount(number: float, unit: str) -> str:
    """Return a number of bytes in a unit, without the unit's name."""
    value = number / 1000 ** BYTE_UNITS.index(unit)
    return f"{value:,.0f}" if unit == "bytes" else f"{value:,.1f}"


def _byte_unit(number: float) -> str:
    return next(
        (unit for power, unit in enumerate(BYTE_UNITS) if number < 1000 ** (power + 1)), BYTE_UNITS[-1]
    )


def format_rate(per_second: float, *, in_bytes: bool = False) -> str:
    """Return a rate: "16.9/s", "1.2 MB/s" or, if it is slower than one a second, "3.1 s/step"."""
    if in_bytes:
        unit = _byte_unit(per_second)
        return f"{format_amount(per_second, unit)} {unit}/s"
    return f"{per_second:,.1f}/s" if per_second >= 1 else f"{format_duration(1 / per_second)}/step"


def format_duration(seconds: float) -> str:
    """Return a time: "5.0 s", "2 min 9 s" or "3 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
