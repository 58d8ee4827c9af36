"""HTML to Markdown: what it promises, read back by another program's Markdown parser from random texts, and every code block of real posts."""

import html
import re
import string
import time
from typing import Any

import html_to_markdown
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lxml import etree
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from tasks.dataset.sources import markdown
from tasks.dataset.sources.markdown import to_markdown
from tests.support.paths import SHARED

DUMPS = SHARED / "data" / "stackexchange"
real_data = pytest.mark.skipif(
    not DUMPS.is_dir(), reason="the real dumps of shared/data are not on this machine"
)
PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")


def tree_of(text: str) -> SyntaxTreeNode:
    return SyntaxTreeNode(PARSER.parse(text))


def nodes(text: str, kind: str) -> list[SyntaxTreeNode]:
    return [node for node in tree_of(text).walk() if node.type == kind]


# ------------------------------------------------------------------------------------------------------------------------- code

TRICKY = [
    "`",
    "``",
    "```",
    "````",
    "~~~",
    "\n",
    "\n\n",
    "    ",
    "\t",
    "- ",
    "> ",
    "# ",
    "1. ",
    "<b>",
    "</code></pre>",
    "<!--",
    "&lt;",
    "&#10;",
    "$",
    "|",
    "data:",
]
LINE = st.characters(exclude_categories=["Cs", "Cc"])
CODE = (
    st.lists(st.sampled_from(TRICKY) | st.text(LINE, max_size=6), max_size=12)
    .map("".join)
    .filter(lambda code: code.strip("\n"))
)
PLACES = [
    "{}",
    "<p>a</p>\n\n{}\n\n<p>b</p>",
    "<p>a</p>{}<p>b</p>",
    "a{}b",
    "{}{}",
    "<ul>\n<li>a {}</li>\n<li>b</li>\n</ul>",
    "<ul>\n<li><p>a</p>\n\n{}\n\n<p>b</p></li>\n<li><p>c</p></li>\n</ul>",
    "<ol start='99'><li>{}</li></ol>",
    "<ol><li>a<ul><li>{}b</li></ul></li></ol>",
    "<blockquote>\n  <p>a</p>\n\n{}\n</blockquote>",
    "<blockquote>{}</blockquote>",
    "<p>a</p><blockquote><blockquote>{}</blockquote></blockquote>",
    "<blockquote><ol><li>a{}</li></ol></blockquote>",
    "<ul><li><blockquote><p>a</p>{}</blockquote></li></ul>",
    "<div>{}</div>",
    "<h2></h2>{}<h2>b</h2>",
    "<dl><dt>a</dt><dd>{}</dd></dl>",
    "<table><tr><td>a</td></tr></table>{}",
]
LANGUAGES = {
    "": "",
    ' class="lang-py prettyprint-override"': "py",
    ' class="lang-c# s-code-block"': "c#",
    ' class="snippet-code-js lang-js prettyprint-override"': "js",
    ' class="default prettyprint prettyprinted"': "",
}


@given(CODE, st.sampled_from(PLACES), st.sampled_from(sorted(LANGUAGES)))
@example("x", PLACES[11], "")  # a quote in a quote
def test_a_code_block_survives_byte_for_byte_wherever_it_stands(code: str, place: str, language: str) -> None:
    block = f"<pre{language}><code>{html.escape(code)}\n</code></pre>"
    found = nodes(to_markdown(place.replace("{}", block)), "fence")
    assert [node.content for node in found] == [code.removeprefix("\n").rstrip("\n") + "\n"] * place.count(
        "{}"
    )
    assert {node.info for node in found} == {LANGUAGES[language]}


def test_a_code_block_in_other_words() -> None:
    assert to_markdown('<pre><code class="lang-python">x\n</code></pre>') == "```python\nx\n```"
    assert (
        to_markdown(
            '<pre class="s-code-block"><code class="hljs language-py"><span class="k">def</span> x</code></pre>'
        )
        == "```py\ndef x\n```"
    )
    assert to_markdown("<pre>  no code\n x</pre>") == "```\n  no code\n x\n```"
    assert to_markdown("<pre><code>a\r\nb\rc\0d</code></pre>") == "```\na\nb\ncd\n```"  # as HTML reads it
    assert to_markdown("<p>a</p><pre><code></code></pre><p>b</p>") == "a\n\nb"


@given(
    st.lists(st.sampled_from(TRICKY) | st.text(LINE, max_size=4), min_size=1, max_size=8)
    .map("".join)
    .filter(str.strip)
)
def test_inline_code_survives(code: str) -> None:
    code = " ".join(code.split("\n"))
    markdown = to_markdown(f"<p>a <code>{html.escape(code)}</code> b</p>")
    found = re.fullmatch(r"a (`+)(.*)\1 b", markdown, re.DOTALL)
    assert found
    assert found[2] in (
        code,
        f" {code} ",
    )  # code that begins or ends with a backtick is padded, and Markdown takes the padding away
    (node,) = nodes(markdown, "code_inline")
    assert node.content in (code, code[1:-1])  # what Markdown cannot say: a space at either end


@real_data
@pytest.mark.parametrize("dump", ["ai", "stackoverflow-2008"])
def test_every_code_block_of_real_posts_survives(dump: str) -> None:
    bodies = [row.get("Body", "") for row in etree.parse(DUMPS / dump / "Posts.xml").getroot()]
    posts = [body.replace("\r\n", "\n") for body in bodies if "<pre" in body]
    for body in posts:
        blocks = [
            html.unescape(re.sub("<[^>]*>", "", block)).strip("\n")
            for block in re.findall("(?s)<pre.*?>(.*?)</pre>", body)
        ]
        assert [node.content.strip("\n") for node in nodes(to_markdown(body), "fence")] == [
            block for block in blocks if block
        ]
    assert len(posts) > 20
    assert (
        sum(bool(markdown.UNUSUAL.search(body)) for body in bodies) < len(bodies) / 10
    )  # the others are converted the quick way


# -------------------------------------------------------------------------------------------------------------------- structure

Block = tuple[Any, ...]  # its kind, then its text or what is in it
WORDS = st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=5), min_size=1, max_size=3).map(
    " ".join
)
LEAVES = st.one_of(
    st.tuples(st.just("paragraph"), WORDS),
    st.tuples(st.just("heading"), WORDS),
    st.tuples(st.just("fence"), WORDS.map(lambda text: f" {text}\n\n{text}\n")),
)


def apart(blocks: list[Block]) -> list[Block]:
    """Blocks with a paragraph before each, as two lists or quotes in a row are one in Markdown."""
    return [part for block in blocks for part in (("paragraph", "x"), block)]


def around(inner: st.SearchStrategy[Block]) -> st.SearchStrategy[Block]:
    contents = st.lists(inner, min_size=1, max_size=2).map(apart)
    items = st.lists(contents, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("blockquote"), contents),
        st.tuples(st.just("bullet_list"), items),
        st.tuples(st.just("ordered_list"), items, st.integers(0, 200)),
    )


def html_of(block: Block) -> str:
    """A block as Stack Exchange writes it."""
    kind, inner, *start = block
    if kind in ("paragraph", "heading"):
        tag = "p" if kind == "paragraph" else "h2"
        return f"<{tag}>{inner}</{tag}>"
    if kind == "fence":
        return f"<pre><code>{inner}</code></pre>"
    if kind == "blockquote":
        return "<blockquote>\n" + "\n\n".join(map(html_of, inner)) + "\n</blockquote>"
    items = "\n".join("<li>" + "\n\n".join(map(html_of, item)) + "</li>" for item in inner)
    return f"<ul>\n{items}\n</ul>" if kind == "bullet_list" else f'<ol start="{start[0]}">\n{items}\n</ol>'


def block_of(node: SyntaxTreeNode) -> Block:
    """What the Markdown parser found, in the form of a block."""
    if node.type in ("paragraph", "heading"):
        return node.type, node.children[0].content
    if node.type == "fence":
        return node.type, node.content
    if node.type == "blockquote":
        return node.type, [block_of(child) for child in node.children]
    items = [[block_of(child) for child in item.children] for item in node.children]
    return (
        (node.type, items)
        if node.type == "bullet_list"
        else (node.type, items, int(node.attrs.get("start", 1)))
    )


@given(st.lists(st.recursive(LEAVES, around, max_leaves=6), min_size=1, max_size=4).map(apart))
@settings(deadline=None)
def test_quotes_lists_headings_and_code_survive_in_each_other(blocks: list[Block]) -> None:
    text = to_markdown("\n\n".join(map(html_of, blocks)))
    assert [block_of(node) for node in tree_of(text).children] == blocks, text


ADDRESS = st.text("ab/._-~%20?&=#()[]<>\"'*!,;: é", max_size=12).map(lambda text: f"http://a.example/{text}/")
LABEL = st.text("ab ()[]!#", min_size=1, max_size=8).map(lambda text: f"a{text}b")


@given(ADDRESS, LABEL, st.booleans())
def test_links_and_images_keep_address_and_words(address: str, label: str, image: bool) -> None:
    quoted = html.escape(address), html.escape(label)
    text = to_markdown(
        "<p>x %s y</p>"
        % ('<img src="%s" alt="%s">' if image else '<a href="%s" rel="nofollow">%s</a>')
        % quoted
    )
    (node,) = nodes(text, "image" if image else "link")
    assert node.attrs["src" if image else "href"] == PARSER.normalizeLink(address)
    assert "".join(child.content for child in node.walk() if child.type == "text").split() == label.split()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<p>Press <kbd>Ctrl</kbd>+<kbd>C</kbd></p>", "Press `Ctrl`+`C`"),
        ("<p>a</p>\n\n<hr>\n\n<p>b</p>", "a\n\n---\n\nb"),
        ("<h1>a</h1>\n\n<h3>b <em>c</em></h3>", "# a\n\n### b *c*"),
        ("<p>a <strong>b <em>c</em></strong> <del>d</del> <strike>e</strike></p>", "a **b *c*** ~~d~~ ~~e~~"),
        ("<p>a<br>\nb<br/>c</p>", "a  \nb  \nc"),
        ('<blockquote class="spoiler"><p>a</p></blockquote>', "> a"),
        ('<p><a href="u"><img src="i.png" alt="a"></a></p>', "[![a](i.png)](u)"),
        ("<ul><li>a</li><li>b<ol start='7'><li>c</li></ol></li></ul>", "- a\n- b\n\n  7. c"),
        (
            "<table><thead><tr><th>a</th><th>b|c</th></tr></thead><tbody><tr><td>1</td><td><code>x|y</code></td></tr></tbody></table>",
            "| a | b\\|c |\n| --- | --- |\n| 1 | `x\\|y` |",
        ),
        (
            "<p>H<sub>2</sub>O is no 101<sub>2</sub>, 1<sup>st</sup> no 10<sup>-6</sup>m<sup>2</sup></p>",
            "H2O is no 101_2, 1st no 10^-6m^2",
        ),
        (
            "<p>2<sup>n</sup></p><pre><code>2&lt;sup&gt;n&lt;/sup&gt;</code></pre>",
            "2^n\n\n```\n2<sup>n</sup>\n```",
        ),
        ("<p><sub><sup>1</sup> A <em>note</em> in small print</sub></p>", "^1 A *note* in small print"),
        (
            "<p>a.<sup>1</sup> b <sup>2,3</sup> <sup>[4]</sup> <sup>1</sup>/<sub>2</sub></p><p><sup>1</sup> c</p>",
            "a.^1 b ^2,3 [4] 1/2\n\n^1 c",
        ),
        ('<h2>a <img src="i.png" alt="b"> c</h2>', "## a ![b](i.png) c"),
        ('<h1><a href="u"><img src="i.png" alt="b"></a></h1>', "# [![b](i.png)](u)"),
        ("<p>a</p>\n\n<blockquote>\n  <p>b</p>\n</blockquote>\n\n<p>c</p>", "a\n\n> b\n\nc"),
        ("<h2>a</h2><blockquote>b</blockquote><blockquote>c</blockquote>", "## a\n\n> b\n\n> c"),
        ("<p>a</p><div class='x'><blockquote>b</blockquote></div>", "a\n\n> b"),
        (
            "<ul><li><p>a</p><blockquote><p>b</p></blockquote></li><li><blockquote>c</blockquote></li></ul>",
            "- a\n\n  > b\n\n- > c",
        ),
        ("<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>", "> a\n>\n> > b"),
        ("<pre><code>a\n&gt; b\n</code></pre><blockquote>c</blockquote>", "```\na\n> b\n```\n\n> c"),
    ],
)
def test_the_tags_of_stack_exchange(body: str, expected: str) -> None:
    assert to_markdown(body) == expected


# ------------------------------------------------------------------------------------------------------------- the library beneath

TAGS = "p a li ul ol b i em strong code br img blockquote hr pre sub sup kbd del h2 div span table tr th td details summary svg script".split()
USUAL = "p a li ul ol b em code br blockquote hr pre kbd h2".split()
TEXTS = [
    "x",
    " y ",
    "\n",
    "\n\nz\n",
    "&amp;",
    "&lt;",
    "&",
    "<",
    "5 < 6",
    "`",
    "```",
    "* ",
    "1. ",
    "\xa0",
    "<!-- c -->",
    "<![CDATA[ d ]]>",
    "</",
    "<p",
    '<a href="',
]
ATTRIBUTES = [
    "",
    "",
    "",
    ' class="a"',
    ' href="http://a.example"',
    ' src="data:image/png;base64,AAAA"',
    " start=3",
    ' style="display:none"',
    " a=1>2",
]
SOUP = st.lists(
    st.sampled_from(TEXTS)
    | st.tuples(st.sampled_from(TAGS), st.sampled_from(ATTRIBUTES)).map(lambda tag: f"<{tag[0]}{tag[1]}>")
    | st.sampled_from(TAGS).map(lambda tag: f"</{tag}>"),
    max_size=25,
).map("".join)


@given(st.text() | SOUP | st.text("<>/pabre&;#x!-= \"'`\0\r\x0c"))
@example("%PDF-1.4 is how a PDF begins")
@example("\x01" * 50)
@example("PK\x03\x04")
def test_any_text_has_a_markdown(body: str) -> None:
    text = to_markdown(body)
    assert isinstance(text, str)
    assert text == text.strip()
    assert text == to_markdown(body)


@pytest.mark.parametrize(
    "body",
    [
        *(
            f"<{tag}>" * 5000 + "x" + f"</{tag}>" * 5000
            for tag in ("div", "blockquote", "b", "sup", "pre", "table")
        ),
        *(f"<{tag}>" * 20000 for tag in ("p", "li", "a href=x", "blockquote")),
        *(mark * 20000 for mark in ("<", "&", "`", "<!--", "</b>", "<blockquote", '<a href="', "<sup>")),
        "<blockquote" * 60000 + "><p>",
        f'<a href="{"x" * 10**6}">y</a>',
        f"<p {'a=b ' * 10**5}>x",
        "<ul><li>x" * 1000,
    ],
    ids=lambda body: body[:12],
)
def test_large_and_broken_texts_neither_fail_nor_hang(body: str) -> None:
    before = time.perf_counter()
    assert to_markdown(body) == to_markdown(body).strip()
    assert time.perf_counter() - before < 5


def test_text_in_a_thousand_tags_is_there() -> None:
    assert to_markdown("<div>" * 1000 + "x" + "</div>" * 1000) == "x"


@given(SOUP | st.text())
@example(
    '<ul><li>a<ul><li>b</li></ul></li></ul><h2>c</h2><pre>d</pre>e<br>f<a href="g h">i</a><img src="data:j"><mark>k</mark> <title>l</title>'
)
def test_the_binding_does_what_the_public_function_does(body: str) -> None:
    body = body.replace("\0", "")
    for options, ready in (
        (markdown.OPTIONS, markdown.FULL),
        (markdown.QUICK_OPTIONS, markdown.FAST_OPTIONS),
    ):
        assert markdown._convert(body, ready) == html_to_markdown.convert(body, options).content


@st.composite
def posts(draw: st.DrawFn) -> str:
    """Well-formed HTML of the tags that are converted the quick way, with numbered words."""
    parts: list[str] = []
    opened: list[str] = []
    for number, step in enumerate(draw(st.lists(st.integers(0, 9), max_size=30))):
        if step < 4:
            parts.append(
                draw(st.sampled_from(["", " ", "\n"]))
                + f"w{number}x"
                + draw(st.sampled_from(["", " ", "\n", " &amp; "]))
            )
        elif step < 8 or not opened:
            opened.append(draw(st.sampled_from(USUAL)))
            parts.append(f"<{opened[-1]}>")
        else:
            parts.append(f"</{opened.pop()}>")
    return "".join([*parts, *(f"</{tag}>" for tag in reversed(opened))])


@given(posts())
def test_the_quick_way_loses_and_moves_no_word(body: str) -> None:
    assert re.findall(r"w\d+x", to_markdown(body)) == re.findall(
        r"w\d+x", markdown._convert(body, markdown.FULL)
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("one<pre><h1></h1>two</pre>", "one\n\n```\ntwo\n```"),
        ("word <div><summary>2<pre></pre></summary></div>", "word\n\n**2**"),
        ("<br><h1><figcaption>\n\nword", "# *word*"),
        ("<table><th>word</th></table>", "| word |\n| --- |"),
        (
            "<p>a</p><blockquote><div><blockquote><pre><code>x</code></pre></blockquote></div></blockquote>",
            "a\n\n> > ```\n> > x\n> > ```",
        ),
        ("<p>a</p><blockquote>\n\nb\nc\n<i>d</i></blockquote>", "a\n\n> b\n> c\n> *d*"),
    ],
)
def test_what_the_quick_way_gets_wrong_does_not_go_it(body: str, expected: str) -> None:
    assert to_markdown(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        '<img src="data:image/png;base64,AAAA" alt="a">',
        "<img src=' DATA:image/png;base64,AAAA'>",
        '<img src="&#100;ata:image/png;base64,AAAA">',
        '<a href="data:image/png;base64,AAAA">b</a>',
        '<p><img src="data:image/png,a b(c)" title="a"></p>',
        '<svg><path d="M0 0"/></svg>',
        '<video src="data:video/mp4;base64,AAAA">a</video>',
    ],
)
def test_media_in_the_text_itself_is_dropped(body: str) -> None:
    assert to_markdown(f"<p>x</p>{body}<p>y</p>") in ("x\n\ny", "x\n\nb\n\ny")
    assert (
        to_markdown("<p>x [a](data:b)</p><pre><code>f](data:c)\n</code></pre>")
        == "x [a](data:b)\n\n```\nf](data:c)\n```"
    )


def test_a_text_with_nul_is_not_utf_16() -> None:
    assert to_markdown("<p>" + "漢\0" * 200 + "</p>") == "漢" * 200
