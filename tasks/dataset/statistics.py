"""Count statistics of the kept questions, over all splits: per partition, and merged."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tasks.dataset.card import SizeBin, StatisticsCard
from tasks.dataset.question import Pair, Question, is_older, ranks
from tasks.dataset.tables import Fields, build_pair_row

NUM_EXAMPLES = 20
COUNTERS = ("counts", "sites", "licences", "scores", "gaps", "answers", "answer_bits", "prompt_bits")


@dataclass
class Statistics:
    """Counters whose sum over partitions does not depend on how the questions were partitioned."""

    counts: Counter[str] = field(default_factory=Counter)
    sites: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    scores: Counter[float] = field(default_factory=Counter)
    gaps: Counter[float] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    answer_bits: Counter[int] = field(default_factory=Counter)
    prompt_bits: Counter[int] = field(default_factory=Counter)
    examples: list[tuple[int, Fields]] = field(default_factory=list)

    def add(self, question: Question, pairs: Sequence[Pair], sampled_of: int) -> None:
        """Count a question and its pairs, which were drawn from ``sampled_of`` comparisons."""
        self.counts["questions"] += 1
        self.counts["questions_with_pairs"] += bool(pairs)
        self.counts["pairs_to_draw_from"] += sampled_of
        self.sites[question.site] += 1
        self.licences[question.licence] += 1
        self.prompt_bits[len(question.prompt).bit_length()] += 1
        self.answers[len(question.answers)] += 1
        for answer in question.answers:
            self.licences[answer.licence] += 1
            self.scores[answer.score] += 1
            self.answer_bits[len(answer.text).bit_length()] += 1
        for pair in pairs:
            self._add_pair(question, pair)
        self._add_example(question, pairs, sampled_of)

    def _add_pair(self, question: Question, pair: Pair) -> None:
        good, bad = (question.answers[place] for place in pair)
        first = is_older(good, bad)
        self.counts["pairs"] += 1
        self.counts["longer"] += len(good.text) > len(bad.text)
        self.counts["dated"] += first is not None
        self.counts["older"] += bool(first)
        self.gaps[good.score - bad.score] += 1

    def _add_example(self, question: Question, pairs: Sequence[Pair], sampled_of: int) -> None:
        """Keep a pair of the question as an example if its hash is among the smallest."""
        if not pairs:
            return
        draw = int.from_bytes(
            hashlib.blake2b(str(question.id).encode(), digest_size=8, person=b"example").digest()
        )
        if len(self.examples) == NUM_EXAMPLES and draw >= self.examples[-1][0]:
            return
        pair = pairs[(draw >> 56) % len(pairs)]
        row = build_pair_row(question, pair, sampled_of, ranks(question.answers))
        self._set_examples([*self.examples, (draw, row)])

    def _set_examples(self, examples: Iterable[tuple[int, Fields]]) -> None:
        self.examples = sorted(examples, key=lambda example: example[0])[:NUM_EXAMPLES]

    def merge(self, other: "Statistics") -> None:
        """Add another partition's counters."""
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        self._set_examples([*self.examples, *other.examples])

    def to_card(self) -> StatisticsCard:
        """Return the fields of card.json that describe the kept questions."""
        counts = self.counts
        return {
            "site": ", ".join(sorted(self.sites)) if len(self.sites) <= 3 else f"{len(self.sites)} sites",
            "sites": dict(sorted(self.sites.items())),
            "kept": {
                "questions": counts["questions"],
                "answers": self.scores.total(),
                "pairs": counts["pairs"],
            },
            "questions_with_pairs": counts["questions_with_pairs"],
            "pairs_to_draw_from": counts["pairs_to_draw_from"],
            "scores": [
                {"score": _without_fraction(score), "count": count}
                for score, count in sorted(self.scores.items())
            ],
            "gaps": [
                {"gap": _without_fraction(gap), "count": count} for gap, count in sorted(self.gaps.items())
            ],
            "answers_per_question": [
                {"answers": number, "count": count} for number, count in sorted(self.answers.items())
            ],
            "answer_chars": _double_bins(self.answer_bits),
            "prompt_chars": _double_bins(self.prompt_bits),
            "longer_wins": counts["longer"] / counts["pairs"],
            "older_wins": counts["older"] / counts["dated"] if counts["dated"] else None,
            "licences": dict(sorted(self.licences.items())),
            "examples": [fields for _, fields in self.examples],
        }


def _without_fraction(number: float) -> float:
    """Return a whole number as an int, so that it is written without a fraction."""
    return int(number) if float(number).is_integer() else number


def _double_bins(bits: Counter[int]) -> list[SizeBin]:
    """Return counts in bins that double in width, from counts by number of bits."""
    return [{"from": 1 << count - 1, "below": 1 << count, "count": bits[count]} for count in sorted(bits)]
