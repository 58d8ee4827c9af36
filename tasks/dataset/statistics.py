"""Count statistics of the kept questions, over all splits: per partition, and merged."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.dataset.card import SizeBin, StatisticsCard
from tasks.dataset.columns import Indices, Questions
from tasks.dataset.ranking import compare_ages
from tasks.dataset.tables import build_pair_columns

Fields = dict[str, Any]  # of a row
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

    @classmethod
    def of(cls, questions: Questions, pairs: Indices, num_pairs: Indices) -> "Statistics":
        """Count questions and their pairs [k, 2], drawn from ``num_pairs`` [n] comparisons of each."""
        about, answers = questions.about, questions.answers
        chars = pc.utf8_length(answers.column("text")).to_numpy()
        is_older, is_known = compare_ages(questions, pairs)
        chosen, rejected = pairs.T
        counts = {
            "questions": len(about),
            "questions_with_pairs": int((num_pairs > 0).sum()),
            "pairs_to_draw_from": int(num_pairs.sum()),
            "pairs": len(pairs),
            "longer": int((chars[chosen] > chars[rejected]).sum()),
            "dated": int(is_known.sum()),
            "older": int((is_older & is_known).sum()),
        }
        scores = questions.number("score")
        prompt_chars = pc.utf8_length(about.column("prompt")).to_numpy()
        return cls(
            counts=Counter(counts),
            sites=_count(about.column("site")),
            licences=_count(about.column("licence")) + _count(answers.column("licence")),
            scores=_count(pa.array(scores)),
            gaps=_count(pa.array(scores[chosen] - scores[rejected])),
            answers=_count(pa.array(questions.sizes)),
            answer_bits=_count(pa.array(_num_bits(chars))),
            prompt_bits=_count(pa.array(_num_bits(prompt_chars))),
            examples=_draw_examples(questions, pairs, num_pairs),
        )

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


def _count(values: pa.Array) -> Counter[Any]:
    return Counter({entry["values"]: entry["counts"] for entry in values.value_counts().to_pylist()})


def _num_bits(numbers: Indices) -> Indices:
    """Return the number of bits of each number."""
    return np.frexp(numbers)[1].astype(np.int64)


def _draw_examples(questions: Questions, pairs: Indices, num_pairs: Indices) -> list[tuple[int, Fields]]:
    """Return a pair as an example, with its hash, for the questions whose hashes are the smallest."""
    owners = questions.owners[pairs[:, 0]]
    rows, first, sizes = np.unique(owners, return_index=True, return_counts=True)
    ids = questions.about.column("id").take(pa.array(rows)).to_pylist()
    found = sorted(zip(map(_hash, ids), first.tolist(), sizes.tolist(), strict=True))[:NUM_EXAMPLES]
    draws = [draw for draw, _, _ in found]
    chosen = np.array([start + (draw >> 56) % size for draw, start, size in found], dtype=np.int64)
    columns = build_pair_columns(questions, pairs[chosen], num_pairs)
    return list(zip(draws, pa.table(columns).to_pylist(), strict=True))


def _hash(question_id: int) -> int:
    digest = hashlib.blake2b(str(question_id).encode(), digest_size=8, person=b"example").digest()
    return int.from_bytes(digest)


def _without_fraction(number: float) -> float:
    """Return a whole number as an int, so that it is written without a fraction."""
    return int(number) if float(number).is_integer() else number


def _double_bins(bits: Counter[int]) -> list[SizeBin]:
    """Return counts in bins that double in width, from counts by number of bits."""
    return [{"from": 1 << count - 1, "below": 1 << count, "count": bits[count]} for count in sorted(bits)]
