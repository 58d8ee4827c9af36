"""HTML of a post to Markdown: code, inline code, lists, links and quotes survive; scripts, styles and comments do not."""

import re
from dataclasses import replace

from html_to_markdown import (
    ConversionOptions,
    HighlightStyle,
    InlineDataMedia,
    InvalidInputError,
    _html_to_markdown,  # `convert` builds the Rust options anew on each call, a fifth of its time; the binding beneath takes them ready made
)
from html_to_markdown.api import _to_rust_conversion_options

from tasks.dataset.sources.formulas import DOLLARS, protect, restore

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
OPTIONS = ConversionOptions(
    extract_metadata=False,  # else <title> and <meta> in a post become a YAML header
    highlight_style=HighlightStyle.NONE,  # else ==marked== text, which is no Markdown
    inline_data_media=InlineDataMedia.DROP_ELEMENT,
    compact_tables=True,  # else cells are filled up with blanks
    keep_inline_images_in=["h1", "h2", "h3", "h4", "h5", "h6"],
)
# Dropping data: images makes the library build a tree of every text; keeping them lets it scan a simple one in a single pass, twice as fast.
# So do compact tables and images in headings.
QUICK_OPTIONS = replace(
    OPTIONS, inline_data_media=InlineDataMedia.KEEP, compact_tables=False, keep_inline_images_in=[]
)
FULL, FAST_OPTIONS = _to_rust_conversion_options(OPTIONS), _to_rust_conversion_options(QUICK_OPTIONS)
# That scan is right about the tags that nearly all posts have. Beyond them it cuts words in two (beside an empty heading, a <summary>, a
# <figcaption>), loses tables of one cell, and a level of a quote that begins with a quote, so that code in it is no block any more.
# At a linked image, it gives up; powers are seen to below.
UNUSUAL = re.compile(
    r"<(?!/|(?:p|a|li|[uo]l|b|i|s|em|strong|code|br|hr|pre|kbd|del|strike)[ />]|(?<!\"><)img |su[bp]>(?![-−]?\w+<)|h[1-6]>\w(?![^\n]*<img)"
    r"|blockquote[^<>]*>\s*<(?:p|[uo]l)\b)"
)
DATA_ADDRESS = re.compile(
    r"\]\(<?\s*data:", re.IGNORECASE
)  # looked for in the Markdown, as HTML may spell it &#100;ata:
# Small print stays as it is, but 10<sup>6</sup> is not to become 106, nor 101<sub>2</sub> 1012. A mark of a footnote is ^1 in the text and before the
# note alike; <sup>1</sup>/<sub>2</sub> is a fraction.
POWER = re.compile(r"<sup>(?:([-−]?\d+(?:[,–-]\d+)*)|(?<=[\w)]<sup>)([a-z]))</sup>(?!\s*[/⁄]\s*<sub>)")
BASE = re.compile(r"<sub>(?<=\d<sub>)(\d+)</sub>")
# The library writes no blank line between these and a quote, and makes one quote of two; a paragraph between them that is taken out again does.
BEFORE_QUOTE = re.compile(
    r"(?:</(?:p|pre|blockquote|[uo]l|h[1-6]|div|table)>|<hr ?/?>)(?=\s*(?:<div[^<>]*>\s*)*<blockquote)"
)
BETWEEN = "\ufdd3"  # a noncharacter, as in formulas.py
BETWEEN_LINE = re.compile(f"^[ >]*{BETWEEN}\n(?:[ >]*\n)?", re.MULTILINE)


def to_markdown(html: str) -> str:
    """Markdown of an HTML fragment, broken or not, without leading or trailing blank space. Formulas and backslashes stay as they are.

    A code block keeps every byte but the line ends around it (HTML itself drops the first) and CR and NUL, which HTML reads as LF and nothing;
    its fence is longer than any run of backticks inside.
    """
    if "\0" in html:  # with many of them, the library takes the text for UTF-16
        html = html.replace("\0", "")
    formulas: list[str] | None = None
    if "\\" in html or ("$" in html and DOLLARS.search(html)):
        html, formulas = protect(html)
    if "<blockquote" in html and BEFORE_QUOTE.search(html) and BETWEEN not in html:
        html = BEFORE_QUOTE.sub(rf"\g<0><p>{BETWEEN}</p>", html)
        found = BETWEEN_LINE.sub("", _convert_quickly(html))
    else:
        found = _convert_quickly(html)
    return found if formulas is None else restore(found, formulas).strip()


def _convert_quickly(html: str) -> str:
    if UNUSUAL.search(html):
        return _convert(BASE.sub(r"_\1", POWER.sub(r"^\1\2", html)), FULL).strip()
    found = _convert(html, FAST_OPTIONS)
    if DATA_ADDRESS.search(found):
        found = _convert(html, FULL)
    return found.strip()


def _convert(html: str, options: _html_to_markdown.ConversionOptions) -> str:
    """The library's Markdown of a text, also of one that it takes for binary data."""
    try:
        found = _html_to_markdown.convert(html, options)
    except InvalidInputError:  # many control characters, or a beginning such as %PDF-
        found = _html_to_markdown.convert(" " + CONTROL.sub("", html), options)
    return found.content or ""
