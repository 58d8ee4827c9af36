"""Chat with one or more policies on the terminal, side by side.

python -m tasks.programs.usage.chat DIR

Questions are lines of the standard input. Nothing is written but the answers, to the standard output.
"""

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

from tasks.config.commands.usage import ChatJob, Sampling
from tasks.programs.runtime.program import Run, main
from tasks.programs.usage.answer import Answer
from tasks.programs.usage.chat_screens import PlainScreen, Screen, TerminalScreen, keeps_history
from tasks.programs.usage.chat_templates import Message
from tasks.programs.usage.loaded_policies import LoadedPolicy, load_policies
from tasks.rlhf.compute import devices, seeds
from tasks.system.errors import InputError

PROMPT = "> "
HELP = (
    "/again samples new answers to the last question, /clear forgets the conversation, /quit or Ctrl-D ends "
    "the chat; Ctrl-C ends an answer."
)
SLICE_SECONDS = 0.05  # that a policy samples before the next one's turn


def chat(job: ChatJob, run: Run) -> None:
    """Answer the lines of the standard input until its end."""
    for stream in (sys.stdin, sys.stdout):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if a script has it ignored
    console = Console(highlight=False, markup=False, emoji=False)
    screen = TerminalScreen(console) if console.is_terminal else PlainScreen(console)
    device = devices.set_up(run.machine.device, run.machine.threads)
    with screen.waiting("Loading " + ", ".join(files.name for files in job.policies)):
        policies = load_policies(job.policies, device)
    session = Session(policies, job.sampling, history=job.history)
    with suppress(BrokenPipeError):
        screen.introduce([policy.files for policy in policies], job.sampling, job.history)
        is_interactive = sys.stdin.isatty()
        if is_interactive:
            screen.say(HELP)
        converse(session, screen, read_question, is_interactive=is_interactive)
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its reader has gone


def read_question() -> str:
    """Return the next line of the standard input. Raises EOFError at its end."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        return input(PROMPT if sys.stdout.isatty() else "")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


class Session:
    """The conversations of several policies with one user."""

    def __init__(self, policies: list[LoadedPolicy], sampling: Sampling, *, history: bool | None) -> None:
        self.policies, self.sampling = policies, sampling
        self.has_history = [keeps_history(policy.files, history) for policy in policies]
        self.histories: list[list[Message]] = [[] for _ in policies]
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.num_asked = 0

    def ask(self, question: str) -> list[Answer]:
        """Return an empty answer of each policy to a question. Raises InputError."""
        asked = Message(role="user", content=question)
        seed = seeds.mix(self.seed, self.num_asked)
        answers = [
            Answer(policy, [*history, asked], self.sampling, seed=seed)
            for policy, history in zip(self.policies, self.histories, strict=True)
        ]
        self.num_asked += 1
        return answers

    def remember(self, question: str, answers: list[Answer]) -> None:
        """Add a question and each policy's own answer to its history, if it has one."""
        for history, answer, is_kept in zip(self.histories, answers, self.has_history, strict=True):
            if is_kept:
                history.append(Message(role="user", content=question))
                history.append(Message(role="assistant", content=answer.text))

    def forget(self, num_turns: int | None = None) -> None:
        """Remove the newest turns from all histories; None: all of them."""
        for history in self.histories:
            del history[0 if num_turns is None else max(0, len(history) - 2 * num_turns) :]


def converse(session: Session, screen: Screen, read: Callable[[], str], *, is_interactive: bool) -> None:
    """Answer each question until there are no more.

    Only an interactive user has commands, and goes on after a question that was refused. Raises InputError.
    """
    last = ""
    while True:
        try:
            line = read().strip()
        except EOFError:
            screen.end()
            return
        except KeyboardInterrupt:
            screen.say(HELP)
            continue
        if not line:
            continue
        if is_interactive and _is_command(line):
            if line == "/quit":
                return
            again = last if line == "/again" else ""
            _obey(line, session, screen, has_asked=bool(last))
            if not again:
                last = "" if line == "/clear" else last
                continue
            line = again
        last = line
        try:
            _answer(session, screen, line, echo=not is_interactive)
        except InputError as error:
            if not is_interactive:
                raise
            screen.say(str(error))


def _is_command(line: str) -> bool:
    return line.startswith("/") and len(line.split()) == 1 and "/" not in line[1:]


def _obey(command: str, session: Session, screen: Screen, *, has_asked: bool) -> None:
    """Carry out a command, but for asking again."""
    if command == "/clear":
        session.forget()
        screen.say("The conversation is forgotten.")
    elif command == "/again" and has_asked:
        session.forget(1)
    elif command == "/again":
        screen.say("There is no question yet.")
    else:
        screen.say(HELP if command == "/help" else f"There is no command {command}. {HELP}")


def _answer(session: Session, screen: Screen, question: str, *, echo: bool) -> None:
    """Sample and show the answers to a question; Ctrl-C ends them where they are. Raises InputError."""
    answers = session.ask(question)
    with screen.answering(question if echo else "", answers), interruptible() as is_interrupted:
        pending = answers
        while pending and not is_interrupted():
            for answer in pending:
                answer.extend(SLICE_SECONDS)
                if is_interrupted():
                    break
            pending = [answer for answer in pending if not answer.is_complete]
    session.remember(question, answers)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; a second Ctrl-C is a KeyboardInterrupt.

    An exception in the middle of a model's forward pass could leave the model with another policy's weights.
    """
    count = 0

    def handle(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main(chat, ChatJob)
