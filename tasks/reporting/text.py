"""Format links, names and long texts for the pages; a page escapes everything but Markup."""

import re
from typing import Any

from markupsafe import Markup

MAX_TEXT = 4000  # characters that are shown
# Characters that a page would interpret or drop: control characters (but tab and line ends), line and
# paragraph separators, changes of the writing direction, which would reverse what follows, and lone
# surrogates, which are not UTF-8.
HIDDEN: dict[int, int] = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"} | {
    0x7F: 0x2421
}
HIDDEN |= dict.fromkeys(
    [
        *range(0x80, 0xA0),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
        *range(0xFFF9, 0xFFFC),
        0xFEFF,
        0xFFFE,
        0xFFFF,
    ],
    0xFFFD,
)


def replace_invisible(value: Any) -> Any:
    """Return a text with a symbol for every character that a page would not show; other values unchanged."""
    return value.translate(HIDDEN) if isinstance(value, str) else value


def clip_text(text: str, most: int = MAX_TEXT) -> str:
    """Return the beginning of a text and how much of it is left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def build_link(address: str, label: str) -> Markup | str:
    """Return a link to a web page; only the label for the built-in site's host, which does not exist."""
    if not re.match(r"https?://[\w.-]+(?<!\.example)(?:[/:?#]|$)", address):
        return label
    return Markup('<a href="{}" target="_blank" rel="noreferrer">{}</a>').format(address, label)


def breakable_name(name: str) -> Markup:
    """Return a host name that a narrow page can break after its dots."""
    return Markup(".<wbr>").join(name.split("."))


def link_author(address: str, name: str = "") -> Markup | str:
    """Return a user's name, linked to the profile if its address is known.

    A profile without a name gets the user's number.
    """
    profile = re.fullmatch(r"https?://[^/]+/users/(\d+)", address)
    return build_link(address, name or f"user {profile[1]}") if profile else name or address
