"""Find and check the prompt of a language model that judges."""

import re
from pathlib import Path

from tasks.system.errors import InputError

FOLDER = Path(__file__).parents[1] / "judges" / "prompts"
FIELDS = ("question", "first", "second")


def read_template(place: Path) -> str:
    """Return a template: a text with {question}, {first} and {second}. Raises InputError."""
    try:
        text = place.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"judge.prompt: {place} cannot be read as text: {error}") from error
    missing = [f"{{{name}}}" for name in FIELDS if f"{{{name}}}" not in text]
    if missing:
        raise InputError(
            f"judge.prompt: {place} has no {' and no '.join(missing)}; a judge must be shown the question "
            "and both answers"
        )
    return text


def is_own_prompt(prompt: str) -> bool:
    """Return whether a text is the name of one of alignflow's prompts."""
    return re.fullmatch(r"\w+", prompt) is not None and (FOLDER / f"{prompt}.txt").is_file()


def find_template(prompt: str) -> Path:
    """Return the file of a prompt: alignflow's by its name, or a user's by its path. Raises InputError."""
    place = FOLDER / f"{prompt}.txt" if is_own_prompt(prompt) else Path(prompt).expanduser()
    if not place.is_file():
        *names, last = sorted(path.stem for path in FOLDER.glob("*.txt"))
        raise InputError(
            f"judge.prompt: there is no prompt {prompt}; alignflow has {', '.join(names)} "
            f"and {last}, or name a file"
        )
    return place
