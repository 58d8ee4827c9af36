"""Add comparisons to the reward model's training questions that need no people (reward.hard_negatives).

A question's best answer is compared with one that is made to be worse and that always loses. What is made
depends on the seed, the questions' ids and their texts alone: every rank makes the same, whatever the order
of the rows. The questions with what was added are held in memory, which those of the table are not.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, get_args

from tasks.config.sections.reward import HardNegative, HardNegatives
from tasks.programs.runtime.program import ReportProgress
from tasks.programs.token_tables.questions import decode, to_batch
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.prompts import end_tokens
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute.seeds import mix
from tasks.rlhf.evaluation.hard_negatives import (
    Names,
    decode_texts,
    encode_with_wrong_name,
    find_names,
    first_third,
)

KINDS: tuple[HardNegative, ...] = get_args(HardNegative)  # their numbers are part of the draws
BATCH_QUESTIONS = 1024  # that become columns together
GAP = 1.0  # of a made comparison: as between answers one point apart
NEXT, COUNT, ORDER, NAME = range(4)  # separate draws


class Hardened(NamedTuple):
    """Questions with the comparisons that were added to them."""

    questions: TokenTable[Comparison]
    made: dict[str, int]  # number of comparisons that were made, by kind


def add_hard_negatives(
    questions: TokenTable[Comparison],
    encoder: Encoder,
    settings: HardNegatives,
    *,
    seed: int,
    report_progress: ReportProgress | None = None,
) -> Hardened:
    """Return the questions, some with made answers that lose against their best one.

    A made answer that is equal to one of the question's own is left out, and so are questions without a best
    answer that ends by itself. With a share of 0 the same table is returned.
    """
    made: dict[str, int] = dict.fromkeys(settings.kinds, 0)
    if not settings.share:
        return Hardened(questions, made)
    maker = AnswerMaker(questions, encoder, settings, seed)
    batches = []
    rows = enumerate(questions)
    while chunk := list(islice(rows, BATCH_QUESTIONS)):
        hardened = []
        for index, question in chunk:
            answers = maker.make_answers(index, question)
            for kind in answers:
                made[kind] += 1
            hardened.append(_append(question, maker.find_best(question), [*answers.values()]))
        batches.append(to_batch(hardened))
        if report_progress:
            report_progress(chunk[-1][0] + 1, len(questions))
    return Hardened(TokenTable(batches, decode), made)


def _append(question: Comparison, best: int | None, made: list[list[int]]) -> Comparison:
    """Return the question with answers that lose against the answer number ``best``."""
    if best is None or not made:
        return question
    first = len(question.answers)
    return question._replace(
        answers=[*question.answers, *made],
        pairs=[*question.pairs, *((best, first + number) for number in range(len(made)))],
        gaps=[*question.gaps, *[GAP] * len(made)],
        older=[*question.older, *[None] * len(made)],
    )


class AnswerMaker:
    """Makes answers that are worse than the best one of each question of a table."""

    def __init__(
        self, questions: TokenTable[Comparison], encoder: Encoder, settings: HardNegatives, seed: int
    ) -> None:
        self.questions, self.encoder, self.settings, self.seed = questions, encoder, settings, seed
        self.ends = end_tokens(encoder.tokenizer, encoder.template)
        self.next = _next_questions(questions.column("question_id"), seed)
        texts = self._read_texts() if "wrong_name" in settings.kinds else ()
        self.names: Names = find_names(texts)

    def _read_texts(self) -> Iterator[tuple[str, str]]:
        for question in self.questions:
            best = self.find_best(question)
            if best is not None:
                yield self._decode(question, best)

    def find_best(self, question: Comparison) -> int | None:
        """Return the number of the best answer that ends by itself; of several the least by its tokens.

        None if all of them are cut.
        """
        ended = [number for number in question.best if question.answers[number][-1] in self.ends]
        return min(ended, key=lambda number: question.answers[number], default=None)

    def make_answers(self, index: int, question: Comparison) -> dict[HardNegative, list[int]]:
        """Return the made answers of question number ``index``, at most one of each kind, with end tokens."""
        best, made = self.find_best(question), dict[HardNegative, list[int]]()
        if best is None:
            return made
        share, key = self.settings.share, question.question_id
        wanted = int(share) + (mix(self.seed, key, COUNT) < share % 1 * 2**63)
        order = sorted(self.settings.kinds, key=lambda kind: mix(self.seed, key, ORDER, KINDS.index(kind)))
        for kind in order:  # one that cannot be made leaves its place to the next
            if len(made) == wanted:
                break
            answer = self._make(kind, index, question, best)
            if answer is not None and answer not in [*question.answers, *made.values()]:
                made[kind] = answer
        return made

    def _make(self, kind: HardNegative, index: int, question: Comparison, best: int) -> list[int] | None:
        body, end = question.answers[best][:-1], question.answers[best][-1:]
        match kind:
            case "unrelated":
                return self._take_from_next(index, question)
            case "wrong_name":
                return self._copy_wrong_name(question, best)
            case "truncated":
                return first_third(body) + end
            case "repeated":
                fits = 2 * len(body) < self.encoder.max_answer_tokens
                return body + body + end if fits else None

    def _take_from_next(self, index: int, question: Comparison) -> list[int] | None:
        """Return the best answer of another question, None if that asks the same or has none."""
        other = self.questions[self.next[index]]
        best = self.find_best(other)
        return None if best is None or other.prompt == question.prompt else other.answers[best]

    def _copy_wrong_name(self, question: Comparison, best: int) -> list[int] | None:
        return encode_with_wrong_name(
            self.encoder.tokenizer,
            self._decode(question, best),
            self.names,
            draw=mix(self.seed, question.question_id, NAME),
            template=self.encoder.template,
            max_answer_tokens=self.encoder.max_answer_tokens,
        )

    def _decode(self, question: Comparison, best: int) -> tuple[str, str]:
        return decode_texts(
            self.encoder.tokenizer,
            question.prompt,
            question.answers[best],
            template=self.encoder.template,
        )


def _next_questions(ids: list[int], seed: int) -> list[int]:
    """Return the index of the question after each one, in a circle in an order drawn by the ids."""
    order = sorted(range(len(ids)), key=lambda index: (mix(seed, ids[index], NEXT), ids[index]))
    following = [0] * len(ids)
    for index, after in zip(order, [*order[1:], *order[:1]], strict=True):
        following[index] = after
    return following
