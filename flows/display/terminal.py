"""Show a run on the terminal: a line per stage while it runs, and tables at its end.

Plain lines when the output is not a terminal.
"""

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column, Table

from flows.display.formatting import format_metric, format_not_run, format_outcome, key_figures
from flows.display.progress import Progress as PipelineProgress
from flows.display.progress import format_duration
from flows.display.run_end import describe_end
from tasks.system import events
from tasks.system.events import Event
from tasks.tracking.program_log import clean

PLAIN_SECONDS = 15.0  # between two lines of one stage when the output is not a terminal
PLAIN_WIDTH = 140
STARTING = "starting"  # what the first row says until the servers are there
S = TypeVar("S", bound="Drawn")
BAR_WIDTH, WIDE = 24, 110  # columns of a bar, and of a terminal that has room for one


def console() -> Console:
    screen = Console(highlight=False)
    return (
        screen
        if screen.is_terminal
        else Console(highlight=False, width=PLAIN_WIDTH, no_color=True, force_terminal=False)
    )


def make_rows(screen: Console) -> Progress:
    """Return the rows of a terminal: a number, a title, a bar if there is room for one, and a note each."""
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.fields[number]:>5}"),
        TextColumn("{task.description:<10}"),
    )
    bar = (BarColumn(BAR_WIDTH),) if screen.width >= WIDE else ()
    note = TextColumn(
        "{task.fields[note]}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
    )
    return Progress(*columns, *bar, note, console=screen, auto_refresh=screen.is_terminal, expand=True)


class Drawn(Protocol):
    """What listens to a pipeline's events and draws them in rows."""

    rows: Progress

    def begin(self) -> None:
        """Draw what is shown before the first event."""

    def on_event(self, event: Event) -> None:
        """Draw an event."""


@contextmanager
def drawing(screen: S) -> Iterator[S]:
    """Hand a pipeline's events to a screen while the block runs; on a terminal its rows move meanwhile."""
    unlisten = events.listen(screen.on_event)
    screen.begin()
    moving = screen.rows if screen.rows.console.is_terminal else nullcontext()
    try:
        with moving:
            yield screen
    finally:
        unlisten()


class Screen:
    """Listens to a pipeline's events and draws them; ``starting`` is what it waits for at first."""

    def __init__(self, starting: str = "Prefect and MLflow") -> None:
        self.starting = starting
        self.console = console()
        self.live = self.console.is_terminal
        self.rows = make_rows(self.console)
        self.progress = PipelineProgress()
        self.row_of: dict[str, TaskID] = {}  # of the stages at work, on a terminal
        self.printed: dict[str, float] = {}  # when a stage's last line was printed, in a file

    def begin(self) -> None:
        """Show what is waited for."""
        if self.starting:
            self._start(STARTING, self.starting)

    def ready(self) -> None:
        """The servers are there."""
        if STARTING in self.row_of:
            self.rows.remove_task(self.row_of.pop(STARTING))

    def on_event(self, event: Event) -> None:
        stage, about = event.stage, event.about
        self.progress.on_event(event)
        match event.kind:
            case "start":
                self._start(stage, "")
            case "wait":
                self._note(stage, about.get("note", "waiting for another run that builds it"))
            case "resume":
                self._note(stage, "goes on from its checkpoint")
            case "step":
                self._step(stage, about["line"])
            case "built":
                artifact = about["artifact"]
                metrics = self.progress.at_work[stage].metrics(artifact["metrics"])
                self._end(stage, "  ".join([f"built in {format_duration(artifact['seconds'])}", *metrics]))
            case "reused":
                self._end(stage, "reused")
            case "failed":
                self._end(stage, about.get("how", "failed"), done=False)
            case "not_run":
                self._start(stage, "")
                self._end(stage, format_not_run(about["causes"]), done=False)
            case "warning":
                print_warning(self.console, f"Warning: {about['text']}")

    def _start(self, stage: str, note: str) -> None:
        self.printed[stage] = time.monotonic()
        if self.live:
            number = self.progress.number(stage)
            self.row_of[stage] = self.rows.add_task(stage, total=None, note=note, number=number)
        elif note:
            self._print(stage, note)

    def _step(self, stage: str, line: dict[str, Any]) -> None:
        text, now = self.progress.at_work[stage].text(line), time.monotonic()
        if stage in self.row_of:
            total, completed = line.get("total") or None, line.get("step", 0)
            self.rows.update(self.row_of[stage], total=total, completed=completed, note=text)
        elif now - self.printed[stage] > PLAIN_SECONDS:
            self.printed[stage] = now
            self._print(stage, text)

    def _note(self, stage: str, note: str) -> None:
        if stage in self.row_of:
            self.rows.update(self.row_of[stage], note=note)
        else:
            self._print(stage, note)

    def _end(self, stage: str, note: str, *, done: bool = True) -> None:
        if stage in self.row_of:
            row = self.row_of.pop(stage)
            self.rows.update(row, total=1, completed=int(done), note=note)
            self.rows.stop_task(row)
        elif not self.live:
            self._print(stage, note)

    def _print(self, stage: str, text: str) -> None:
        number = self.progress.number(stage)
        self.console.print(f"{number:>5} {stage:<10} {text}", markup=False, soft_wrap=True)


def print_end(summary: dict[str, Any]) -> None:
    """Print the stages, the key figures, the files with all others, and last the warnings and the result."""
    screen = console()
    stages = Table("stage", "result", "time", "peak MB", "key", box=None, pad_edge=False, header_style="bold")
    for stage in summary["stages"]:
        stages.add_row(
            stage["name"],
            format_outcome(stage),
            format_duration(stage["seconds"]),
            f"{stage['peak_mb']:.0f}",
            stage["key"][:12],
        )
    for name in summary["failed"]:
        stages.add_row(name, "failed")
    for name, causes in summary["not_run"].items():
        stages.add_row(name, format_not_run(causes))
    shown = key_figures(summary["metrics"])
    figures = Table("figure", "value", box=None, pad_edge=False, header_style="bold")
    for name in shown:
        figures.add_row(name, format_metric(summary["metrics"][name]))
    for table in (stages, figures) if shown else (stages,):
        screen.print()
        screen.print(table)
    largest = max(summary["stages"], key=lambda stage: float(stage["peak_mb"]))
    facts = {
        "Peak memory": f"{largest['peak_mb']:.0f} MB ({largest['name']})",
        "Total time": format_duration(summary["seconds"]),
        "All figures": f"{len(summary['metrics'])} in {summary['file']}",
        "Report": summary["report"],
    }
    screen.print()
    for fact, value in facts.items():
        screen.print(f"{fact:<12} {value}", markup=False, soft_wrap=True)
    warnings = [
        f"{stage['name']}: {sentence}" for stage in summary["stages"] for sentence in stage["warnings"]
    ]
    print_warnings(screen, warnings)
    screen.print()
    screen.print(
        _wrapped(screen, f"Result: {describe_end(summary)}"), style="bold", markup=False, soft_wrap=True
    )


def print_warnings(screen: Console, warnings: list[str], of: str = "") -> None:
    """Print a heading and the warnings below it; nothing if there are none."""
    if warnings:
        title = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}{of}"
        screen.print(f"\n{title}", style="bold yellow")
    for text in warnings:
        print_warning(screen, f"- {text}")


def print_warning(screen: Console, text: str) -> None:
    """Print a warning; on a terminal broken between words, never inside a path."""
    screen.print(_wrapped(screen, clean(text)), style="yellow", markup=False, soft_wrap=True)


def _wrapped(screen: Console, text: str) -> str:
    if not screen.is_terminal:
        return text
    return textwrap.fill(
        text, max(screen.width, 20), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def print_plan(planned: list[Any], end: str = "") -> None:
    """One line per stage of a plan; ``end`` says what follows the last round of a plan of rounds."""
    screen = console()
    rounds = [Column("round", justify="right")] if end else []
    table = Table(*rounds, "stage", "", "why", box=None, pad_edge=False, header_style="bold")
    for stage, before in zip(planned, [None, *planned[:-1]], strict=True):
        reasons = "; ".join(stage.reasons[:6]) + (
            f"; and {len(stage.reasons) - 6} more" if len(stage.reasons) > 6 else ""
        )
        is_new = before is None or before.round != stage.round
        number = [str(stage.round) if is_new else ""] if end else []
        table.add_row(*number, stage.stage, stage.action, reasons)
    screen.print(table)
    if end:
        screen.print(f"\n{end}", markup=False)
