"""HTML of a post to Markdown: code, inline code, lists, links and quotes survive; scripts, styles and comments do not."""

import re

from html_to_markdown import (
    CodeBlockStyle,
    ConversionOptions,
    HeadingStyle,
    HiddenContent,
    HighlightStyle,
    InlineDataMedia,
    InvalidInputError,
    LinkStyle,
    ListIndentType,
    NewlineStyle,
    OutputFormat,
    TierStrategy,
    UrlEscapeStyle,
    WhitespaceMode,
    convert,
)

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# Mostly the defaults, but spelled as enum members: the library takes 40 us a call to look up their names, and 10 us to convert a short post.
OPTIONS = ConversionOptions(
    extract_metadata=False,  # else <title> and <meta> in a post become a YAML header
    heading_style=HeadingStyle.ATX,
    list_indent_type=ListIndentType.SPACES,
    highlight_style=HighlightStyle.NONE,
    whitespace_mode=WhitespaceMode.NORMALIZED,
    newline_style=NewlineStyle.SPACES,
    code_block_style=CodeBlockStyle.BACKTICKS,
    inline_data_media=InlineDataMedia.DROP_ELEMENT,
    hidden_content=HiddenContent.DROP,
    url_escape_style=UrlEscapeStyle.ANGLE,
    link_style=LinkStyle.INLINE,
    output_format=OutputFormat.MARKDOWN,
    tier_strategy=TierStrategy.AUTO,
)


def to_markdown(html: str) -> str:
    """Markdown of an HTML fragment, broken or not, without leading or trailing blank space.

    A code block keeps every byte but the line ends around it (HTML itself drops the first) and CR and NUL, which HTML reads as LF and nothing;
    its fence is longer than any run of backticks inside.
    """
    try:
        found = convert(html, OPTIONS).content
    except InvalidInputError:  # so many control characters that it takes the text for binary data
        found = convert(CONTROL.sub("", html), OPTIONS).content
    return (found or "").strip()
