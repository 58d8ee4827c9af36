"""Describe a run in Markdown, for its page in MLflow."""

import socket
from typing import Any

from tasks.artifacts.store import home


def describe_pipeline(name: str, settings: dict[str, Any]) -> str:
    """Return the description of a pipeline's run: what it is trained on, with which method and where."""
    source, base = (settings.get(part) or {} for part in ("source", "base"))
    facts = {
        "Profile": name,
        "Method": settings.get("method"),
        "Source": source.get("path") or source.get("kind"),
        "Base": base.get("path") or base.get("kind"),
        "Seed": settings.get("seed"),
        "Machine and home": machine_and_home(),
    }
    return _list({fact: value for fact, value in facts.items() if value not in (None, "")})


def describe_stage(stage: str, key: str, inputs: dict[str, str]) -> str:
    """Return the description of a stage's run; ``inputs`` are digests by name."""
    taken = ", ".join(f"{name} {digest[:12]}" for name, digest in inputs.items()) or "nothing"
    return _list({"Stage": stage, "Key": key[:12], "Takes": taken, "Machine and home": machine_and_home()})


def machine_and_home() -> str:
    """Return the host name and the home of this process, which together say whose runs are whose."""
    return f"{socket.gethostname()}:{home()}"


def _list(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {fact}: {_quote(value)}" for fact, value in facts.items())


def _quote(value: Any) -> str:
    """Return any value as inline code, so that no character of it is read as Markdown."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)).replace("`", "'")
    return f"`{text[:200]}`"
