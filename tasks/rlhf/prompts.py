"""Questions and answers as token ids, the same in every stage. Text is tokenised once and never decoded and encoded again."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from tasks.rlhf.refusal import InputError

Template = Literal["question-answer", "human-assistant", "chat"]
# What stands before a question, and between it and its answer, whose space before the first word is the answer's.
_PLAIN = {"question-answer": ("Question: ", "\n\n", "Answer:"), "human-assistant": ("\n\nHuman: ", "\n\n", "Assistant:")}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, *, template: Template, max_tokens: int) -> list[int]:
    """Ids of the prompt up to where the answer starts. A prompt that is too long loses text from the end of the question."""
    ids = _prompt_ids(tokenizer, question, template)
    kept = len(question)
    while len(ids) > max_tokens:
        if kept == 0:
            raise InputError(
                f"text.max_prompt_tokens={max_tokens} leaves no room for a question: the template alone takes {len(ids)} tokens; raise it."
            )
        excess = len(ids) - max_tokens
        kept = min(kept - 1, max(0, round(kept * (1 - excess / len(ids)))))
        ids = _prompt_ids(tokenizer, question[:kept].rstrip(), template)
    return ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, template: Template, max_tokens: int) -> list[int]:
    """Ids of the answer and the end token; a longer answer is cut and then has no end token.

    In the plain templates the space after ``Answer:`` belongs to the answer's first token, so it is encoded behind that anchor.
    """
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    if template == "chat":
        ids = _ids(tokenizer, answer.strip())
    else:
        before = _PLAIN[template][-1]
        anchor = _ids(tokenizer, before)
        ids = _ids(tokenizer, f"{before} {answer.strip()}")
        if ids[: len(anchor)] != anchor:
            raise InputError("This tokenizer merges the answer's first word with the text before it: use text.template=chat with this model.")
        ids = ids[len(anchor) :]
    return [*ids, eos][:max_tokens]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The answer's text, without its end token."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, template: Template) -> list[int]:
    if template == "chat":
        if not tokenizer.chat_template:
            raise InputError("This model's tokenizer has no chat template: use text.template=question-answer.")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        return list(tokenizer(str(chat), add_special_tokens=False)["input_ids"])
    first, *rest = _PLAIN[template]
    ids = list(tokenizer(f"{first}{question}{''.join(rest)}", split_special_tokens=True)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: a post that writes "</s>" means these characters and not the end token."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
