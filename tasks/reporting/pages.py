"""Set up the templates of the pages."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.reporting.text import replace_invisible

FOLDER = Path(__file__).parent
STYLE = "report.css"


def build_environment() -> Environment:
    """Return an environment in which everything but Markup is escaped, and undefined names are errors."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=replace_invisible,
    )


def read_style() -> Markup:
    """Return the style sheet, unescaped."""
    return Markup((FOLDER / STYLE).read_text(encoding="utf-8"))  # noqa: S704 - our own file
