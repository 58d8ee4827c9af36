"""Counts, shares, links and long texts as pages show them; what is no Markup is escaped by the page."""

import re
from typing import Any

from markupsafe import Markup

LONGEST_TEXT = 4000  # characters that are shown
# Characters that a page would not show but obey or drop: controls (but tab and line ends), line and paragraph separators, changes of the writing
# direction, which would turn round what follows, and halves of surrogate pairs, which are no UTF-8.
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


def visible(value: Any) -> Any:
    """Return a text with a sign for every character that a page would not show; anything else as it is."""
    return value.translate(HIDDEN) if isinstance(value, str) else value


def counted(count: int, what: str) -> str:
    """A number of things: '1 pair', '4,032 pairs'."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share as text; a small one is never shown as none, and all but all never as all."""
    if 0 < share < 0.001:
        return "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%"
    return f"{100 * min(share, 0.999 if share < 1 else share):.1f}\N{NO-BREAK SPACE}%"


def clip(text: str, most: int = LONGEST_TEXT) -> str:
    """A text's beginning, and how much of it is left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def link(address: str, label: str) -> Markup | str:
    """A link to a web page; the built-in site's host (.example) does not exist, so its label stays text."""
    if not re.match(r"https?://[\w.-]+(?<!\.example)(?:[/:?#]|$)", address):
        return label
    return Markup('<a href="{}" target="_blank" rel="noreferrer">{}</a>').format(address, label)


def breakable(name: str) -> Markup:
    """A host name that a narrow page may break after its dots."""
    return Markup(".<wbr>").join(name.split("."))


def author(address: str, name: str = "") -> Markup | str:
    """A display name, linked to the profile where its address is known; an address alone is called by its number."""
    profile = re.fullmatch(r"https?://[^/]+/users/(\d+)", address)
    return link(address, name or f"user {profile[1]}") if profile else name or address
