"""Questions and answers as token ids, the same in every stage. Text is tokenised once and never decoded and encoded again.

Whatever a question or an answer says, none of it becomes a control token: only the template writes these.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches.control_tokens import choose_markers, control_tokens, encode_marked, encode_text, mark
from tasks.system.errors import InputError

Template = Literal["question-answer", "human-assistant", "chat"]
# What stands before a question, and between it and its answer, whose space before the first word is the answer's.
_PLAIN = {
    "question-answer": ("Question: ", "\n\n", "Answer:"),
    "human-assistant": ("\n\nHuman: ", "\n\n", "Assistant:"),
}
_QUESTION, _ANSWER = (
    "What is 73915?",
    "It is 48263.",
)  # rendered to see what a chat template writes around them
_REMEDY = "mend it in the model's folder (chat_template.jinja), or use text.template=question-answer."


class Turn(NamedTuple):
    """What a chat template writes around an answer."""

    before: str  # the prompt's end, from its last control token on
    prefill: str  # stands between the generation prompt and every answer (an empty thinking block), so prompts end with it
    opening: str  # white space that belongs to the answer
    closing: str  # what follows the answer, up to the end of its turn
    end: int  # the token that ends an answer's turn


def end_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, ...]:
    """Return the tokens that end an answer: first the one that answers are trained to end with."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    if template != "chat":
        return (eos,)
    return tuple(dict.fromkeys((chat_turn(tokenizer).end, eos)))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, *, template: Template, max_tokens: int
) -> list[int]:
    """Ids of the prompt up to where the answer starts. A prompt that is too long loses text from the end of the question."""
    return shorten_prompt(
        tokenizer,
        question,
        _prompt_ids(tokenizer, question, template),
        template=template,
        max_tokens=max_tokens,
    )


def shorten_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, ids: list[int], *, template: Template, max_tokens: int
) -> list[int]:
    """Ids of the prompt within ``max_tokens``; ``ids`` are those of the whole prompt."""
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


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, answer: str, *, template: Template, max_tokens: int
) -> list[int]:
    """Ids of the answer and the end of its turn; a longer answer is cut and then has no end token.

    In the plain templates the space after ``Answer:`` belongs to the answer's first token, so it is encoded behind that anchor.
    """
    if template == "chat":
        return _chat_answer_ids(tokenizer, answer.strip())[:max_tokens]
    before = _PLAIN[template][-1]
    anchor, ids = (encode_text(tokenizer, text) for text in (before, f"{before} {answer.strip()}"))
    if ids[: len(anchor)] != anchor:
        raise InputError(
            "This tokenizer merges the answer's first word with the text before it: use text.template=chat with this model."
        )
    return [*ids[len(anchor) :], *end_tokens(tokenizer, template)][:max_tokens]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, template: Template) -> str:
    """The answer's text, without its end token."""
    if ids[-1:] and ids[-1] in end_tokens(tokenizer, template):
        ids = ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return what the tokenizer's chat template writes around an answer. Raises InputError if it cannot be used."""
    if not tokenizer.chat_template:
        raise InputError("This model's tokenizer has no chat template: use text.template=question-answer.")
    return _chat_turn(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _chat_turn(tokenizer: PreTrainedTokenizerBase, _: str) -> Turn:
    prompt, whole = _render(tokenizer, _QUESTION), _render(tokenizer, _QUESTION, _ANSWER)
    for name, text, rendered in (("question", _QUESTION, prompt), ("answer", _ANSWER, whole)):
        if text not in rendered:
            raise InputError(
                f"The chat template of this model's tokenizer leaves the {name} out or alters it: {_REMEDY}"
            )
    place = whole.rindex(_ANSWER)
    opening = (
        whole[len(prompt) : place] if whole.startswith(prompt) else ""
    )  # a generation prompt may be one of its own
    prefill, opening = (opening, "") if opening.strip() else ("", opening)
    pattern = control_tokens(tokenizer).pattern
    starts = [match.start() for match in pattern.finditer(prompt + prefill)]
    before = (prompt + prefill)[starts[-1] if starts else 0 :]
    behind = whole[place + len(_ANSWER) :]
    if (match := pattern.search(behind)) is None:  # the template leaves the end to the tokenizer
        return Turn(before, prefill, opening, str(tokenizer.eos_token), int(tokenizer.eos_token_id))
    end = tokenizer.convert_tokens_to_ids(match.group())
    assert isinstance(end, int)
    return Turn(before, prefill, opening, behind[: match.end()], end)


def _render(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None = None) -> str:
    """A conversation as the chat template writes it; without an answer up to where that starts. Raises InputError."""
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)
        )
    except Exception as error:  # a template is a program of the model's, and may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        turns = "a question" if answer is None else "a question and its answer"
        raise InputError(
            f"The chat template of this model's tokenizer fails on {turns} ({reason}): {_REMEDY}"
        ) from error


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, template: Template) -> list[int]:
    if template == "chat":
        prefill = chat_turn(tokenizer).prefill
        markers = choose_markers(question)
        return encode_marked(
            tokenizer, _render(tokenizer, mark(tokenizer, question, markers)) + prefill, markers
        )
    first, *rest = _PLAIN[template]
    return [*_prefix_ids(tokenizer), *encode_text(tokenizer, f"{first}{question}{''.join(rest)}")]


@lru_cache(maxsize=8)
def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before every text, such as a token for its beginning."""
    whole, bare = (list(tokenizer("x", add_special_tokens=added)["input_ids"]) for added in (True, False))
    places = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next(i for i in places if whole[i : i + len(bare)] == bare)])


def _chat_answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Ids of a whole answer as the chat template has it behind its prompt."""
    turn, markers = chat_turn(tokenizer), choose_markers(answer)
    marked = turn.opening + mark(tokenizer, answer, markers) + turn.closing
    anchor, ids = (encode_marked(tokenizer, text, markers) for text in (turn.before, turn.before + marked))
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return encode_marked(
        tokenizer, marked, markers, behind=True
    )  # the prompt ends in a space that would join the first word
