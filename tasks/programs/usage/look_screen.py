"""Print examples of training texts: colours on a terminal, brackets around what the loss counts elsewhere."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from tasks.config.commands.usage import LookJob
from tasks.programs.usage.beginning import Reading
from tasks.programs.usage.chat_screens import show_text
from tasks.programs.usage.examples import Example, Piece, Reply

CONTROL, COUNTED, WORSE, CUT, NOTE = "magenta", "bold green", "yellow", "red strike", "dim"
OPEN, CLOSE = "\N{LEFT DOUBLE ANGLE BRACKET}", "\N{RIGHT DOUBLE ANGLE BRACKET}"
LONGEST_CUT = 300  # characters that are shown of what is cut
MOST_LINES = 8  # reasons and columns of each kind


def show_examples(console: Console, examples: Sequence[Example], job: LookJob) -> None:
    """Print a legend, and each example with what was cut of it."""
    console.print(_legend(job, has_colour=_has_colour(console)))
    for number, example in enumerate(examples, 1):
        console.print()
        console.print(Text(f"{number}. {example.title}", style="bold"))
        if example.dropped:
            texts = " / ".join(f"{role}: {text}" for role, text in example.dropped)
            console.print(_cut(f"{len(example.dropped)} oldest messages left out", texts))
        console.print(_join([*example.prompt, *example.answer.pieces], has_colour=_has_colour(console)))
        if example.cut:
            console.print(_cut("cut from the end of the question", example.cut))
        _show_reply(console, example.answer, f"prompt {example.num_tokens} tokens, answer")
        if example.worse:
            console.print(Text.assemble(("worse: ", NOTE), _colour(example.worse.pieces, WORSE)))
            _show_reply(console, example.worse, "worse answer")
    console.print()


def show_reading(console: Console, reading: Reading, sentences: Iterable[str]) -> None:
    """Print how the source was read, one line for each thing."""
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(reading.read.items()))
    questions = reading.questions
    compared = int((questions.sizes > 1).sum())
    chats = int((pc.list_value_length(questions.about.column("messages")).to_numpy() > 0).sum())
    console.print(
        f"Read the beginning of the source ({counts}): {len(questions.compared):,} questions, {compared:,} "
        f"with several answers, {chats:,} of several messages."
    )
    for sentence in sentences:
        console.print(sentence)
    _show_counts(console, "Noticed", reading.warnings.noticed)
    _show_counts(console, "Joined to the prompt", reading.warnings.added, "column")
    _show_counts(console, "Not read", reading.warnings.unread, "column")
    _show_counts(console, "Left out", reading.bad)
    _show_counts(console, "Dropped", reading.dropped)
    _show_counts(console, "Masked", reading.masked)


def _show_counts(console: Console, what: str, counts: Counter[str], noun: str = "") -> None:
    counts = +counts  # those above 0
    for name, count in counts.most_common(MOST_LINES):
        console.print(f"{what}: {noun + ' ' if noun else ''}{show_text(name)} ({count:,})", style=NOTE)
    if len(counts) > MOST_LINES:
        console.print(f"{what}: {len(counts) - MOST_LINES:,} more", style=NOTE)


def _has_colour(console: Console) -> bool:
    return console.color_system is not None


def _legend(job: LookJob, *, has_colour: bool) -> Text:
    counted = "counted by the loss of fine-tuning"
    settings = f"text.template={job.text.template}, sft.loss_on={job.loss_on}. "
    if not has_colour:
        return Text(f"{settings}{OPEN}{counted}{CLOSE}")
    parts = (("control tokens", CONTROL), (counted, COUNTED), ("an answer that lost", WORSE), ("cut", CUT))
    names = Text(", ").join(Text(text, style=style) for text, style in parts)
    return Text.assemble((settings, NOTE), names)


def _join(pieces: Sequence[Piece], *, has_colour: bool) -> Text:
    text = Text()
    is_open = False
    for piece in pieces:
        if piece.is_counted != is_open and not has_colour:
            text.append(OPEN if piece.is_counted else CLOSE)
        is_open = piece.is_counted
        style = f"{CONTROL}{' bold underline' if piece.is_counted else ''}" if piece.is_control else ""
        text.append(show_text(piece.text), style=style or (COUNTED if piece.is_counted else None))
    if is_open and not has_colour:
        text.append(CLOSE)
    return text


def _colour(pieces: Sequence[Piece], style: str) -> Text:
    text = Text()
    for piece in pieces:
        text.append(show_text(piece.text), style=CONTROL if piece.is_control else style)
    return text


def _show_reply(console: Console, reply: Reply, what: str) -> None:
    if reply.cut:
        console.print(_cut(f"cut from the end of the {what.rpartition(', ')[2]}", reply.cut))
    console.print(Text(f"{what} {reply.num_tokens} tokens", style=NOTE))


def _cut(what: str, text: str) -> Text:
    shown = text if len(text) <= LONGEST_CUT else f"{text[:LONGEST_CUT]}…"
    struck = show_text(shown.replace("\n", " "))
    return Text.assemble((f"[{what}, {len(text):,} characters: ", NOTE), (struck, CUT), ("]", NOTE))
