"""Write the chat template that renders a conversation as training did, and encode conversations with it.

A policy of a plain template (text.template=question-answer or human-assistant) has a tokenizer without a chat
template. With the one written here transformers, vLLM and TRL build the prompts that the policy was trained
on.
"""

import json
from collections.abc import Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from tasks.config.commands.usage import Template
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.control_tokens import choose_markers, encode_marked, mark
from tasks.system.errors import InputError

# A system message is put before the question that follows it: the plain templates know none.
_PLAIN = """\
{{%- set system = namespace(text='') -%}}
{{{{- {prefix} -}}}}
{{%- for message in messages -%}}
{{%- if message['role'] == 'system' -%}}
{{%- set system.text = message['content'] + '\\n\\n' -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- ' ' + (message['content'] | trim){end} -}}}}
{{%- else -%}}
{{{{- {before} + system.text + message['content'] + {after} -}}}}
{{%- set system.text = '' -%}}
{{%- endif -%}}
{{%- endfor -%}}
"""
_ENDS = {
    "question-answer": " + eos_token",
    # hh-rlhf's dialogues have no end token between their turns
    "human-assistant": " + (eos_token if loop.last else '')",
}


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # user or assistant
    content: str


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> None:
    """Let the tokenizer's chat template render prompts as ``template`` does.

    None is the tokenizer's own chat template, and question-answer if it has none. Raises InputError.
    """
    if template is None:
        template = "chat" if tokenizer.chat_template else "question-answer"
    if template != "chat":
        tokenizer.chat_template = _plain_template(tokenizer, template)
        return
    if prefill := prompts.chat_turn(tokenizer).prefill:  # training's prompts end with it
        own = str(tokenizer.chat_template).removesuffix("\n")
        added = f"{{% if add_generation_prompt %}}{{{{ {_literal(prefill)} }}}}{{% endif %}}"
        tokenizer.chat_template = own + added


def _plain_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """Return a plain template in Jinja."""
    prefix = "".join(tokenizer.convert_ids_to_tokens(list(prompts.prefix_ids(tokenizer))))
    first, *rest = prompts.PLAIN[template]
    return _PLAIN.format(
        prefix=_literal(prefix), before=_literal(first), after=_literal("".join(rest)), end=_ENDS[template]
    )


def _literal(text: str) -> str:
    """Return a text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where its next answer starts.

    No text of a message becomes a control token. Raises InputError if the chat template fails.
    """
    markers = choose_markers("".join(message["content"] for message in messages))
    marked = [
        {"role": message["role"], "content": mark(tokenizer, message["content"], markers)}
        for message in messages
    ]
    try:
        rendered = prompts.apply_chat_template(tokenizer, marked)
    except Exception as error:  # a template is a program that comes with the model, and may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"The chat template of this model fails on {len(messages)} messages ({reason})"
        ) from error
    return encode_marked(tokenizer, rendered, markers)
