"""Score the true quality of an answer on the built-in site.

Only the site's generator and the evaluation may import this gold scorer, and PPO's independent score
(ppo.score.by=gold), which watches the training from outside. No training program reads it; in
rounds, comparisons may be its labels (rounds.labels.kind=gold), with planted mistakes.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from tasks.demo_site.shell_tasks import SLOTS, TASKS, ShellTask, fill_slots

NOISE = (
    "me too",
    "same problem here",
    "good question",
    "thanks in advance",
    "hope this helps",
    "please upvote",
    "sorry for my english",
    "did you try google",
)
SPAM = ("http://", "casino", "cheap", "click here")
PERFECT = 10.0


class Findings(NamedTuple):
    """Merits and faults of one answer."""

    right: bool  # does what the question asks and shows no other command
    formatted: bool  # a command stands in code
    explained: bool  # a true sentence about the right command
    misleading: int  # sentences that explain another task's command
    noise: int
    spam: int
    fence_run: bool  # code fences that hold nothing or do not close
    repeated: int
    truncated: bool  # stops in mid-sentence, or is empty

    @property
    def score(self) -> float:
        """Points: 10 for a perfect answer; may be negative."""
        worth = 6.0 * self.right + 2.0 * self.formatted + 2.0 * self.explained
        faults = (
            self.misleading + self.noise + 3 * self.spam + 2 * self.fence_run + self.repeated + self.truncated
        )
        return worth - 2.0 * faults


def gold_score(question: str, answer: str) -> float:
    """Return the true quality of an answer to a question, both in Markdown.

    The question's first line is its title. Raises ValueError for a question that is not of this site.
    """
    return find_faults(question, answer).score


def find_faults(question: str, answer: str) -> Findings:
    """Return the merits and faults that ``gold_score`` adds up."""
    task, slots = recognise_task(question.strip().split("\n", 1)[0].strip())
    answer = answer.replace("\\`", "`")  # Markdown escapes a run of backticks that opens a paragraph
    accepted = {fill_slots(command, slots) for command in task.commands}
    code, fence_run = _find_code(answer)
    prose = _remove_escapes(re.sub(r"```.*?(```|$)|`[^`\n]*`", " ", answer, flags=re.DOTALL)).lower()
    shown = bool(code) and all(piece in accepted for piece in code)
    plain = not code and any(_contains_command(_remove_escapes(answer), command) for command in accepted)
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", prose.strip()) if len(s) > 8]
    return Findings(
        right=shown or plain,
        formatted=bool(code),
        explained=any(fact.lower() in prose for fact in task.facts),
        misleading=sum(fact.lower() in prose for fact in _all_facts() - set(task.facts)),
        noise=sum(phrase in prose for phrase in NOISE),
        spam=sum(phrase in prose for phrase in SPAM),
        fence_run=fence_run,
        repeated=len(sentences) - len(set(sentences)) + len(code) - len(set(code)),
        truncated=not answer.rstrip().endswith((".", "!", "?", "`")),
    )


@lru_cache(maxsize=4096)
def recognise_task(title: str) -> tuple[ShellTask, dict[str, str]]:
    """Return the task that a question's title asks for, and the values of its slots."""
    for task, pattern in _build_patterns():
        if match := pattern.fullmatch(_remove_escapes(title)):
            return task, match.groupdict()
    raise ValueError(f"not a question of the built-in site: {title[:80]!r}")


def _find_code(answer: str) -> tuple[list[str], bool]:
    """Return the code in a Markdown text, and whether its fences are empty or unbalanced."""
    blocks = re.findall(r"```[a-z]*\n(.*?)\n?```", answer, flags=re.DOTALL)
    fence_run = answer.count("```") != 2 * len(blocks) or any(not block.strip() for block in blocks)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?(```|$)", " ", answer, flags=re.DOTALL))
    return [piece.strip() for piece in blocks + inline if piece.strip()], fence_run


def _contains_command(text: str, command: str) -> bool:
    """Return whether ``text`` contains ``command`` as a separate word."""
    return re.search(r"(?:^|\s)" + re.escape(command) + r"\.?(?=\s*$|\n|\s+[A-Z])", text) is not None


def _remove_escapes(text: str) -> str:
    return re.sub(r"\\([^\w\s])", r"\1", text)


@lru_cache(maxsize=1)
def _all_facts() -> frozenset[str]:
    return frozenset(fact for task in TASKS for fact in task.facts)


@lru_cache(maxsize=1)
def _build_patterns() -> list[tuple[ShellTask, re.Pattern[str]]]:
    return [(task, re.compile(_build_pattern(question))) for task in TASKS for question in task.questions]


def _build_pattern(question: str) -> str:
    seen: set[str] = set()

    def slot(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(map(re.escape, SLOTS[name]))})"

    pieces = re.split(r"(\{\w+\})", question)
    parts = []
    for piece in pieces:
        match = re.fullmatch(r"\{(\w+)\}", piece)
        parts.append(slot(match) if match else re.escape(piece))
    return "".join(parts)
