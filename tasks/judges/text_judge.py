"""Judge answers by the text that a causal language model writes about them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasks.judges.judge import Battle, ReportProgress
from tasks.judges.language_model_judge import context_length
from tasks.judges.parse_verdict import parse_verdict
from tasks.judges.prompt_encoder import PromptEncoder
from tasks.rlhf.batches.sampling import pad_left
from tasks.rlhf.judging.verdicts import Verdict
from tasks.system.errors import InputError

LEAST_ROOM = 64  # tokens of the context that are left for a prompt


class Settings(NamedTuple):
    """How the judge is asked."""

    template: str
    max_tokens: int  # of a prompt
    max_reply_tokens: int
    batch_size: int


class Written(NamedTuple):
    """A reply, and whether the model ended it."""

    text: str
    is_complete: bool


class TextJudge:
    """A language model that is shown both answers and writes its verdict, always the likeliest token."""

    name = "lm"
    about = (
        "It read the question and both answers, and wrote its verdict; a reply without one counts nowhere."
    )

    def __init__(
        self, title: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> None:
        """Raises InputError if the model's context has no room for a prompt beside the reply."""
        self.title, self.model, self.tokenizer, self.settings = title, model, tokenizer, settings
        room = context_length(model) - settings.max_reply_tokens
        if room < LEAST_ROOM:
            raise InputError(
                f"judge.max_reply_tokens: of the context of {context_length(model):,} tokens "
                f"{settings.max_reply_tokens:,} for the reply leave no room for a prompt: lower it"
            )
        limit = min(settings.max_tokens, room)
        self.encoder = PromptEncoder(tokenizer, settings.template, limit, opens_reply=False)
        self.num_replies = self.num_cut_replies = 0

    def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> list[Verdict]:
        """Return the verdicts; "unparseable" where the question leaves no room for answers.

        Raises InputError if all questions do.
        """
        replies = self.replies(battles, report_progress)
        self.num_replies += len(replies)
        self.num_cut_replies += sum(not one.is_complete for one in replies.values())
        verdicts = {
            place: parse_verdict(one.text, is_complete=one.is_complete) for place, one in replies.items()
        }
        return [verdicts.get(place, "unparseable") for place in range(len(battles))]

    def replies(self, battles: Sequence[Battle], report_progress: ReportProgress) -> dict[int, Written]:
        """Return what the model writes about each battle, by place; none where it was not asked."""
        encoded = self.encoder.encode_all(battles)
        order = sorted(encoded, key=lambda place: len(encoded[place]))  # little padding
        found: dict[int, Written] = {}
        for first in range(0, len(order), self.settings.batch_size):
            places = order[first : first + self.settings.batch_size]
            found |= zip(places, self._write([encoded[place] for place in places]), strict=True)
            report_progress(len(found), len(order))
        return found

    @torch.no_grad()
    def _write(self, prompts: list[list[int]]) -> list[Written]:
        pad_id = self.tokenizer.pad_token_id
        ids, mask = pad_left(prompts, pad_id, self.model.device)
        ends = self._end_ids()
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.settings.max_reply_tokens,
            eos_token_id=ends,
            pad_token_id=pad_id,
        )
        generate: Any = self.model.generate
        rows = generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
        return [self._decode(row, set(ends)) for row in rows[:, ids.shape[1] :].tolist()]

    def _decode(self, row: list[int], ends: set[int]) -> Written:
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        text = str(self.tokenizer.decode(row[:length], skip_special_tokens=True))
        return Written(text, length < len(row))

    def _end_ids(self) -> list[int]:
        """Return the tokens that end a reply: the tokenizer's, and those that the model's settings name."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        more = [] if named is None else [named] if isinstance(named, int) else list(named)
        return sorted({self.tokenizer.eos_token_id, *more})

    def warnings(self) -> list[str]:
        """Return a sentence if prompts were cut, and one if replies were."""
        found = self.encoder.warnings()
        if self.num_cut_replies:
            found.append(
                f"Of {self.num_replies:,} replies of the judge {self.num_cut_replies:,} did not end within "
                f"{self.settings.max_reply_tokens:,} tokens: they count nowhere, except sole letters."
            )
        return found
