"""Define the messages of a conversation, and write them out as one text."""

from collections.abc import Iterable, Sequence

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SPEAKERS = {USER: "Human", ASSISTANT: "Assistant", SYSTEM: "System"}  # as hh-rlhf names them

Messages = tuple[tuple[str, str], ...]  # (role, text), up to and including the last user's message


def write_out(messages: Iterable[tuple[str, str]]) -> str:
    """Return messages as one text with their speakers' names, as in hh-rlhf."""
    return "\n\n".join(f"{SPEAKERS[role]}: {text}" for role, text in messages)


def to_records(messages: Messages) -> list[dict[str, str]]:
    """Return messages as the values of a table's column."""
    return [{"role": role, "content": text} for role, text in messages]


def from_records(records: Sequence[dict[str, str]] | None) -> Messages:
    """Return the messages of a table's value; none for a prompt that is one user's message."""
    return tuple((record["role"], record["content"]) for record in records or ())
