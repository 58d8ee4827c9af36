"""Render the Markdown of questions and answers as HTML that runs nothing and loads nothing.

CommonMark with tables and strikethrough; every line break is kept, because models rely on it. HTML is shown
as text, and so are links of other schemes than http, https and mailto. An image becomes a link to it.
"""

import re
import unicodedata
from collections.abc import Iterable

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from flows.labelling.formula_rules import add_formulas

MAX_CHARS = 50_000  # two seconds or so for texts that are made to be slow
MAX_NESTING = 20  # levels of blocks, below which the parser drops what it reads; a list has two
ADDRESS = re.compile(r"https?://[^/\s]|mailto:[^\s]", re.IGNORECASE)
MAX_START = 900  # first number of a list, beyond which numbers stand in the text: they need more room
HEADING_OFFSET = 2  # the page has h1 and h2
BIDI_CONTROLS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # they reorder what is shown
SYMBOLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"} | {
    code: f"[U+{code:X}]" for code in BIDI_CONTROLS
}
TEXTS = ("text", "code_inline", "fence", "code_block")  # tokens whose content is shown
BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without ink


def render_markdown(text: str) -> str:
    """Return a text's HTML; "" if the text is to be shown as it is.

    This is so if nothing could be seen of the rendering, for instance of a link definition alone, if a part
    of the text is nested too deeply, and if the text is longer than MAX_CHARS.
    """
    if len(text) > MAX_CHARS:
        return ""
    tokens = PARSER.parse(text)
    if any(token.level >= MAX_NESTING - 1 for token in tokens):
        return ""
    for token in tokens:
        _restrict(token)
    if not _has_ink("".join(map(_read_text, tokens))):
        return ""
    return RENDERER.render(tokens, PARSER.options, {})


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"])
    parser.validateLink = _is_allowed  # type: ignore[assignment, method-assign]
    add_formulas(parser)
    return parser


def _is_allowed(address: str) -> bool:
    return ADDRESS.match(address) is not None


def _restrict(token: Token) -> None:
    """Leave a block classes of the page in place of styles and languages, and show controls as symbols."""
    token.content = token.content.translate(SYMBOLS)
    if token.type in ("heading_open", "heading_close"):
        token.tag = f"h{min(int(token.tag[1:]) + HEADING_OFFSET, 6)}"
    elif token.type == "fence":
        token.info = ""  # the language, which would become a class
    elif token.type == "ordered_list_open" and int(token.attrs.get("start", 1)) > MAX_START:
        token.attrs["class"] = "long"
    elif style := str(token.attrs.pop("style", "")):
        token.attrs["class"] = style.removeprefix("text-align:")
    if token.children:
        token.children = _restrict_inline(token.children)


def _restrict_inline(tokens: Iterable[Token]) -> list[Token]:
    """Return the tokens of a paragraph with marked links, each with a text, and links in place of images."""
    made: list[Token] = []
    address, label = "", ""  # of the link that is open
    for token in tokens:
        token.content = token.content.translate(SYMBOLS)
        if token.type == "link_open":
            address, label = str(token.attrs["href"]), ""
            token.attrs = _link_attributes(address)
        elif token.type == "link_close":
            made += [] if _has_ink(label) else [_make_text(address)]
            address = ""
        found = _describe_image(token, is_linked=bool(address)) if token.type == "image" else [token]
        label += "".join(map(_read_text, found))
        made += found
    return made


def _link_attributes(address: str) -> dict[str, str | int | float]:
    return {"href": address, "title": address, "rel": "noreferrer noopener nofollow", "target": "_blank"}


def _describe_image(token: Token, *, is_linked: bool) -> list[Token]:
    """Return an image's description, as a link to it unless it is in one."""
    address = str(token.attrs["src"])
    description = RENDERER.renderInlineAsText(token.children, PARSER.options, {})
    text = _make_text(f"image: {description if _has_ink(description) else address}")
    if is_linked:
        return [text]
    return [Token("link_open", "a", 1, attrs=_link_attributes(address)), text, Token("link_close", "a", -1)]


def _make_text(content: str) -> Token:
    return Token("text", "", 0, content=content.translate(SYMBOLS))


def _read_text(token: Token) -> str:
    """Return the text that is shown for a token."""
    if token.children:
        return "".join(map(_read_text, token.children))
    return token.content if token.type in TEXTS else ""


def _has_ink(text: str) -> bool:
    """Return whether a text has characters that are seen: not only spaces, controls and marks."""
    return any(unicodedata.category(one)[0] not in "CMZ" and one not in BLANKS for one in text)


PARSER, RENDERER = _make_parser(), RendererHTML()
