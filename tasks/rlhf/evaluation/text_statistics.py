"""Describe sampled answers by statistics that move when text degenerates, and compare batches of them.

A policy that exploits its reward model repeats itself, runs on, or writes what no reader would. Each
statistic has a bad direction; a batch is compared with answers of the SFT model, by how much these vary, so
that no threshold belongs to one data set.
"""

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FENCE = "```"


class TextStatistics(NamedTuple):
    """Statistics of one answer, or their means over a batch."""

    repeated_4grams: float  # share of the runs of four tokens that occurred before in the answer
    distinct_2: float  # share of the pairs of neighbouring tokens that are distinct
    fenced: float  # share of the characters that stand in code fences
    zlib_ratio: float  # bytes after compression per byte before; repetition lowers it
    length: float  # tokens
    ended: float  # 1 if it has an end token


# Which way is bad: 1 up, -1 down, 0 both.
BAD = TextStatistics(repeated_4grams=1, distinct_2=-1, fenced=1, zlib_ratio=-1, length=0, ended=-1)


class Baseline(NamedTuple):
    """Means and standard deviations of the SFT model's answers."""

    mean: TextStatistics
    deviation: TextStatistics


def describe_answer(ids: Sequence[int], text: str, *, ended: bool) -> TextStatistics:
    """Return the statistics of an answer's tokens (with its end token, if it has one) and text."""
    fours, pairs = _ngrams(ids, 4), _ngrams(ids, 2)
    raw = text.encode()
    return TextStatistics(
        repeated_4grams=1 - len(set(fours)) / len(fours) if fours else 0.0,
        distinct_2=len(set(pairs)) / len(pairs) if pairs else 1.0,
        fenced=sum(map(len, text.split(FENCE)[1::2])) / len(text) if text else 0.0,
        zlib_ratio=min(1.0, len(zlib.compress(raw, 6)) / len(raw)) if raw else 1.0,
        length=float(len(ids)),
        ended=float(ended),
    )


def _ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]


def mean_statistics(rows: Sequence[TextStatistics]) -> TextStatistics:
    """Return the means over a batch."""
    return TextStatistics(*np.mean(rows, axis=0).tolist())


def mean_by_prompt(rows: Sequence[TextStatistics], group_size: int) -> list[TextStatistics]:
    """Return the means over the ``group_size`` answers to each prompt, which follow each other.

    Answers to one prompt are alike, so a batch has as many independent texts as prompts.
    """
    starts = range(0, len(rows), group_size)
    return [mean_statistics(rows[start : start + group_size]) for start in starts]


def measure_baseline(rows: Sequence[TextStatistics]) -> Baseline:
    """Return what is usual for the model that wrote these answers, one row for each prompt."""
    return Baseline(mean_statistics(rows), TextStatistics(*np.std(rows, axis=0, ddof=1).tolist()))


class Departure(NamedTuple):
    """How far a batch lies on the bad side of a statistic; 0 on the good side."""

    name: str
    standard_errors: float  # of the difference of the two means: is it more than chance?
    deviations: float  # of a prompt's answers: is it more than a drift?


def find_departures(baseline: Baseline, batch: TextStatistics, num_prompts: int) -> list[Departure]:
    """Return the departure of each statistic; both means are over ``num_prompts`` prompts.

    Standard errors alone would ring at any drift if the batch is large, deviations alone by chance if it is
    small. A statistic that hardly varies in the baseline has the deviation that one fully degenerate answer
    among them would make (standard errors), or a tenth of its range (deviations).
    """
    range_of = TextStatistics(1, 1, 1, 1, max(1.0, baseline.mean.length), 1)

    def departure(number: int) -> Departure:
        gap = (batch[number] - baseline.mean[number]) * (BAD[number] or 1)
        gap = abs(gap) if BAD[number] == 0 else max(0.0, gap)
        usual = baseline.deviation[number]
        error = max(usual, range_of[number] / math.sqrt(num_prompts + 2)) * math.sqrt(2 / num_prompts)
        return Departure(TextStatistics._fields[number], gap / error, gap / max(usual, range_of[number] / 10))

    return [departure(number) for number in range(len(BAD))]
