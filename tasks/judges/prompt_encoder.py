"""Make a local model's tokens of the prompt that a judge is asked."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tasks.judges import fill_prompt
from tasks.judges.judge import Answer, Battle
from tasks.rlhf.batches.control_tokens import choose_markers, encode_marked, mark
from tasks.rlhf.batches.prompts import apply_chat_template
from tasks.system.errors import InputError

SHORTEST = 20  # tokens that are left of each answer


class PromptEncoder:
    """Fills the template, applies the chat template if there is one, and cuts answers that are too long.

    Control tokens that an answer writes out ("<|im_end|>") are encoded as the characters that they are. With
    ``opens_reply`` the template's last line begins the model's reply, else all of it is the request.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, limit: int, *, opens_reply: bool
    ) -> None:
        self.tokenizer, self.template, self.limit, self.opens_reply = tokenizer, template, limit, opens_reply
        self.num_asked = self.num_cut = self.num_without_room = 0

    def encode_all(self, battles: Sequence[Battle]) -> dict[int, list[int]]:
        """Return the prompts' tokens by place; a battle whose question leaves no room for answers has none.

        Raises InputError if that holds for all of them.
        """
        encoded = {place: ids for place, one in enumerate(battles) if (ids := self.encode(one)) is not None}
        if battles and not encoded:
            raise InputError(
                f"judge.max_tokens: every question with its prompt takes so much of {self.limit} tokens that "
                "no answers fit: raise it, or name a judge with a longer context"
            )
        return encoded

    def encode(self, battle: Battle) -> list[int] | None:
        """Return the prompt's tokens; None if the question leaves no room for the answers.

        If it is too long, both answers are cut at their ends.
        """
        self.num_asked += 1
        ids = self._encode(battle)
        if len(ids) <= self.limit:
            return ids
        answers = [self._tokens(one.text) for one in (battle.first, battle.second)]
        room = self.limit - (len(ids) - sum(map(len, answers)))
        while room > 2 * SHORTEST:
            kept = [
                answer[:length]
                for answer, length in zip(answers, share_room(room, *map(len, answers)), strict=True)
            ]
            first, second = (Answer(str(self.tokenizer.decode(one))) for one in kept)
            ids = self._encode(Battle(battle.question, first, second))
            if len(ids) <= self.limit:
                self.num_cut += 1
                return ids
            room -= len(ids) - self.limit  # a cut text may encode to more tokens
        self.num_without_room += 1
        return None

    def _encode(self, battle: Battle) -> list[int]:
        texts = (battle.question, battle.first.text, battle.second.text)
        markers = choose_markers("".join((self.template, *texts)))
        marked = [mark(self.tokenizer, text, markers) for text in texts]
        text = fill_prompt.fill(self.template, *marked)
        if self.tokenizer.chat_template:
            request, _, opening = text.rpartition("\n") if self.opens_reply else (text, "", "")
            messages = [{"role": "user", "content": request}]
            text = apply_chat_template(self.tokenizer, messages)
            return encode_marked(self.tokenizer, text + opening, markers)
        start = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        return [*start, *encode_marked(self.tokenizer, text, markers)]

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def warnings(self) -> list[str]:
        """Return a sentence if prompts were cut, and one if questions left no room for answers."""
        found = cut_warnings(self.num_asked, self.num_cut, f"{self.limit:,} tokens")
        return [*found, *room_warnings(self.num_asked, self.num_without_room, f"{self.limit:,} tokens")]


def share_room(room: int, first: int, second: int) -> tuple[int, int]:
    """Return what each of two answers of these lengths keeps: half, and what the shorter one leaves."""
    half = room // 2
    if first <= half:
        return first, min(second, room - first)
    if second <= half:
        return min(first, room - second), second
    return half, half


def cut_warnings(num_asked: int, num_cut: int, limit: str) -> list[str]:
    """Return a sentence on how many of the prompts were longer than ``limit``, if any."""
    if not num_cut:
        return []
    return [
        f"Of {num_asked:,} prompts of the judge {num_cut:,} were longer than {limit}: of these it read the "
        "beginnings of the answers only."
    ]


def room_warnings(num_asked: int, num_without_room: int, limit: str) -> list[str]:
    """Return a sentence on how many of the prompts were not asked for lack of room, if any."""
    if not num_without_room:
        return []
    return [
        f"Of {num_asked:,} prompts of the judge {num_without_room:,} were not asked: the question left no "
        f"room for answers within {limit}. They count nowhere."
    ]
