"""Clean a program's log.txt for other pages: no secrets, control characters or overwritten lines."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

LAST_LINES = 30
LONGEST_LINE = 2000  # characters
MAX_BYTES = 5 * 2**20  # of a longer log, only its end is shown
SHORTEST_SECRET = 6  # characters; a shorter value would also hide ordinary words

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
SECRET_NAMES = re.compile(
    r"PASSW|SECRET|TOKEN|API_?KEY|ACCESS_?KEY|CREDENTIAL|AUTH_STRING|WEBHOOK|DATABASE|CONNECTION_URL",
    re.IGNORECASE,
)
# Every repetition is bounded and begins at a word boundary: lines hold untrusted text of any length.
NAME = r"(?i)(?<![\w-])([\w-]{0,64}"
VALUE = r"""[\w-]{0,64}["']?\s{0,8}[=:]\s{0,8}["']?)(?=[^\s"',;]{0,200}\d)[^\s"',;]{6,}"""
# user:password@ in a URL, tokens with a known prefix, NAME=value
SECRETS = [
    (re.compile(r"(?<![\w+.-])(\w[\w+.-]{0,30}://)[^\s/@:]{0,200}:[^\s/@]{1,500}@"), r"\1***@"),
    (re.compile(r"(?i)\b(bearer|basic)\s{1,8}[\w+/=.~-]{8,}"), r"\1 ***"),
    (re.compile(r"\b(hf|ghp|gho|sk|pk|xox[abp]|glpat)[_-][\w-]{12,}"), r"\1_***"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), r"\1***"),
    (re.compile(rf"{NAME}(?:password|passwd|secret|api_?key|access_?key){VALUE}"), r"\1***"),
    # not a secret: tokenizer=..., tokens=1048576
    (
        re.compile(rf"{NAME}token(?!iz)(?!\S{{0,64}}[=:]\s{{0,8}}[\d.,_]{{1,40}}(?:[\s)\]]|$)){VALUE}"),
        r"\1***",
    ),
]


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """Return the last lines of a log, cleaned; none if there is no log."""
    return [line[:LONGEST_LINE] for line in _cleaned(log)][-count:]


def write_clean(log: Path, target: Path) -> None:
    """Write a cleaned copy of the log to ``target``; of a very long log, only its end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in _cleaned(log))


def clean(text: str, secrets: list[str] | None = None) -> str:
    """Return one line as a terminal would show it after carriage returns, with secrets and control characters
    masked.
    """
    text = ESCAPES.sub("", text).rstrip("\r").rpartition("\r")[2]
    text = "".join(
        letter if letter.isprintable() or letter == "\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    for secret in _secrets() if secrets is None else secrets:
        text = text.replace(secret, "***")
    for pattern, masked in SECRETS:
        text = pattern.sub(masked, text)
    return text


def _cleaned(log: Path) -> Iterator[str]:
    if not log.is_file():
        return
    secrets = _secrets()
    with log.open("rb") as file:
        skipped = max(0, os.fstat(file.fileno()).st_size - MAX_BYTES)
        if skipped:
            file.seek(skipped)
            file.readline()
            yield f"({skipped:,} earlier bytes are left out)"
        for line in file:
            yield clean(line.decode("utf-8", "replace").rstrip("\n"), secrets)


def _secrets() -> list[str]:
    """Return the values of environment variables whose names mark them as secrets, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET
    }
    values |= {value.partition(":")[2] for name, value in os.environ.items() if name.endswith("AUTH_STRING")}
    return sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)
