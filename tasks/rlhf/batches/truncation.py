"""Encode texts within their limits, and count what is left out.

Metrics are about the beginnings of texts that are cut, and about the ends of conversations that lose their
oldest messages.
"""

from collections.abc import Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches import conversations
from tasks.rlhf.batches.conversations import Fitted, Messages
from tasks.rlhf.batches.prompts import Template, encode_answer, encode_prompt, shorten_prompt
from tasks.rlhf.thresholds import MUCH_TRUNCATED

NO_LIMIT = 2**31 - 1


class TruncationCounts(NamedTuple):
    """Numbers of texts encoded, of texts that lose their ends to a limit, and of what is left out."""

    prompts: int = 0
    prompts_cut: int = 0
    answers: int = 0
    answers_cut: int = 0
    pairs: int = 0
    pairs_equal: int = 0  # left out: once cut, both answers are the same tokens
    messages: int = 0  # of prompts that are conversations
    messages_dropped: int = 0  # the oldest ones of conversations that are too long


class Encoder:
    """Encode prompts and answers with one tokenizer, template and pair of limits, and count what is cut.

    ``chats`` has the messages of the prompts that are conversations, by the prompt's text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Template,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        chats: Mapping[str, Messages] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.chats = chats or {}
        self.cut = TruncationCounts()

    def fresh(self) -> "Encoder":
        """Return an encoder with the same limits that has counted nothing."""
        return Encoder(
            self.tokenizer,
            template=self.template,
            max_prompt_tokens=self.max_prompt_tokens,
            max_answer_tokens=self.max_answer_tokens,
            chats=self.chats,
        )

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of a prompt."""
        if messages := self.chats.get(question):
            return self._fit(messages).ids
        limit = self.max_prompt_tokens
        ids = encode_prompt(self.tokenizer, question, template=self.template, max_tokens=NO_LIMIT)
        is_cut = len(ids) > limit
        self.cut = self.cut._replace(prompts=self.cut.prompts + 1, prompts_cut=self.cut.prompts_cut + is_cut)
        return shorten_prompt(self.tokenizer, question, ids, template=self.template, max_tokens=limit)

    def encode_turns(self, question: str) -> tuple[list[int], list[bool]]:
        """Return the ids of a prompt, and which of them belong to the earlier answers of a conversation."""
        messages = self.chats.get(question)
        if not messages:
            ids = self.encode_prompt(question)
            return ids, [False] * len(ids)
        fitted = self._fit(messages)
        return fitted.ids, conversations.find_answers(self.tokenizer, fitted.messages, self.template)

    def _fit(self, messages: Messages) -> Fitted:
        fitted = conversations.fit(
            self.tokenizer, messages, template=self.template, max_tokens=self.max_prompt_tokens
        )
        is_cut = fitted.messages[-1] != messages[-1]
        self.cut = self.cut._replace(
            prompts=self.cut.prompts + 1,
            prompts_cut=self.cut.prompts_cut + is_cut,
            messages=self.cut.messages + len(messages),
            messages_dropped=self.cut.messages_dropped + len(fitted.dropped),
        )
        return fitted

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer."""
        limit = self.max_answer_tokens
        ids = encode_answer(self.tokenizer, answer, template=self.template, max_tokens=NO_LIMIT)
        is_cut = len(ids) > limit
        self.cut = self.cut._replace(answers=self.cut.answers + 1, answers_cut=self.cut.answers_cut + is_cut)
        return ids[:limit]

    def count(self, more: TruncationCounts) -> None:
        """Count texts and pairs that were encoded elsewhere."""
        self.cut = TruncationCounts(*map(sum, zip(self.cut, more, strict=True)))

    def count_pairs(self, pairs: int, *, equal: int) -> None:
        """Count pairs, ``equal`` of which were left out."""
        self.cut = self.cut._replace(pairs=self.cut.pairs + pairs, pairs_equal=self.cut.pairs_equal + equal)

    def metrics(self, stage: str) -> dict[str, float]:
        """Return the shares cut, and the number of pairs left out, for a stage's summary."""
        cut = self.cut
        metrics: dict[str, float] = {}
        if cut.prompts:
            metrics[f"{stage}.prompts_cut"] = cut.prompts_cut / cut.prompts
        if cut.messages:
            metrics[f"{stage}.messages_dropped"] = cut.messages_dropped / cut.messages
        if cut.answers:
            metrics[f"{stage}.answers_cut"] = cut.answers_cut / cut.answers
        if cut.pairs:
            metrics[f"{stage}.pairs_equal_once_cut"] = cut.pairs_equal
        return metrics

    def warnings(self) -> list[str]:
        """Return a sentence for each limit that cuts or loses over a quarter of texts, messages or pairs."""
        cut = self.cut
        sentences = [
            _warning(
                "prompts", cut.prompts_cut, cut.prompts, f"text.max_prompt_tokens={self.max_prompt_tokens}"
            ),
            _warning(
                "answers", cut.answers_cut, cut.answers, f"text.max_answer_tokens={self.max_answer_tokens}"
            ),
        ]
        if cut.messages_dropped > MUCH_TRUNCATED * cut.messages:
            sentences.append(
                f"{cut.messages_dropped:,} of {cut.messages:,} messages of conversations "
                f"({cut.messages_dropped / cut.messages:.0%}) are left out, the oldest of those longer than "
                f"text.max_prompt_tokens={self.max_prompt_tokens}, so what this stage learns or measures is "
                "about their ends: raise it (the model's context is the limit), or leave long conversations "
                "out (data.max_prompt_chars)."
            )
        if cut.pairs_equal > MUCH_TRUNCATED * cut.pairs:
            sentences.append(
                f"{cut.pairs_equal:,} of {cut.pairs:,} pairs are left out, because their two answers are "
                f"equal once cut at text.max_answer_tokens={self.max_answer_tokens}: raise it."
            )
        return [sentence for sentence in sentences if sentence]


def _warning(what: str, cut: int, count: int, setting: str) -> str:
    if cut <= MUCH_TRUNCATED * count:
        return ""
    return (
        f"{cut:,} of {count:,} {what} ({cut / count:.0%}) are longer than {setting} and were cut, so what "
        "this stage "
        "learns or measures is about their beginnings: raise it (the model's context is the limit), or leave "
        f"long texts out (data.max_{what[:-1]}_chars)."
    )
