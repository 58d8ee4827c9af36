r"""Formulas and backslashes in the HTML of a post, which the way to Markdown must leave as they are.

Between $...$, $$...$$, \(...\), \[...\], \$...\$ (as on electronics.stackexchange.com) and \begin{x}...\end{x} nothing is Markdown, and a backslash
in prose belongs to a path, a regular expression or a command far more often than to Markdown, so none is doubled: \d+\.\w and C:\*.txt stay.
"""

import html
import re
from typing import NamedTuple

# Noncharacters (Unicode 23.7): no text may hold them, and no converter takes them for anything.
OPEN, CLOSE, BACKSLASH = "\ufdd0", "\ufdd1", "\ufdd2"
PLACE = re.compile(f"{OPEN}([0-9]+){CLOSE}")
MARKS = re.compile(f"[{OPEN}{CLOSE}{BACKSLASH}]")
STEP = re.compile(
    r"<(?P<verbatim>pre|code|kbd|script|style)\b"
    r"|<!--|</?[A-Za-z][^>]*>"
    r"|(?P<run>(?:\\\\)+)"
    r"|\\begin\{(?P<name>[A-Za-z]+\*?)\}"
    r"|(?P<pair>\$\$|\\[\[($])"
    r"|(?P<dollar>\$)"
    r"|(?P<one>\\)"
)
ENDS = {"$$": "$$", r"\[": r"\]", r"\(": r"\)", r"\$": r"\$"}
# As pandoc has it: no blank inside next to either $, no digit after the second, so that $5 and $10 are prices.
INLINE = re.compile(r"\$(?![\s$])(?:[^$\\<]|\\[^<]|<br ?/?>|<(?![A-Za-z/!]))*(?<![\s\\])\$(?!\d)")
DOLLARS = re.compile(
    rf"{INLINE.pattern}|\$\$"
)  # the least that a formula without a backslash has: texts with prices are many
BREAK = re.compile(r"<br ?/?>\n?")
TAG = re.compile(r"<(?!br ?/?>)[A-Za-z/!]")
# What a backslash before it would take its meaning from in Markdown: `, *, [, ] and ~ of tags.
MARKUP = re.compile(r"<(?:/?(?:a|b|i|s|em|strong|del|strike)|code|kbd|img)\b")


class Protected(NamedTuple):
    """HTML with a mark in the place of each formula and backslash."""

    html: str
    formulas: list[str]  # as text, by number


def protect(text: str) -> Protected:
    """Replace formulas and backslashes outside code by marks that no converter alters."""
    if MARKS.search(text):
        return Protected(text, [])
    parts: list[str] = []
    formulas: list[str] = []
    ends = _EndFinder(text)
    done = place = 0
    while step := STEP.search(text, place):
        start, place = step.span()
        if step["verbatim"]:
            place = ends.find(f"</{step['verbatim']}>", place)
        elif step[0] == "<!--":
            place = ends.find("-->", place)
        elif step["run"] or step["one"]:
            odd = step["one"] is not None and MARKUP.match(text, place) is not None
            parts += [text[done:start], BACKSLASH * (len(step[0]) + odd)]
            done = place
        elif end := _find_formula_end(step, text, ends):
            parts += [text[done:start], f"{OPEN}{len(formulas)}{CLOSE}"]
            formulas.append(html.unescape(BREAK.sub("\n", text[start:end])))
            done = place = end
        elif step[0][0] == "\\":  # \begin or \( without an end
            parts += [text[done:start], BACKSLASH]
            done = start + 1
    return Protected("".join([*parts, text[done:]]), formulas)


def restore(markdown: str, formulas: list[str]) -> str:
    """Put formulas and backslashes back in the place of their marks."""
    markdown = markdown.replace(BACKSLASH, "\\")
    return PLACE.sub(lambda mark: formulas[int(mark[1])], markdown)


def _find_formula_end(step: re.Match[str], text: str, ends: "_EndFinder") -> int:
    """Return where the formula ends that may begin with this step, 0 if it is none."""
    if step["dollar"]:
        found = INLINE.match(text, step.start())
        return found.end() if found else 0
    if step["name"]:
        closing = f"\\end{{{step['name']}}}"
    elif step["pair"]:
        closing = ENDS[step["pair"]]
    else:
        return 0
    end = ends.find(closing, step.end())
    return end if end <= len(text) and ends.next_tag(step.end()) >= end else 0


class _EndFinder:
    """Where things end in a text. Remembers, so that a text full of beginnings without an end is still read once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.known: dict[str, int] = {}
        self.tag = -1

    def find(self, closing: str, start: int) -> int:
        """Return the place after the first ``closing`` from ``start`` on, or beyond the text."""
        known = self.known.get(closing, -1)
        if known - len(closing) < start:
            place = self.text.find(closing, start)
            known = self.known[closing] = (
                place + len(closing) if place >= 0 else len(self.text) + len(closing) + 1
            )
        return known

    def next_tag(self, start: int) -> int:
        """Return the place of the first tag from ``start`` on, or beyond the text. Line breaks do not count."""
        if self.tag < start:
            found = TAG.search(self.text, start)
            self.tag = found.start() if found else len(self.text) + 1
        return self.tag
