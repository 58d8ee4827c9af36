r"""Rules for markdown-it that keep formulas as they are written: nothing in them is Markdown.

A formula is $...$ by Pandoc's rule (no space inside next to either $, no digit after the second, so that $5
and $10 are prices), $$...$$, \(...\), \[...\] or \begin{x}...\end{x}.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

# Bounded, or a text of \( alone would take quadratic time; a $ ends at the next one anyway.
FORMULA = re.compile(
    r"\$\$(?:[^$\\]|\\.)+\$\$"
    r"|\$(?![\s$])(?:[^$\\]|\\.)*(?<![\s\\])\$(?!\d)"
    r"|\\\(.{1,1000}?\\\)"
    r"|\\\[.{1,1000}?\\\]"
    r"|\\begin\{([A-Za-z]{1,20}\*?)\}.{0,1000}?\\end\{\1\}",
    re.DOTALL,
)
BLOCK_BEGINNINGS = ("$$", r"\[", r"\begin{")
MAX_LINES = 50  # of a formula that has lines of its own


def add_formulas(parser: MarkdownIt) -> None:
    """Let a parser read formulas as text."""
    parser.inline.ruler.before("escape", "formula", _read_formula)
    parser.block.ruler.before("code", "formula", _read_lines, {"alt": ["paragraph"]})


def _read_formula(state: StateInline, silent: bool) -> bool:
    """Read a formula within a paragraph."""
    if state.src[state.pos] not in "$\\":
        return False
    found = FORMULA.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        for number, line in enumerate(found[0].split("\n")):
            if number:
                state.push("softbreak", "br", 0)
            state.push("text", "", 0).content = line
    state.pos = found.end()
    return True


def _read_lines(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Read a formula that has lines of its own as a paragraph: one of them may look like a list's item."""
    begin = state.bMarks[start] + state.tShift[start]
    if state.is_code_block(start) or not state.src.startswith(BLOCK_BEGINNINGS, begin):
        return False
    stop = start + 1
    while stop < min(end, start + MAX_LINES) and _continues(state, stop):
        stop += 1
    text = state.getLines(start, stop, state.blkIndent, False)
    found = FORMULA.match(text, len(text) - len(text.lstrip()))
    if not found or text[found.end() :].partition("\n")[0].strip():
        return False
    if not silent:
        _push_paragraph(state, found[0], start)
    return True


def _continues(state: StateBlock, line: int) -> bool:
    return not state.isEmpty(line) and state.sCount[line] >= state.blkIndent


def _push_paragraph(state: StateBlock, text: str, start: int) -> None:
    state.line = start + text.count("\n") + 1
    state.push("paragraph_open", "p", 1).map = [start, state.line]
    inline = state.push("inline", "", 0)
    inline.content, inline.map, inline.children = text, [start, state.line], []
    state.push("paragraph_close", "p", -1)
