r"""Protect formulas and backslashes in the HTML of a post from the conversion to Markdown.

Between $...$, $$...$$, \(...\), \[...\], \$...\$ (as on electronics.stackexchange.com) and
\begin{x}...\end{x} nothing is Markdown. A backslash in prose belongs to a path, a regular expression or a
command far more often than to Markdown, so none is doubled: \d+\.\w and C:\*.txt are not changed.
"""

import html
import re
from typing import NamedTuple

# Noncharacters (Unicode 23.7): no text may contain them, and they mean nothing to a converter.
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
# Pandoc's rule: no space inside next to either $, no digit after the second, so that $5 and $10 are prices.
INLINE = re.compile(r"\$(?![\s$])(?:[^$\\<]|\\[^<]|<br ?/?>|<(?![A-Za-z/!]))*(?<![\s\\])\$(?!\d)")
DOLLARS = re.compile(
    rf"{INLINE.pattern}|\$\$"
)  # a quick test for formulas without a backslash: many texts have prices
BREAK = re.compile(r"<br ?/?>\n?")
TAG = re.compile(r"<(?!br ?/?>)[A-Za-z/!]")
# Tags that become `, *, [, ] and ~ in Markdown, which a backslash before them would escape.
MARKUP = re.compile(r"<(?:/?(?:a|b|i|s|em|strong|del|strike)|code|kbd|img)\b")


class Protected(NamedTuple):
    """HTML with a mark in place of each formula and backslash."""

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
            is_doubled = step["one"] is not None and MARKUP.match(text, place) is not None
            parts += [text[done:start], BACKSLASH * (len(step[0]) + is_doubled)]
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
    """Return the end of a formula that may begin with this match, 0 if none does."""
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
    """Finds closing marks in a text.

    Results are cached, so that a text with many openings and no end takes linear time.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.known: dict[str, int] = {}
        self.tag = -1

    def find(self, closing: str, start: int) -> int:
        """Return the index after the first ``closing`` from ``start`` on, or beyond the text."""
        known = self.known.get(closing, -1)
        if known - len(closing) < start:
            place = self.text.find(closing, start)
            known = self.known[closing] = (
                place + len(closing) if place >= 0 else len(self.text) + len(closing) + 1
            )
        return known

    def next_tag(self, start: int) -> int:
        """Return the index of the first tag from ``start`` on, or beyond the text.

        Line breaks are ignored.
        """
        if self.tag < start:
            found = TAG.search(self.text, start)
            self.tag = found.start() if found else len(self.text) + 1
        return self.tag
