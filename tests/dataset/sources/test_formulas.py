"""Formulas, regular expressions and paths stay byte for byte on the way to Markdown; code, links and headings beside them stay what they are."""

import html
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tasks.dataset.sources.formulas import BACKSLASH, CLOSE, OPEN, protect, restore
from tasks.dataset.sources.markdown import to_markdown

FORMULAS = [
    r"$\{x : x \le n\}$",
    r"$A=\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}$",
    r"$a\,b\;c\!d$",
    r"$a_i * b_j * c_{k}$ and $_x_$",
    r"$$\int_0^1 f(x)\,dx < \infty \\[2pt] y > 0$$",
    "$$\n- a \\\\\n1. b\n# c\n+  d\n$$",
    r"\(x\_y\) and \[\{ *a* \}\]",
    "\\[\n= b  *  c\n\\]",
    "\\begin{align*}\na &= b \\\\\n- c &= [d](e)\n\\end{align*}",
    r"\$ R_1 \parallel R_2 \, \{x\}\$",
    r"$\text{5\$ a unit}$",
    r"$`a`$",
]
PROSE = [
    r"^\d+\.\d*\s*\[[^\]]*\]$",
    r"s/\(a\)/\1\.\*/",
    r"C:\Users\me\*.txt and \\server\share\_x",
    r"costs $5 and $10, or $3-$4 with US$2",
    r"echo $HOME and $PATH",
    r"\alpha \# \% \& \{ \} \~ \- \! \| \> \< \`",
    "\\- no list",
    r"\begin{x} \( \[ $$ without an end",
]
AROUND = [
    "<p>{}</p>",
    "<p>a {} b</p>",
    "<ul><li>{}</li></ul>",
    "<blockquote><p>{}</p></blockquote>",
    "<h2>{}</h2>",
    "<p><strong>a</strong> {}</p>",
]


@pytest.mark.parametrize("text", FORMULAS + PROSE)
def test_what_is_no_markdown_stays_byte_for_byte(text: str) -> None:
    for around in AROUND:
        assert text in to_markdown(around.format(html.escape(text, quote=False)))


def test_two_blanks_between_prices_are_one_and_in_a_formula_stay() -> None:
    assert to_markdown("<p>$5  or $10,  or $x  y$</p>") == "$5 or $10, or $x  y$"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (r"<p><code>\{ $a\}$</code> \{ $b\}$</p>", r"`\{ $a\}$` \{ $b\}$"),
        ("<pre><code>$\\{a\\}$\n\\begin{x}\n</code></pre>\\{", "```\n$\\{a\\}$\n\\begin{x}\n```\n\n\\{"),
        (r'<p><a href="http://a.example/$b$">$\{c\}$</a></p>', r"[$\{c\}$](http://a.example/$b$)"),
        (r"<p>\[<em>a</em>\]</p>", r"\[*a*\]"),
        (r"<p>$a<br>\{b\}$</p>", "$a\n\\{b\\}$"),
        (r"<p># a \{ 1. $b$</p><p># $c$</p>", "\\# a \\{ 1. $b$\n\n\\# $c$"),
        ("<p>$a</p><p>b$ \\.</p>", "$a\n\nb$ \\."),
        (
            r"<p>\<code>a</code> <em>b\</em> \\<strong>c</strong></p>",
            r"\\`a` *b\\* \\**c**",
        ),  # else they would be no code and no emphasis
    ],
)
def test_what_stands_beside_a_formula_is_markdown(body: str, expected: str) -> None:
    assert to_markdown(body) == expected


BITS = [
    *FORMULAS,
    *PROSE,
    "$",
    "$$",
    "\\",
    "\\[",
    "\\]",
    "\\(",
    "\\)",
    "\\begin{a}",
    "\\end{a}",
    " ",
    "\n",
    "5",
    "x",
    "<",
    "&",
]


@given(
    st.lists(st.sampled_from(BITS) | st.text("$\\{}[]() a5\n<>&", max_size=5), max_size=10).map("".join),
    st.sampled_from(["{}", "<em>{}</em>"]),
)
def test_protecting_and_restoring_changes_nothing(text: str, around: str) -> None:
    found = protect(html.escape(text))
    assert not re.search(r"[\\]", found.html)
    assert html.unescape(restore(found.html, found.formulas)) == text
    markdown = to_markdown(f"<p>a</p><p>{around.format(html.escape(text))}x</p>")
    assert OPEN not in markdown
    assert CLOSE not in markdown
    assert BACKSLASH not in markdown
    if "\\" not in around:
        assert markdown.count("\\") >= text.count("\\")


@given(
    st.lists(
        st.sampled_from(["<em>a</em>", "<code>b</code>", '<a href="c">d</a>', "<strong>e</strong>"]),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 5),
)
def test_a_backslash_before_markup_does_not_undo_it(tags: list[str], count: int) -> None:
    text = to_markdown("<p>x " + ("\\" * count).join(["", *tags]) + "</p>")
    rendered = MarkdownIt("commonmark").render(text)
    for tag in tags:
        assert tag in rendered, text


def test_a_text_with_the_marks_themselves_is_left_alone() -> None:
    assert protect(f"{OPEN}0{CLOSE} $x$") == (f"{OPEN}0{CLOSE} $x$", [])


@pytest.mark.parametrize(
    "text",
    [
        "\\begin{a}",
        "\\begin{a",
        "\\[",
        "\\(",
        "$",
        "$$",
        "$$a",
        "\\$a",
        "\\",
        "$a",
        "<code>\\",
        "<!--\\",
        "\\[<b>",
        "\\]\\[",
        "<code>",
        "$\\",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    before = time.process_time()
    protect(text * 50_000)
    protect(text * 20_000 + "</code>\\]$$\\end{a}")
    assert time.process_time() - before < 3
