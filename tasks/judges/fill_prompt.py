"""Fill the prompt of a language model that judges two answers."""

import re

_LINE = re.compile(r"(^|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])(?=\s*===)")  # every character that begins a line
# What servers' own chat templates mark turns with: a reply's end, a new role
_CONTROL = re.compile(r"(?<=[<\[])(?=[|｜]|/?INST\]|/?(?:start|end)_of_turn>|/?SYS>)")


def fill(template: str, question: str, first: str, second: str) -> str:
    """Return the prompt.

    Each text is inserted once, so braces in it stay what they are; a line that looks like one of the
    template's own "=== ... ===" lines is indented, so that an answer cannot pretend to end.
    """
    texts = {"question": question, "first": first, "second": second}
    quoted = {name: _LINE.sub(r"\1  ", text.strip()) for name, text in texts.items()}
    return re.sub(r"\{(question|first|second)\}", lambda match: quoted[match[1]], template)


def break_control_tokens(text: str) -> str:
    """Put a space into texts such as <|im_end|> and [/INST], which a server may read as its control tokens.

    Where the tokenizer is at hand, ``control_tokens`` does better: there these characters are plain text.
    """
    return _CONTROL.sub(" ", text)
