"""Score answers with reward models other than the run's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.config.jobs import PpoJob
from tasks.config.sections.rewards import OtherRewardModel
from tasks.programs.ppo_stage.load_models import TOLERANCE, check_probes, refuse_exploitable
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import prompts, sequences
from tasks.rlhf.batches.conversations import Messages
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.models import fingerprint, loading, reward_model, sequence_classifier
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training.rollouts import PpoModels
from tasks.system.errors import InputError

NO_CONTEXT = 2**20  # tokens, of a model that does not say how many it reads
BATCH_SIZE = 64  # answers at a time, unless machine.micro_batch is set

Chats = Mapping[str, Messages]  # the messages of questions that are conversations, by their text


class AnsweredQuestions(NamedTuple):
    """Questions with their answers as text, which of these have an end token, and the messages of
    conversations.
    """

    questions: list[str]
    answers: list[str]
    ended: list[bool]
    chats: Chats

    def rows(self, rows: slice) -> "AnsweredQuestions":
        """Return some of them."""
        return AnsweredQuestions(self.questions[rows], self.answers[rows], self.ended[rows], self.chats)


class TextScorer(NamedTuple):
    """A reward model with a tokenizer of its own: reads questions and answers as text."""

    scorer: Scorer
    encoder: Encoder
    device: torch.device
    batch_size: int

    def __call__(self, answered: AnsweredQuestions) -> Tensor:
        """Return the normalised reward of each answer, (B,) float32."""
        self.encoder.chats = answered.chats
        asked = [self.encoder.encode_prompt(question) for question in answered.questions]
        replies = [
            self._encode(text, ended=ended)
            for text, ended in zip(answered.answers, answered.ended, strict=True)
        ]
        pad_id = self.encoder.tokenizer.pad_token_id
        batch = sequences.join(asked, replies, pad_id=pad_id, device=self.device)
        rows = torch.arange(len(asked), device=self.device)
        parts = [
            reward_model.normalised_rewards(self.scorer, batch.rows(part))
            for part in rows.split(self.batch_size)
        ]
        return torch.cat(parts)

    def _encode(self, answer: str, *, ended: bool) -> list[int]:
        """Return the ids of an answer; one that was cut has no end token."""
        ids = self.encoder.encode_answer(answer)
        ends = prompts.end_tokens(self.encoder.tokenizer, self.encoder.template)
        return ids[:-1] if not ended and len(ids) > 1 and ids[-1] in ends else ids


class SharedScorer(NamedTuple):
    """A reward model on the policy's own base: reads the policy's tokens."""

    scorer: Scorer

    def __call__(self, batch: Sequences) -> Tensor:
        """Return the normalised reward of each answer, (B,) float32."""
        return reward_model.normalised_rewards(self.scorer, batch)


def load_other_model(
    settings: OtherRewardModel,
    job: PpoJob,
    run: Run,
    models: PpoModels,
    device: torch.device,
) -> tuple[SharedScorer | TextScorer, bool]:
    """Return a reward model that the settings name, and whether its normalisation is stored with it.

    Raises InputError if it does not fit, StepZeroError if it does not compute what it did when it was stored.
    """
    folder, setting = run.inputs[f"reward_{settings.name}"], f"ppo.rewards.models {settings.name}"
    if not (folder / reward_model.RECORD).is_file():
        scorer = sequence_classifier.load(folder, device=device, setting=setting)
        return _with_tokenizer(scorer, folder, settings, job, run, device), False
    record = reward_model.load_record(folder)
    refuse_exploitable(record, job.ppo, setting)
    own_base, stored = run.inputs.get(f"base_{settings.name}"), models.model.dtype
    if own_base is None:
        if reward_model.is_adapter(folder):
            _check_base(folder, models, setting)
        name = f"reward_{settings.name}"
        _, scorer = reward_model.load(folder, models.model, device=device, name=name)
        for parameter in models.trained.values():  # attaching an adapter freezes all others
            parameter.requires_grad_(True)
    else:
        base = loading.load(own_base, device=device, precision=settings.precision)
        actual = fingerprint.compute_fingerprint(own_base, base)
        fingerprint.check_fingerprint(folder / "adapter", actual, setting=f"{setting}, precision,")
        stored = loading.stored_dtype(base)
        _, scorer = reward_model.load(folder, base, device=device)
    check_probes(scorer, record["probes"], device, tolerance=TOLERANCE[stored], name=f"Of {setting} the")
    if own_base is None and reward_model.is_adapter(folder):
        return SharedScorer(scorer), True
    return _with_tokenizer(scorer, own_base or folder / "model", settings, job, run, device), True


def _check_base(folder: Path, models: PpoModels, setting: str) -> None:
    """Refuse an adapter of another base if that is not named. Raises InputError."""
    trained = fingerprint.load_fingerprint(folder / "adapter")
    mismatch = fingerprint.describe_mismatch(trained, models.base, setting="weights.merged")
    if mismatch:
        raise InputError(
            f"{setting} was trained on another base than this run's SFT model: name that base's folder in "
            f"base. {mismatch}"
        )


def _with_tokenizer(
    scorer: Scorer,
    folder: Path,
    settings: OtherRewardModel,
    job: PpoJob,
    run: Run,
    device: torch.device,
) -> TextScorer:
    """Return the reward model with the tokenizer of ``folder`` and its own template and limits."""
    tokenizer = loading.load_tokenizer(folder)
    context = _context(folder)
    limit = settings.max_answer_tokens or min(4 * job.text.max_answer_tokens, context // 2)
    encoder = Encoder(
        tokenizer,
        template=settings.template or _own_template(tokenizer, run, settings, job),
        max_prompt_tokens=settings.max_prompt_tokens or min(4 * job.text.max_prompt_tokens, context - limit),
        max_answer_tokens=limit,
    )
    total = encoder.max_prompt_tokens + encoder.max_answer_tokens
    if total > context:
        raise InputError(
            f"ppo.rewards.models {settings.name}: max_prompt_tokens + max_answer_tokens is {total}, but this "
            f"model reads {context} tokens at most: lower them to fit"
        )
    return TextScorer(scorer, encoder, device, run.machine.micro_batch or BATCH_SIZE)


def _own_template(
    tokenizer: PreTrainedTokenizerBase, run: Run, settings: OtherRewardModel, job: PpoJob
) -> prompts.Template:
    is_stage_artifact = (run.inputs[f"reward_{settings.name}"] / reward_model.RECORD).is_file()
    return "chat" if tokenizer.chat_template and not is_stage_artifact else job.text.template


def _context(folder: Path) -> int:
    config = loading.load_config(folder).get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else NO_CONTEXT
