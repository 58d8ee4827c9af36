"""Draw what a command shows on a terminal of any width, or into a file."""

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from flows.display import rounds_screen, terminal


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Draw on a terminal of some width, or into a file (0); return the text without bold and yellow."""

    def draw(width: int, call: Callable[[], None]) -> str:
        text = io.StringIO()
        made = Console(
            file=text,
            width=width or terminal.PLAIN_WIDTH,
            force_terminal=bool(width),
            no_color=True,
            highlight=False,
            legacy_windows=False,
        )
        for module in (terminal, rounds_screen):
            monkeypatch.setattr(module, "console", lambda: made)
        call()
        return re.sub(r"\x1b\[(0|1|33|1;33)m", "", text.getvalue())

    return draw
