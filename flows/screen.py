"""What a run shows: a line per stage while it runs, and tables at its end. Plain lines when the output is not a terminal."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from flows.figures import figure, told
from tasks import events
from tasks.events import Event

PLAIN_SECONDS = 15.0  # between two lines of one stage when the output is not a terminal
PLAIN_WIDTH = 140


def console() -> Console:
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=PLAIN_WIDTH, no_color=True, force_terminal=False)


class Screen:
    """Listens to a pipeline's events and draws them."""

    def __init__(self) -> None:
        self.console = console()
        self.live = self.console.is_terminal
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description:<9}"), BarColumn(24), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*columns, console=self.console, auto_refresh=self.live)
        self.stage = ""
        self.row: TaskID | None = None
        self.shown: tuple[str, ...] = ()
        self.phase = ""  # what the stage does between its steps, such as tokenising
        self.first: tuple[float, int] | None = None  # time and step of the first line of this phase, for the rate
        self.last_line = 0.0

    def __enter__(self) -> Self:
        self.unlisten = events.listen(self.on_event)
        self._start("starting", "Prefect and MLflow")
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.unlisten()
        if self.live:
            self.progress.stop()

    def ready(self) -> None:
        """The servers are there."""
        if self.row is not None and self.live:
            self.progress.remove_task(self.row)
        self.row = None

    def on_event(self, event: Event) -> None:
        about = event.about
        match event.kind:
            case "start":
                self.shown = about["shown"]
                self._start(event.stage, "")
            case "wait":
                self._note(about.get("note", "waiting for another run that builds it"))
            case "resume":
                self._note("goes on from its checkpoint")
            case "step":
                self._step(about["line"])
            case "built":
                self._end(f"built in {_clock(about['artifact']['seconds'])}{self._numbers(about['artifact']['metrics'])}")
            case "reused":
                self._end("reused")
            case "failed":
                self._end("failed", done=False)
            case "warning":
                self.console.print(about["text"], style="yellow", markup=False, soft_wrap=True)

    def _start(self, stage: str, note: str) -> None:
        self.stage, self.phase, self.first, self.last_line = stage, "", None, time.monotonic()
        if self.live:
            self.row = self.progress.add_task(stage, total=None, note=note)
        elif note:
            self._print(note)

    def _step(self, line: dict[str, Any]) -> None:
        step, total, now = int(line.get("step", 0)), int(line.get("total") or 0), time.monotonic()
        if self.phase != (phase := line.get("phase", "")):
            self.phase, self.first = phase, None
        self.first = self.first or (now, step)
        taken, spent = step - self.first[1], now - self.first[0]
        parts = [f"{step}/{total}" if total else f"{step}"]
        if taken > 0 and spent > 0.5:
            parts += [_rate(taken / spent), f"{_clock((total - step) * spent / taken)} left" if total > step else ""]
        text = "  ".join(filter(None, [phase, *parts])) + self._numbers(line)
        if self.live and self.row is not None:
            self.progress.update(self.row, total=total or None, completed=step, note=text)
        elif now - self.last_line > PLAIN_SECONDS:
            self.last_line = now
            self._print(text)

    def _numbers(self, metrics: dict[str, Any]) -> str:
        return "".join(f"  {name} {figure(metrics[name])}" for name in self.shown if name in metrics)

    def _note(self, note: str) -> None:
        if self.live and self.row is not None:
            self.progress.update(self.row, note=note)
        else:
            self._print(note)

    def _end(self, note: str, *, done: bool = True) -> None:
        if self.live and self.row is not None:
            self.progress.update(self.row, total=1, completed=int(done), note=note)
            self.progress.stop_task(self.row)
            self.row = None
        elif not self.live:
            self._print(note)

    def _print(self, text: str) -> None:
        self.console.print(f"{self.stage:<9} {text}", markup=False, soft_wrap=True)


def print_end(summary: dict[str, Any]) -> None:
    """Figures, stages, peak memory, total time, and where the report lies."""
    screen = console()
    figures = Table("figure", "value", box=None, pad_edge=False, header_style="bold")
    for name, value in summary["metrics"].items():
        figures.add_row(name, figure(value))
    stages = Table("stage", "result", "time", "peak MB", "key", box=None, pad_edge=False, header_style="bold")
    for stage in summary["stages"]:
        stages.add_row(stage["name"], told(stage), _clock(stage["seconds"]), f"{stage['peak_mb']:.0f}", stage["key"][:12])
    for table in (figures, stages):
        screen.print()
        screen.print(table)
    largest = max(summary["stages"], key=lambda stage: float(stage["peak_mb"]))
    screen.print(f"\nPeak memory  {largest['peak_mb']:.0f} MB ({largest['name']})\nTotal time   {_clock(summary['seconds'])}", markup=False)
    screen.print(f"Report       {summary['report']}", markup=False, soft_wrap=True)


def print_plan(planned: list[Any]) -> None:
    """One line per stage of a plan."""
    screen = console()
    table = Table("stage", "", "why", box=None, pad_edge=False, header_style="bold")
    for stage in planned:
        reasons = "; ".join(stage.reasons[:6]) + (f"; and {len(stage.reasons) - 6} more" if len(stage.reasons) > 6 else "")
        table.add_row(stage.stage, stage.action, reasons)
    screen.print(table)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s/step"
