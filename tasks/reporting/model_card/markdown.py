"""Write texts of models, users and data into Markdown so that they are shown as they are."""

import re
from typing import Any

from markupsafe import Markup

from tasks.reporting.text import replace_invisible

SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&$@])")
SCHEME = re.compile(r"(?i)(?<![a-z])(https?|ftp|mailto):")
WORLD_WIDE_WEB = re.compile(r"(?i)(?<![a-z])(www)\.")
LINE_START = re.compile(r"^(?:([-+=:])|(\d+)([.)])(?=\s|$))")


def escape_markdown(value: Any) -> Any:
    """Return a text as one line of Markdown without markup, links and addresses; Markup as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    flat = " ".join(replace_invisible(value).split())
    escaped = SPECIAL.sub(r"\\\1", flat)
    escaped = WORLD_WIDE_WEB.sub(r"\1\\.", SCHEME.sub(r"\1\\:", escaped))
    return LINE_START.sub(_escape_start, escaped)


def _escape_start(found: re.Match[str]) -> str:
    """Return what would begin a list or underline a heading, escaped."""
    return f"\\{found[1]}" if found[1] else f"{found[2]}\\{found[3]}"
