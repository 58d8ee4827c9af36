"""Read the reply from a chat completion in OpenAI's protocol, of which servers have many dialects."""

from typing import Any

from tasks.judges.verdict_cache import Reply

TEXT_PARTS = ("text", "output_text")  # others are thoughts, refusals, images


def read_completion(body: Any) -> Reply:
    """Return the first choice of a completion. Token counts are -1 if the server does not report them.

    Raises ValueError if the body is no chat completion.
    """
    try:
        choice = body["choices"][0]
        content = choice["message"].get("content")
        is_complete = choice.get("finish_reason") != "length"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} in a reply with status 200") from None
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    prompt_tokens, reply_tokens = (
        _count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens")
    )
    return Reply(_text(content), is_complete, prompt_tokens, reply_tokens)


def _text(content: Any) -> str:
    """Return a message's text; "" if the model refused or spent its tokens on thoughts."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(map(_part, content))
    if not isinstance(content, str):
        raise ValueError("a reply that is no text")
    return content


def _part(part: Any) -> str:
    """Return the text of one part of a message; "" if it is of another kind."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else None
    return text if isinstance(text, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else -1
