"""Show rounds on the terminal: one line for each while they run, and a table at their end."""

import time
from typing import Any

from rich.progress import TaskID
from rich.table import Table

from flows.display.formatting import format_not_run
from flows.display.progress import Progress as PipelineProgress
from flows.display.progress import format_duration
from flows.display.rounds_summary import describe_rounds, table_rows
from flows.display.terminal import PLAIN_SECONDS, STARTING, console, make_rows, print_warning, print_warnings
from tasks.system.events import Event


class RoundsScreen:
    """Listens to a pipeline's events and draws one line for each round; plain lines into a file."""

    def __init__(self, starting: str = "Prefect and MLflow") -> None:
        self.starting = starting
        self.console = console()
        self.live = self.console.is_terminal
        self.rows = make_rows(self.console)
        self.progress = PipelineProgress()
        self.row: TaskID | None = None  # of the round at work, on a terminal
        self.title = self.number = ""
        self.printed = time.monotonic()  # when the last line was printed, in a file

    def begin(self) -> None:
        """Show what is waited for."""
        self._begin(STARTING, "", self.starting)

    def ready(self) -> None:
        """The servers are there."""
        if self.row is not None:
            self.rows.remove_task(self.row)
            self.row = None

    def on_event(self, event: Event) -> None:
        stage, about = event.stage, event.about
        self.progress.on_event(event)
        match event.kind:
            case "round":
                number = about["number"]
                self._begin(f"round {number}", f"{number}/{about['count']}" if number else "", "")
            case "round_end":
                self._end(about["text"])
            case "start":
                self._note(stage, "")
            case "wait":
                self._note(stage, about.get("note", "waiting for another run that builds it"))
            case "resume":
                self._note(stage, "goes on from its checkpoint")
            case "step":
                self._note(stage, self.progress.at_work[stage].text(about["line"]))
            case "failed":
                self._note(stage, about.get("how", "failed"), always=True)
            case "not_run":
                self._note(stage, format_not_run(about["causes"]), always=True)
            case "warning":
                print_warning(self.console, f"Warning: {about['text']}")

    def _begin(self, title: str, number: str, note: str) -> None:
        self.title, self.number = title, number
        if self.live:
            self.row = self.rows.add_task(title, total=None, note=note, number=number)
        elif note:
            self._print(note)

    def _note(self, stage: str, text: str, *, always: bool = False) -> None:
        """Show how far the round is; in a file only now and then, or ``always``."""
        place = self.progress.place(stage)
        if self.row is not None:
            self.rows.update(self.row, note=f"{place} {text}")
        elif always or time.monotonic() - self.printed > PLAIN_SECONDS:
            self._print(f"{place} {text}")

    def _end(self, text: str) -> None:
        if self.row is None:
            self._print(text)
            return
        self.rows.update(self.row, total=1, completed=1, note=text)
        self.rows.stop_task(self.row)
        self.row = None

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        self.console.print(f"{self.number:>5} {self.title:<10} {text}", markup=False, soft_wrap=True)


def print_rounds_end(summary: dict[str, Any]) -> None:
    """Print the table of rounds, the files, the warnings of the last round, and the result."""
    screen = console()
    titles, *rows = table_rows(summary)
    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for cells in rows:
        table.add_row(*cells)
    screen.print()
    screen.print(table)
    screen.print()
    facts = {
        "Total time": format_duration(summary["seconds"]),
        "All figures": f"{summary['rounds'][-1]['file']} of the last round, {summary['file']} of all",
        "Report": f"{summary['report']} of the last round",
        "Promotion": _propose(summary),
    }
    for fact, value in facts.items():
        if value:
            screen.print(f"{fact:<12} {value}", markup=False, soft_wrap=True)
    print_warnings(screen, summary["rounds"][-1]["warnings"], of=" of the last round")
    screen.print()
    screen.print(f"Result: {describe_rounds(summary)}", style="bold", markup=False, soft_wrap=True)


def _propose(summary: dict[str, Any]) -> str:
    """Return the command that promotes the best round; "" if there is none, or no run of it in MLflow."""
    return f"`alignflow promote {summary['run']}` judges round {summary['best']}" if summary["run"] else ""
