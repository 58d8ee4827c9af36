"""Generate a site like Stack Exchange about shell commands from a seed, as the Posts.xml of a dump."""

import html
import math
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import quoteattr

from tasks.demo_site.gold import gold_score
from tasks.demo_site.shell_tasks import SLOTS, TASKS, ShellTask, fill_slots

HOST = "shell.example"
LICENCE = "CC BY-SA 4.0"
_START = datetime(2019, 1, 1)

_CONTEXTS = (
    "I use bash on Debian.",
    "This is for a script.",
    "I am new to Linux.",
    "It is a remote machine.",
    "I have many of them.",
    "Any idea?",
)
_INLINE = ("Use {}.", "Try {}.", "You want {}.", "I would run {}.", "That is {}.")
_BLOCK = ("Use this:", "Try this:", "Run this:", "This does it:")
_OPENERS = ("Good question!", "Sorry for my English.", "Did you try Google?", "Same problem here.")
_CLOSERS = ("Hope this helps!", "Please upvote.", "Thanks in advance.")
_EMPTY_TALK = (
    "Me too.",
    "Same problem here.",
    "Did you try Google? Same problem here.",
    "Me too. Thanks in advance.",
)
_SPAM = (
    "Click here for cheap watches.",
    "Best casino at http://win.example now.",
    "Buy cheap licences at http://deal.example today.",
)
_FENCES = ("```\n```\n```\n```", "``````````", "```\n```\n```")


class Post(NamedTuple):
    """One row of Posts.xml; ``parent`` is None for a question."""

    id: int
    parent: int | None
    accepted: int | None
    date: datetime
    score: int
    title: str | None
    body: str  # HTML
    author: int


class _Answer(NamedTuple):
    """An answer in both formats."""

    markdown: str
    body: str  # HTML


def generate(*, num_questions: int, seed: int) -> Iterator[Post]:
    """Yield the posts of ``num_questions`` questions with 2 to 9 answers each.

    Questions come before their answers, with ids rising from 1.
    """
    rng = random.Random(f"shell-site-{seed}")
    next_id, date = 1, _START
    titles: set[str] = set()
    for _ in range(num_questions):
        date += timedelta(minutes=rng.randint(5, 400))
        thread = list(_generate_thread(rng, next_id, date, titles))
        next_id += len(thread)
        yield from thread


def write_posts(posts: Iterator[Post], path: Path) -> int:
    """Write a dump's Posts.xml and return the number of rows."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\r\n") as file:
        file.write('\ufeff<?xml version="1.0" encoding="utf-8"?>\n<posts>\n')
        for post in posts:
            file.write(f"  {_format_row(post)}\n")
            count += 1
        file.write("</posts>\n")
    return count


def _format_row(post: Post) -> str:
    values = {
        "Id": post.id,
        "PostTypeId": 1 if post.parent is None else 2,
        "ParentId": post.parent,
        "AcceptedAnswerId": post.accepted,
        "CreationDate": post.date.isoformat(timespec="milliseconds"),
        "Score": post.score,
        "Body": post.body,
        "OwnerUserId": post.author,
        "Title": post.title,
        "ContentLicense": LICENCE,
    }
    entities = {"\n": "&#xA;", '"': "&quot;"}
    return (
        "<row "
        + " ".join(
            f"{name}={quoteattr(str(value), entities)}" for name, value in values.items() if value is not None
        )
        + " />"
    )


def _choose_question(rng: random.Random, titles: set[str]) -> tuple[str, ShellTask, dict[str, str]]:
    """Return a title that is not in ``titles`` (unless many draws find none), its task and slots."""
    for _ in range(200):
        task = rng.choice(TASKS)
        slots = {name: rng.choice(values) for name, values in SLOTS.items()}
        title = fill_slots(rng.choice(task.questions), slots)
        if title not in titles:
            break
    titles.add(title)
    return title, task, slots


def _generate_thread(rng: random.Random, first_id: int, date: datetime, titles: set[str]) -> Iterator[Post]:
    title, task, slots = _choose_question(rng, titles)
    body = rng.choice(_CONTEXTS) if rng.random() < 0.5 else title
    num_answers = min(9, 2 + int(rng.expovariate(0.25)))
    answers = [_generate_answer(rng, task, slots) for _ in range(num_answers)]
    golds = [gold_score(title, answer.markdown) for answer in answers]
    views = math.exp(rng.gauss(2.3, 0.6))
    accepted = _choose_accepted(rng, golds)
    yield Post(
        first_id,
        None,
        None if accepted is None else first_id + 1 + accepted,
        date,
        _draw_poisson(rng, views),
        title,
        _paragraph(body),
        rng.randint(1, 900),
    )
    for i, (answer, gold) in enumerate(zip(answers, golds, strict=True), start=1):
        yield Post(
            first_id + i,
            first_id,
            None,
            date + timedelta(minutes=7 * i),
            _draw_votes(rng, gold, views),
            None,
            answer.body,
            rng.randint(1, 900),
        )


def _draw_votes(rng: random.Random, gold: float, views: float) -> int:
    """Draw up-votes, which grow with true quality, minus down-votes, which fall with it."""
    up = _draw_poisson(rng, views * math.exp(0.3 * (gold - 4) + rng.gauss(0, 0.15)))
    return up - _draw_poisson(rng, 0.4 * views * math.exp(-0.35 * max(gold, -6)))


def _choose_accepted(rng: random.Random, golds: list[float]) -> int | None:
    if rng.random() < 0.3:
        return None
    return max(range(len(golds)), key=lambda i: golds[i] + rng.gauss(0, 1.5))


def _generate_answer(rng: random.Random, task: ShellTask, slots: dict[str, str]) -> _Answer:
    """Return an answer of random quality, as Markdown for the gold scorer and as HTML for the dump."""
    kind = rng.random()
    if kind < 0.06:
        return _format_prose(rng.choice(_EMPTY_TALK))
    if kind < 0.09:
        return _format_prose(rng.choice(_SPAM))
    command = fill_slots(
        rng.choice(task.commands[:1] * 3 + task.commands) if rng.random() < 0.6 else rng.choice(task.wrong),
        slots,
    )
    style = rng.random()
    lead, markdown = _format_command(
        rng, command, "block" if style < 0.25 else "span" if style < 0.5 else "plain"
    )
    before = [rng.choice(_OPENERS)] if rng.random() < 0.25 else []
    after = [_choose_fact(rng, task)] if rng.random() < 0.45 else []
    after += [rng.choice(_CLOSERS)] if rng.random() < 0.3 else []
    after += [rng.choice(_SPAM)] if rng.random() < 0.03 else []
    after += [rng.choice(_FENCES)] if rng.random() < 0.04 else []
    return _Answer(
        "\n\n".join(
            [*([" ".join(before)] if before else []), markdown, *([" ".join(after)] if after else [])]
        ),
        "\n\n".join([*map(_paragraph, before), lead, *([_paragraph(" ".join(after))] if after else [])]),
    )


def _choose_fact(rng: random.Random, task: ShellTask) -> str:
    return rng.choice(task.facts if rng.random() < 0.9 else rng.choice(TASKS).facts)


def _format_command(rng: random.Random, command: str, style: str) -> tuple[str, str]:
    """Return the command in a sentence, as (HTML, Markdown)."""
    if style == "block":
        lead = rng.choice(_BLOCK)
        return (
            f"{_paragraph(lead)}\n\n<pre><code>{html.escape(command, quote=False)}\n</code></pre>",
            f"{lead}\n\n```\n{command}\n```",
        )
    sentence = rng.choice(_INLINE)
    if style == "span":
        return (
            f"<p>{sentence.format(f'<code>{html.escape(command, quote=False)}</code>')}</p>",
            sentence.format(f"`{command}`"),
        )
    return _paragraph(sentence.format(command)), sentence.format(command)


def _format_prose(text: str) -> _Answer:
    return _Answer(text, _paragraph(text))


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text, quote=False)}</p>"


def _draw_poisson(rng: random.Random, mean: float) -> int:
    """Draw a Poisson number by Knuth's method, in parts so that a large mean does not underflow."""
    count = 0
    while mean > 0:
        part, mean = min(mean, 30.0), mean - 30.0
        product, limit = rng.random(), math.exp(-part)
        while product > limit:
            count += 1
            product *= rng.random()
    return count
