"""Encode questions and answers with a template, the same in every stage.

Text is tokenised once and never re-encoded.

No text of a question or an answer becomes a control token: only the template writes these.

Chat templates that write the date (Llama 3's, SmolLM3's) write `DATE` on every day, so that equal texts have
equal tokens in all stages, ranks and starts.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches.control_tokens import choose_markers, control_tokens, encode_marked, encode_text, mark
from tasks.system.errors import InputError

Template = Literal["question-answer", "human-assistant", "chat"]
# Texts before a question, after it, and before its answer; the space before the answer's first word belongs
# to the answer.
PLAIN = {
    "question-answer": ("Question: ", "\n\n", "Answer:"),
    "human-assistant": ("\n\nHuman: ", "\n\n", "Assistant:"),
}
# Rendered to find out what a chat template writes around a question and an answer.
_QUESTION, _ANSWER = "What is 73915?", "It is 48263."
# The one that Llama 3's template writes where it cannot ask for the date.
DATE = datetime(2024, 7, 26)
_REMEDY = "mend it in the model's folder (chat_template.jinja), or use text.template=question-answer."


class Turn(NamedTuple):
    """The texts that a chat template writes around an answer."""

    before: str  # the prompt's end, from its last control token on
    prefill: (
        str  # between the generation prompt and every answer (an empty thinking block): prompts end with it
    )
    opening: str  # white space that belongs to the answer
    closing: str  # text after the answer, up to the end of its turn
    end: int  # id of the token that ends an answer's turn


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
    """Return the ids of the prompt up to where the answer starts; the end of a long question is cut off."""
    ids = _prompt_ids(tokenizer, question, template)
    return shorten_prompt(tokenizer, question, ids, template=template, max_tokens=max_tokens)


def shorten_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, ids: list[int], *, template: Template, max_tokens: int
) -> list[int]:
    """Return the ids of the prompt within ``max_tokens``; ``ids`` are those of the whole prompt."""
    return shorten_text(
        question, ids, lambda text: _prompt_ids(tokenizer, text, template), max_tokens=max_tokens
    )[1]


def shorten_text(
    text: str, ids: list[int], encode: Callable[[str], list[int]], *, max_tokens: int
) -> tuple[str, list[int]]:
    """Return ``text`` without its end, and the ids of its prompt, at most ``max_tokens``.

    ``ids`` are those with the whole text, ``encode`` returns those with a shorter one. Raises InputError.
    """
    kept = len(text)
    while len(ids) > max_tokens:
        if kept == 0:
            raise InputError(
                f"text.max_prompt_tokens={max_tokens} leaves no room for a question: the template alone "
                f"takes {len(ids)} tokens; raise it."
            )
        excess = len(ids) - max_tokens
        kept = min(kept - 1, max(0, round(kept * (1 - excess / len(ids)))))
        ids = encode(text[:kept].rstrip())
    return (text if kept == len(text) else text[:kept].rstrip()), ids


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, answer: str, *, template: Template, max_tokens: int
) -> list[int]:
    """Return the ids of the answer and the end of its turn; an answer that is cut has no end token.

    In the plain templates the space after ``Answer:`` belongs to the answer's first token, so the answer is
    encoded together with that anchor.
    """
    if template == "chat":
        return _chat_answer_ids(tokenizer, answer.strip())[:max_tokens]
    before = PLAIN[template][-1]
    anchor, ids = (encode_text(tokenizer, text) for text in (before, f"{before} {answer.strip()}"))
    if ids[: len(anchor)] != anchor:
        raise InputError(
            "This tokenizer merges the answer's first word with the text before it: use text.template=chat "
            "with this model."
        )
    return [*ids[len(anchor) :], *end_tokens(tokenizer, template)][:max_tokens]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, template: Template) -> str:
    """Return the answer's text, without its end token."""
    if ids[-1:] and ids[-1] in end_tokens(tokenizer, template):
        ids = ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return what the tokenizer's chat template writes around an answer.

    Raises InputError if it cannot be used.
    """
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
    start = whole.rindex(_ANSWER)
    # The generation prompt need not be the beginning of the rendered answer.
    opening = whole[len(prompt) : start] if whole.startswith(prompt) else ""
    prefill, opening = (opening, "") if opening.strip() else ("", opening)
    pattern = control_tokens(tokenizer).pattern
    starts = [match.start() for match in pattern.finditer(prompt + prefill)]
    before = (prompt + prefill)[starts[-1] if starts else 0 :]
    after = whole[start + len(_ANSWER) :]
    closing, end = (
        str(tokenizer.eos_token),
        tokenizer.eos_token_id,
    )  # if the template leaves the end to the tokenizer
    if match := pattern.search(after):
        closing, end = after[: match.end()], tokenizer.convert_tokens_to_ids(match.group())
    assert isinstance(end, int)
    return Turn(before=before, prefill=prefill, opening=opening, closing=closing, end=end)


def _render(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None = None) -> str:
    """Render a conversation with the chat template; without an answer up to where that starts.

    Raises InputError.
    """
    messages = [("user", question)]
    if answer is not None:
        messages.append(("assistant", answer))
    turns = "a question" if answer is None else "a question and its answer"
    return render(tokenizer, messages, turns)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], turns: str) -> str:
    """Render (role, text) messages with the chat template, up to where an answer to the last one starts.

    ``turns`` names them in the error's sentence. Raises InputError.
    """
    fields = [{"role": role, "content": text} for role, text in messages]
    is_asked = messages[-1][0] == "user"
    try:
        return apply_chat_template(tokenizer, fields, add_generation_prompt=is_asked)
    except Exception as error:  # a template is a program that comes with the model, and may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"The chat template of this model's tokenizer fails on {turns} ({reason}): {_REMEDY}"
        ) from error


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render messages with the chat template, in which it is always `DATE`.

    The tokenizer keeps its own template, so exported models write the date of the day.
    """
    template = tokenizer.get_chat_template()
    return str(
        tokenizer.apply_chat_template(
            [*map(dict, messages)],
            chat_template=_with_date(template),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    )


@lru_cache(maxsize=8)
def _with_date(template: str) -> str:
    """Return a chat template in which a macro takes the place of transformers' function strftime_now.

    apply_chat_template hands templates no functions, and those that take a date as text name it differently.
    """
    if "strftime_now" not in template:
        return template
    text = "format"
    for code in sorted({*re.findall("%-?[A-Za-z]", template)}):
        text += f" | replace({json.dumps(code)}, {json.dumps(DATE.strftime(code))})"
    return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, template: Template) -> list[int]:
    if template == "chat":
        prefill = chat_turn(tokenizer).prefill
        markers = choose_markers(question)
        rendered = _render(tokenizer, mark(tokenizer, question, markers))
        return encode_marked(tokenizer, rendered + prefill, markers)
    first, *rest = PLAIN[template]
    return [*prefix_ids(tokenizer), *encode_text(tokenizer, f"{first}{question}{''.join(rest)}")]


@lru_cache(maxsize=8)
def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before every text, such as a BOS token."""
    whole = list(tokenizer("x", add_special_tokens=True)["input_ids"])
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    offsets = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next(i for i in offsets if whole[i : i + len(bare)] == bare)])


def _chat_answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Return the ids of a whole answer as the chat template has it after its prompt."""
    turn, markers = chat_turn(tokenizer), choose_markers(answer)
    marked = turn.opening + mark(tokenizer, answer, markers) + turn.closing
    anchor, ids = (encode_marked(tokenizer, text, markers) for text in (turn.before, turn.before + marked))
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    # The prompt ends with a space that the tokenizer would merge with the first word.
    return encode_marked(tokenizer, marked, markers, continues=True)
