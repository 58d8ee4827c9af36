"""Test that Markdown is rendered as a reader expects, and that no text gets other HTML onto the page."""

import cProfile
import pstats
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.labelling.rendered_markdown import MAX_CHARS, render_markdown
from tests.support.pages.html_tags import Tags

LINK = 'rel="noreferrer noopener nofollow" target="_blank"'

# 1. What each text becomes.
GOLDEN = {
    "two\nlines of *one* `x < 1`": "<p>two<br />\nlines of <em>one</em> <code>x &lt; 1</code></p>",
    "```python onclick=x\nif a < b:\n\n    pass": "<pre><code>if a &lt; b:\n\n    pass</code></pre>",
    "# a\n\n## b\n\n###### c": "<h3>a</h3>\n<h4>b</h4>\n<h6>c</h6>",
    "3. a\n4. ~~b~~": '<ol start="3">\n<li>a</li>\n<li><s>b</s></li>\n</ol>',
    "123456789. a": '<ol start="123456789" class="long">\n<li>a</li>\n</ol>',
    "|a|b|\n|-|-:|\n|1|2|": (
        '<table>\n<thead>\n<tr>\n<th>a</th>\n<th class="right">b</th>\n</tr>\n</thead>\n'
        '<tbody>\n<tr>\n<td>1</td>\n<td class="right">2</td>\n</tr>\n</tbody>\n</table>'
    ),
    '[a](http://b.c "t")': f'<p><a href="http://b.c" title="http://b.c" {LINK}>a</a></p>',
    "[](http://b.c)": f'<p><a href="http://b.c" title="http://b.c" {LINK}>http://b.c</a></p>',
    "<a@b.c>": f'<p><a href="mailto:a@b.c" title="mailto:a@b.c" {LINK}>a@b.c</a></p>',
    "![a *b*](http://c/d)": f'<p><a href="http://c/d" title="http://c/d" {LINK}>image: a b</a></p>',
    "![](http://c/d)": f'<p><a href="http://c/d" title="http://c/d" {LINK}>image: http://c/d</a></p>',
    "[![a](http://b)](http://c)": f'<p><a href="http://c" title="http://c" {LINK}>image: a</a></p>',
    "<b onclick=x>a</b>": "<p>&lt;b onclick=x&gt;a&lt;/b&gt;</p>",
    "<!-- a -->": "<p>&lt;!-- a --&gt;</p>",
    "\u202ea &#x202E; `\u2066`": "<p>[U+202E]a [U+202E] <code>[U+2066]</code></p>",
    "\x1b[31m": "<p>\u241b[31m</p>",
    "It is $a_1*b*c_1$ for $5 *or* $10": "<p>It is $a_1*b*c_1$ for $5 <em>or</em> $10</p>",
    r"\(a*b*c\) \$*a*": r"<p>\(a*b*c\) $<em>a</em></p>",
    "So\n$$\na\n- b\n$$\n- c": "<p>So</p>\n<p>$$<br />\na<br />\n- b<br />\n$$</p>\n<ul>\n<li>c</li>\n</ul>",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_markdown_is_rendered(text: str) -> None:
    found = render_markdown(text).rstrip("\n")
    assert found.replace("\n</code></pre>", "</code></pre>") == GOLDEN[text]


@pytest.mark.parametrize("address", ["javascript:x", "JaVaScRiPt:x", "data:text/html,x", "//b.c", "#a", "/a"])
@pytest.mark.parametrize("form", ["[a]({})", "![a]({})", "<{}>", "[a]\n\n[a]: {}", "[a](<{}>)"])
def test_links_of_other_schemes_stay_text(form: str, address: str) -> None:
    text = form.format(address)
    found = Tags(render_markdown(text))
    assert {tag for tag, _ in found.opened} <= {"p", "br"}
    assert found.words.split() == re.findall(r"\S+", text.replace("\n\n", " "))


# 2. What is shown as it is.
@pytest.mark.parametrize(
    "text",
    [
        "[a]: http://b.c",
        "[a]: http://b.c\n\n&nbsp;&#8203;",
        "#",
        "***",
        "```\n \n```",
        "- " * 40,
        "> " * 30 + "hidden",
        "- a\n\n" + "- " * 12 + "hidden",
        "a" * (MAX_CHARS + 1),
        "",
    ],
)
def test_a_text_whose_rendering_would_hide_it_is_shown_as_it_is(text: str) -> None:
    assert render_markdown(text) == ""


@pytest.mark.parametrize("depth", range(1, 30))
@pytest.mark.parametrize("mark", ["> ", "- ", "1. "])
def test_no_nesting_loses_a_text(mark: str, depth: int) -> None:
    text = f"seen\n\n{mark * depth}deep"
    assert "deep" in (render_markdown(text) or text)


# 3. What no text can do.
BLOCKS = "p h3 h4 h5 h6 ul li pre code blockquote hr br em strong s table thead tbody tr".split()
ATTRIBUTES = {name: set[str]() for name in BLOCKS} | {
    "a": {"href", "title", "rel", "target"},
    "ol": {"start", "class"},
    "th": {"class"},
    "td": {"class"},
}
VALUES = {
    "href": r"(?i:https?://[^/\s]\S*|mailto:\S+)",
    "title": r"(?i:https?://[^/\s]\S*|mailto:\S+)",
    "rel": "noreferrer noopener nofollow",
    "target": "_blank",
    "start": "[0-9]{1,9}",
    "class": "left|center|right|long",
}
LINES = [*"``` ~~~ --- |a|b| |:-|-:| |1|2|".split(), "> ", "- ", "1. ", "# ", "```sh x", "[a]: ", "    "]
WORDS = (
    "``` ]( ![ [a] http://b.c https: mailto:a@b.c javascript:alert(1) data:,x //b [a](http://b.c) "
    "![a](http://b.c) <script> </script> <style> <svg/onload=x> <!-- --> <? &lt; &#x202E; &#0; &quot; "
    "style=x $a$ $$ \\( \\) \\begin{a} \0 \x0c \u202e \u200b \ud7ff é 😀 word 12345678901."
).split(" ")
PIECES = [
    *"`~*_[]()<>!#|-+:&\\$\"' \n\t>.=",
    *("\n\n" + line for line in LINES),
    *("\n" + line for line in LINES),
    *WORDS,
    *("\n\n|a|b|\n|:-|-:|\n|1|2|\n", "<img src=x onerror=alert(1)>", '" onclick="x', "\r\n", "\n\n7. a"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=6, max_size=60).map("".join)


@settings(max_examples=300)
@given(TEXTS)
def test_a_text_gets_no_other_tags_and_attributes_onto_the_page(text: str) -> None:
    found = Tags(render_markdown(text))
    assert not found.open
    for tag, attributes in found.opened:
        assert tag in ATTRIBUTES
        assert set(attributes) <= ATTRIBUTES[tag]
        assert tag != "a" or set(attributes) == ATTRIBUTES["a"]
        for name, value in attributes.items():
            assert re.fullmatch(VALUES[name], value or ""), (name, value)
    assert not {*found.text} & {"\u202e", "\0", "\x0c"}


@given(TEXTS)
def test_what_is_rendered_is_seen(text: str) -> None:
    html = render_markdown(text)
    assert html == "" or Tags(html).text.strip()


SLOW = ["[", "![[", "**a", "- a\n", "a\n", "*_", "\\[\n", "$$\n", "\\begin{a}\n", "> ", "[a](b ", "`", "<a "]


@pytest.mark.parametrize("piece", SLOW)
def test_a_long_text_takes_linear_time(piece: str) -> None:
    """Compare the steps of one text with those of one that is four times as long: 16 times is quadratic."""
    counts = [_count_calls(piece * (size // len(piece))) for size in (2_000, 8_000)]
    assert counts[1] < 8 * counts[0]


def _count_calls(text: str) -> int:
    profile = cProfile.Profile()
    profile.runcall(render_markdown, text)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
