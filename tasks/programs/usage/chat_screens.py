"""Show a chat: answers side by side on a terminal, plain lines anywhere else.

A model's text is shown as text: control characters and escape sequences as symbols, markup as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tasks.config.commands.usage import PolicyFiles, Sampling
from tasks.reporting.text import replace_invisible

if TYPE_CHECKING:  # it imports torch, which `alignflow look` does not need
    from tasks.programs.usage.answer import Answer

MIN_COLUMN = 30  # characters; narrower answers are shown one below the other
BORDERS = 4  # characters of a panel's borders and padding
REFRESHES = 12  # a second
RETURN = "\N{SYMBOL FOR CARRIAGE RETURN}"
COLOURS = ("cyan", "magenta", "green", "yellow", "blue")


class Screen(Protocol):
    """What a chat is shown on."""

    def waiting(self, sentence: str, /) -> AbstractContextManager[object]: ...

    def introduce(
        self, policies: Sequence[PolicyFiles], sampling: Sampling, history: bool | None, /
    ) -> None: ...

    def answering(self, question: str, answers: "Sequence[Answer]", /) -> AbstractContextManager[None]: ...

    def say(self, sentence: str) -> None: ...

    def end(self) -> None: ...


def show_text(text: str) -> str:
    """Return a model's text as a terminal shows it: with a symbol for each character that it would obey."""
    return str(replace_invisible(text)).replace("\r", RETURN)


def describe_state(answer: "Answer") -> str:
    """Return how an answer has ended, its length and its speed."""
    parts = [f"{len(answer.ids)} tokens"]
    if answer.is_complete and not answer.has_ended:
        parts[0] += ", cut"
    elif not answer.is_complete:
        parts[0] += ", not ended"
    if answer.seconds:
        parts.append(f"{len(answer.ids) / answer.seconds:.0f}/s")
    if answer.turns_left_out:
        parts.append(f"{answer.turns_left_out} earlier turns left out")
    return " · ".join(parts)


def keeps_history(files: PolicyFiles, wanted: bool | None) -> bool:
    """Return whether a policy answers with the earlier turns in mind.

    By default not if it was trained on single questions: another text before a question misleads it.
    """
    return files.template != "question-answer" if wanted is None else wanted


def describe_settings(files: PolicyFiles, sampling: Sampling, history: bool | None) -> str:
    """Return how a policy's answers are sampled."""
    temperature = files.temperature if sampling.temperature is None else sampling.temperature
    longest = sampling.max_tokens or files.max_answer_tokens
    turns = "" if keeps_history(files, history) else ", each question on its own"
    return f"Temperature {temperature:g}, at most {longest} tokens{turns}"


class TerminalScreen:
    """A terminal: a column for each policy, which grows while it answers."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def waiting(self, sentence: str) -> AbstractContextManager[object]:
        spinner = Spinner("dots", Text(sentence))
        return Live(spinner, console=self.console, transient=True, redirect_stderr=False)

    def introduce(self, policies: Sequence[PolicyFiles], sampling: Sampling, history: bool | None) -> None:
        settings = [describe_settings(files, sampling, history) for files in policies]
        are_equal = len(set(settings)) == 1
        names = Table.grid(padding=(0, 2))
        for number, files in enumerate(policies):
            about = show_text(files.about) + ("" if are_equal else f"; {settings[number]}")
            names.add_row(Text(files.name, _colour(number)), Text(about))
        self.console.print(names)
        if are_equal:
            self.say(settings[0])

    @contextmanager
    def answering(self, question: str, answers: "Sequence[Answer]") -> Iterator[None]:
        """Show answers while they grow; what stays on the screen is their whole text."""
        if question:
            self.console.print(Text(f"> {show_text(question)}", "bold"))
        rows = self.console.height - 4

        def render() -> RenderableType:
            return arrange(answers, self.console.width, rows)

        with Live(
            get_renderable=render, console=self.console, transient=True, refresh_per_second=REFRESHES,
            vertical_overflow="crop", redirect_stderr=False,
        ):  # fmt: skip
            yield
        self.console.print(arrange(answers, self.console.width, None))

    def say(self, sentence: str) -> None:
        self.console.print(Text(show_text(sentence), "dim"))

    def end(self) -> None:
        self.console.print()


def arrange(answers: "Sequence[Answer]", width: int, rows: int | None) -> RenderableType:
    """Return the answers side by side, or one below the other if the terminal is narrow.

    ``rows`` is how many lines there is room for: only the last lines of a longer answer are shown.
    """
    column = width // len(answers)
    if column >= MIN_COLUMN:
        grid = Table.grid(expand=True)
        for _ in answers:
            grid.add_column(ratio=1)
        grid.add_row(*(_panel(one, number, column, rows) for number, one in enumerate(answers)))
        return grid
    share = None if rows is None else max(rows // len(answers), 3)
    return Group(*(_panel(one, number, width, share) for number, one in enumerate(answers)))


def _panel(answer: "Answer", number: int, width: int, rows: int | None) -> Panel:
    text = Text(show_text(answer.text), overflow="fold")
    if rows is not None:
        lines = text.wrap(Console(width=width), max(width - BORDERS, 1), overflow="fold")
        text = Text("\n").join(lines[-max(rows - 2, 1) :])
    return Panel(
        text,
        title=Text(answer.policy.files.name, f"bold {_colour(number)}"),
        subtitle=Text(describe_state(answer), "dim"),
        title_align="left",
        subtitle_align="right",
        box=box.ROUNDED,
        border_style=_colour(number),
    )


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


class PlainScreen:
    """A file or a pipe: each answer when it is complete, after its policy's name if there are several."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def waiting(self, _: str) -> AbstractContextManager[object]:
        return nullcontext()

    def introduce(self, *_: object) -> None:
        pass

    @contextmanager
    def answering(self, _: str, answers: "Sequence[Answer]") -> Iterator[None]:
        yield
        for answer in answers:
            name = f"{answer.policy.files.name}: " if len(answers) > 1 else ""
            self._print(f"{name}{show_text(answer.text)}")

    def say(self, sentence: str) -> None:
        self._print(sentence)

    def end(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self.console.file.write(f"{text}\n")
        self.console.file.flush()
