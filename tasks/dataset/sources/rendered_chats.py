"""Conversations that a chat template has already written out as one text, as many published sets have them.

Such a text is read as its messages. As it stands it would be trained on letter by letter, for no text becomes a control token (control_tokens.py).
"""

import re

BEGIN = re.compile(r"\s*(?:<\|begin_of_text\|>|<\|endoftext\|>|<s>|<bos>)?\s*")
HEADERS = (  # ChatML, Llama 3, Gemma, Zephyr and Phi-3, Llama 2, guanaco
    re.compile(r"<\|im_start\|>(\w+)\n"),
    re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>"),
    re.compile(r"<start_of_turn>(\w+)\n"),
    re.compile(r"<\|(system|user|assistant|prompter)\|>\n?"),
    re.compile(r"\[(/?INST)\]"),
    re.compile(r"### (Human|Assistant):"),
)
END = re.compile(
    r"\s*(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|end_of_text\|>|<\|endoftext\|>|<eos>|</s>)\s*\Z"
)
STRUCK = "<s>"  # </s> may end what it begins; in Llama 2 it begins the next turn
DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
ASKS, ANSWERS = "\n\nHuman:", "\n\nAssistant:"
ASSISTANTS = ("assistant", "model")
LOOK = 100  # characters in which a text's first header, or its end, stands
SPOKEN = {"Human": "user", "Assistant": "assistant", "INST": "user", "/INST": "assistant"}
SYSTEM, SYSTEM_END = "<<SYS>>", "<</SYS>>"  # within the first turn of Llama 2


def parse_messages(text: str) -> list[dict[str, str]] | None:
    """Return the messages of a written-out conversation, without the empty one that asks for an answer; None if the text is none."""
    if text[:LOOK].lstrip().startswith(("<", "[INST]", "### Human:")):
        start = BEGIN.match(text)
        place = start.end() if start else 0
        header = next((header for header in HEADERS if header.match(text, place)), None)
        if header:
            return _drop_opening(_split_turns(header, text[place:]))
    whole = f"\n\n{text.strip()}"
    is_dialogue = (
        whole.startswith(ASKS) and (text.startswith(ASKS) or whole.endswith(ANSWERS)) and ANSWERS in whole
    )
    return _drop_opening(_split_turns(DIALOGUE, whole)) if is_dialogue else None


def strip_end(answer: str) -> str:
    """Return an answer without the end of turn that a template has put behind it; the answer itself if it is nothing else."""
    found = END.search(answer[-LOOK:])
    if not found or (found[0].strip() == "</s>" and STRUCK in answer):
        return answer
    return answer[: -len(found[0])].rstrip() or answer


def _split_turns(header: re.Pattern[str], text: str) -> list[dict[str, str]]:
    _, *parts = header.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    messages = [
        {"role": SPOKEN.get(role, role), "content": strip_end(content.strip().removesuffix(STRUCK))}
        for role, content in pairs
    ]
    first = messages[0]["content"]
    system, end, asked = first.removeprefix(SYSTEM).partition(SYSTEM_END)
    if not (end and first.startswith(SYSTEM)):
        return messages
    return [
        {"role": "system", "content": system.strip()},
        messages[0] | {"content": asked.strip()},
        *messages[1:],
    ]


def _drop_opening(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    last = messages[-1]
    return messages[:-1] if last["role"] in ASSISTANTS and not last["content"] else messages
