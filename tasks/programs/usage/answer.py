"""Sample an answer a few tokens at a time, so that several policies can take turns."""

import time

import torch
from torch import Tensor
from transformers import DynamicCache, TopPLogitsWarper

from tasks.config.commands.usage import Sampling
from tasks.programs.usage.chat_templates import Message, encode_conversation
from tasks.programs.usage.loaded_policies import LoadedPolicy
from tasks.rlhf.batches import prompts
from tasks.rlhf.compute import seeds
from tasks.system.errors import InputError


class Answer:
    """An answer of a policy to a conversation, which grows."""

    def __init__(
        self, policy: LoadedPolicy, messages: list[Message], sampling: Sampling, *, seed: int
    ) -> None:
        """Encode the conversation without the oldest turns that have no room. Raises InputError."""
        self.policy, self.ids = policy, list[int]()
        self.temperature = policy.files.temperature
        if sampling.temperature is not None:
            self.temperature = sampling.temperature
        wanted = sampling.max_tokens or policy.files.max_answer_tokens
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.prompt, self.turns_left_out = _encode_what_fits(policy, messages, wanted)
        room = wanted if policy.context is None else policy.context - len(self.prompt)
        self.max_tokens = min(wanted, room)
        self.seed, self.seconds = seed, 0.0
        self.generator: torch.Generator | None = None
        self.cache = DynamicCache()

    @property
    def text(self) -> str:
        """Return the text so far, without the end token."""
        return prompts.decode_answer(self.policy.tokenizer, self.ids, template="chat")

    @property
    def has_ended(self) -> bool:
        """Whether the policy has ended its answer."""
        return bool(self.ids) and self.ids[-1] in self.policy.end_ids

    @property
    def is_complete(self) -> bool:
        """Whether no token follows."""
        return self.has_ended or len(self.ids) >= self.max_tokens

    @torch.no_grad()
    def extend(self, seconds: float) -> None:
        """Sample tokens for so long, at least one, unless the answer is complete."""
        started = now = time.monotonic()
        with self.policy.active() as model:
            while not self.is_complete and (now == started or now < started + seconds):
                new = self.ids[-1:] or self.prompt
                ids = torch.tensor([new], device=model.device)
                output = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                self.ids.append(self._draw(output.logits[:, -1].float()))
                now = time.monotonic()
        self.seconds += now - started

    def _draw(self, logits: Tensor) -> int:
        """Return the next token, drawn from its logits (1, V)."""
        if not torch.isfinite(logits).all():
            raise InputError(f"{self.policy.files.name} computes numbers that are not finite: it is broken")
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits / self.temperature
        if self.top_p is not None:
            scores = self.top_p(torch.empty(1, 0, dtype=torch.long), scores)
        if self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(seeds.mix(self.seed, 0))
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self.generator))


def _encode_what_fits(
    policy: LoadedPolicy, messages: list[Message], max_tokens: int
) -> tuple[list[int], int]:
    """Return the ids of the prompt, and how many of the oldest turns are left out. Raises InputError."""
    limit, room = policy.context, max_tokens
    if limit is not None:
        room = min(room, limit // 2)  # a long answer may end where the context does
        limit -= room
    for first in range(0, len(messages), 2):  # a question and its answer leave together
        ids = encode_conversation(policy.tokenizer, messages[first:])
        if limit is None or len(ids) <= limit:
            return ids, first // 2
    raise InputError(
        f"{policy.files.name}: the question takes {len(ids)} of the {policy.context} tokens that the model "
        f"can read, of which {room} are for its answer: ask a shorter one"
    )
