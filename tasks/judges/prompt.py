"""Fill the prompt of a language model that judges two answers."""

import re


def fill(template: str, question: str, first: str, second: str) -> str:
    """Return the prompt.

    Each text is inserted once, so braces in it stay what they are; a line that looks like one of the
    template's own "=== ... ===" lines is indented, so that an answer cannot pretend to end.
    """
    texts = {"question": question, "first": first, "second": second}
    quoted = {name: re.sub(r"(?m)^(?=\s*===)", "  ", text.strip()) for name, text in texts.items()}
    return re.sub(r"\{(question|first|second)\}", lambda match: quoted[match[1]], template)
