"""Parse conversations that a chat template has already written out as one text.

Many published sets have such texts. Read as text, the template's markers would be trained on as letters,
because text never becomes a control token.
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
STRUCK = "<s>"  # in HTML struck-out text that </s> ends; in Llama 2 it begins the next turn
DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
ASKS, ANSWERS = "\n\nHuman:", "\n\nAssistant:"
ASSISTANTS = ("assistant", "model")
LOOK = 100  # characters at the start and the end in which headers and markers are searched
SPOKEN = {"Human": "user", "Assistant": "assistant", "INST": "user", "/INST": "assistant"}
SYSTEM, SYSTEM_END = "<<SYS>>", "<</SYS>>"  # within the first turn of Llama 2


def parse_messages(text: str) -> list[dict[str, str]] | None:
    """Return the messages of a written-out conversation; None if the text is not one.

    An empty last message, where the model is to answer, is left out.
    """
    if text[:LOOK].lstrip().startswith(("<", "[INST]", "### Human:")):
        start = BEGIN.match(text)
        place = start.end() if start else 0
        header = next((header for header in HEADERS if header.match(text, place)), None)
        if header:
            return _drop_opening(_split_turns(header, text[place:]))
    dialogue = f"\n\n{text.strip()}"
    is_dialogue = (
        dialogue.startswith(ASKS)
        and (text.startswith(ASKS) or dialogue.endswith(ANSWERS))
        and ANSWERS in dialogue
    )
    return _drop_opening(_split_turns(DIALOGUE, dialogue)) if is_dialogue else None


def strip_end(answer: str) -> str:
    """Return an answer without a template's end of turn, unless nothing else would be left."""
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
    system, end, question = first.removeprefix(SYSTEM).partition(SYSTEM_END)
    if not (end and first.startswith(SYSTEM)):
        return messages
    return [
        {"role": "system", "content": system.strip()},
        messages[0] | {"content": question.strip()},
        *messages[1:],
    ]


def _drop_opening(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    last = messages[-1]
    return messages[:-1] if last["role"] in ASSISTANTS and not last["content"] else messages
