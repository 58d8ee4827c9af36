"""Convert the HTML of a post to Markdown.

Code, lists, links and quotes are kept; scripts, styles and comments are removed.
"""

import re
from dataclasses import replace

from html_to_markdown import (
    ConversionOptions,
    HighlightStyle,
    InlineDataMedia,
    InvalidInputError,
    _html_to_markdown,  # `convert` builds the Rust options on each call, a fifth of its time
)
from html_to_markdown.api import _to_rust_conversion_options

from tasks.dataset.sources.formulas import DOLLARS, protect, restore

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
OPTIONS = ConversionOptions(
    extract_metadata=False,  # else <title> and <meta> in a post become a YAML header
    highlight_style=HighlightStyle.NONE,  # else ==marked== text, which is not Markdown
    inline_data_media=InlineDataMedia.DROP_ELEMENT,
    compact_tables=True,  # else cells are padded with spaces
    keep_inline_images_in=["h1", "h2", "h3", "h4", "h5", "h6"],
)
# If data: images are to be dropped, the library builds a tree of every text; if they are kept, it scans
# simple texts in one pass, twice as fast. The same holds for compact tables and images in headings.
SCAN_OPTIONS = replace(
    OPTIONS, inline_data_media=InlineDataMedia.KEEP, compact_tables=False, keep_inline_images_in=[]
)
FULL, FAST_OPTIONS = _to_rust_conversion_options(OPTIONS), _to_rust_conversion_options(SCAN_OPTIONS)
# The scan is correct for the tags that nearly all posts have. With others it splits words (beside an empty
# heading, a <summary>, a <figcaption>), and loses tables of one cell and a level of a quote that begins with
# a quote, so that code in it is no block any more. At a linked image it fails. Powers are handled below.
UNUSUAL = re.compile(
    r"<(?!/|(?:p|a|li|[uo]l|b|i|s|em|strong|code|br|hr|pre|kbd|del|strike)[ />]"
    r"|(?<!\"><)img |su[bp]>(?![-−]?\w+<)|h[1-6]>\w(?![^\n]*<img)"
    r"|blockquote[^<>]*>\s*<(?:p|[uo]l)\b)"
)
DATA_ADDRESS = re.compile(
    r"\]\(<?\s*data:", re.IGNORECASE
)  # searched in the Markdown, because HTML may spell it &#100;ata:
# Other small print is kept, but 10<sup>6</sup> must not become 106, nor 101<sub>2</sub> 1012. A footnote's
# mark becomes ^1 in the text and before the note; <sup>1</sup>/<sub>2</sub> is a fraction.
POWER = re.compile(r"<sup>(?:([-−]?\d+(?:[,–-]\d+)*)|(?<=[\w)]<sup>)([a-z]))</sup>(?!\s*[/⁄]\s*<sub>)")
BASE = re.compile(r"<sub>(?<=\d<sub>)(\d+)</sub>")
# The library writes no blank line between these and a quote, and joins two quotes. A paragraph in between,
# removed afterwards, prevents both.
BEFORE_QUOTE = re.compile(
    r"(?:</(?:p|pre|blockquote|[uo]l|h[1-6]|div|table)>|<hr ?/?>)(?=\s*(?:<div[^<>]*>\s*)*<blockquote)"
)
BETWEEN = "\ufdd3"  # a noncharacter, as in formulas.py
BETWEEN_LINE = re.compile(f"^[ >]*{BETWEEN}\n(?:[ >]*\n)?", re.MULTILINE)


def to_markdown(html: str) -> str:
    """Return the Markdown of an HTML fragment, valid or not, without leading or trailing whitespace.

    Formulas and backslashes are not changed. A code block keeps every byte except the line ends around it
    (HTML itself drops the first) and CR and NUL, which HTML reads as LF and nothing; its fence is longer than
    any run of backticks inside.
    """
    if "\0" in html:  # with many of them, the library detects UTF-16
        html = html.replace("\0", "")
    formulas: list[str] | None = None
    if "\\" in html or ("$" in html and DOLLARS.search(html)):
        html, formulas = protect(html)
    if "<blockquote" in html and BEFORE_QUOTE.search(html) and BETWEEN not in html:
        html = BEFORE_QUOTE.sub(rf"\g<0><p>{BETWEEN}</p>", html)
        markdown = BETWEEN_LINE.sub("", _convert_quickly(html))
    else:
        markdown = _convert_quickly(html)
    return markdown if formulas is None else restore(markdown, formulas).strip()


def _convert_quickly(html: str) -> str:
    """Return the Markdown, by the library's fast scan where that is correct."""
    if UNUSUAL.search(html):
        return _convert(BASE.sub(r"_\1", POWER.sub(r"^\1\2", html)), FULL).strip()
    markdown = _convert(html, FAST_OPTIONS)
    if DATA_ADDRESS.search(markdown):
        markdown = _convert(html, FULL)
    return markdown.strip()


def _convert(html: str, options: _html_to_markdown.ConversionOptions) -> str:
    """Return the library's Markdown of a text, also of one that it rejects as binary data."""
    try:
        result = _html_to_markdown.convert(html, options)
    except InvalidInputError:  # many control characters, or a beginning such as %PDF-
        result = _html_to_markdown.convert(" " + CONTROL.sub("", html), options)
    return result.content or ""
