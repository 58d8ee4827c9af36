"""Judge answers by a causal language model: P("A") against P("B") as its next token."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.judges.judge import Battle, ReportProgress
from tasks.judges.prompt_encoder import PromptEncoder
from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.judging.verdicts import Verdict
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite
from tasks.system.errors import InputError


class Settings(NamedTuple):
    """How the judge is asked."""

    template: str
    max_tokens: int
    tie: float  # log odds up to which a verdict is a tie, nats
    batch_size: int


class LanguageModelJudge:
    """A language model that is shown both answers, and whose next token is compared between the two labels.

    One forward pass for each battle: it is deterministic, has no text to misread, and sends nothing away
    (the exact-match scoring of MT-Bench's judges, without their generated reasoning).
    """

    name = "lm"
    about = "It read the question and both answers, and its next token, A or B, is its verdict."

    def __init__(
        self, title: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> None:
        self.title, self.model, self.tokenizer, self.settings = title, model, tokenizer, settings
        self.labels = [label_tokens(tokenizer, letter) for letter in "AB"]
        limit = min(settings.max_tokens, context_length(model))
        self.encoder = PromptEncoder(tokenizer, settings.template, limit, opens_reply=True)

    def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> list[Verdict]:
        """Return the verdicts; "unparseable" where the question leaves no room for answers.

        Raises InputError if all questions do, or if a score is not finite.
        """
        odds = self.log_odds(battles, report_progress).tolist()
        return [self._decide(one) for one in odds]

    def _decide(self, log_odds: float) -> Verdict:
        if math.isnan(log_odds):
            return "unparseable"
        if abs(log_odds) <= self.settings.tie:
            return "tie"
        return "first" if log_odds > 0 else "second"

    @torch.no_grad()
    def log_odds(self, battles: Sequence[Battle], report_progress: ReportProgress) -> Tensor:
        """Return log P("A") - log P("B"), (N,) float32 on the CPU, in the order of ``battles``.

        It is NaN where the question leaves no room for answers.
        """
        encoded = self.encoder.encode_all(battles)
        order = sorted(encoded, key=lambda place: len(encoded[place]))  # little padding
        odds = torch.full((len(battles),), math.nan)
        size = self.settings.batch_size
        for first in range(0, len(order), size):
            places = order[first : first + size]
            odds[places] = self._batch_log_odds([encoded[place] for place in places])
            report_progress(first + len(places), len(order))
        check_finite({"the judge's log odds": odds[order]}, advice=UNSOUND_MODEL)
        return odds

    def _batch_log_odds(self, rows: list[list[int]]) -> Tensor:
        """Return the log odds of prompts (token ids), padded on the right, where causal attention ends."""
        device = self.model.device
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        ids = torch.zeros((len(rows), int(ends.max()) + 1), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        hidden = hidden_states(self.model, ids.to(device))
        logits = output_head(self.model)(hidden[torch.arange(len(rows), device=device), ends]).float()
        first, second = (logits[:, label].logsumexp(dim=1) for label in self.labels)
        return (first - second).cpu()

    def warnings(self) -> list[str]:
        """Return sentences on prompts that were cut or not asked."""
        return self.encoder.warnings()


def context_length(model: PreTrainedModel) -> int:
    """Return the most tokens that a model reads; a large number if it has no limit."""
    return getattr(model.config, "max_position_embeddings", None) or 2**31


def label_tokens(tokenizer: PreTrainedTokenizerBase, letter: str) -> list[int]:
    """Return the tokens that a label can begin with: with and without a space before it.

    Raises InputError if the tokenizer has none for it.
    """
    found = []
    for text in (letter, f" {letter}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [piece for piece in ids if str(tokenizer.decode([piece])).strip()]
        if pieces and str(tokenizer.decode([pieces[0]])).strip() == letter:
            found.append(pieces[0])
    if not found:
        raise InputError(f"judge.path: the tokenizer has no token for {letter}: name another model")
    return sorted(set(found))
