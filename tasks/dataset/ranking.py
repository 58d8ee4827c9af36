"""Rank the answers of many questions, in columns, and draw comparisons between them.

The result for a question depends on that question alone.
"""

import random

import numpy as np
import pyarrow.compute as pc

from tasks.dataset.columns import Indices, Mask, Questions, to_starts


def dates(questions: Questions) -> Indices:
    """Return a number for the date of each answer, [m]: equal dates have equal ones, later dates higher."""
    created = questions.answers.column("created")
    ranks: Indices = pc.rank(created, "ascending", tiebreaker="dense").to_numpy().astype(np.int64)
    return ranks


def order_by_preference(questions: Questions) -> Indices:
    """Return the rows of the answers, question by question, the best answer first, [m].

    The best has the highest score; of equal scores, it is accepted, has most votes, is oldest.
    """
    number = questions.number
    keys = (number("id"), dates(questions), -number("votes"), ~number("accepted"), -number("score"))
    return np.lexsort((*keys, questions.owners))


def rank_scores(questions: Questions) -> Indices:
    """Return the rank of each answer by its score, from 1, [m].

    Equal scores share a rank; the next rank is one below.
    """
    order, is_new = _order_by_score(questions)
    groups = np.cumsum(is_new)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = 1 + groups - groups[questions.starts[:-1][questions.owners]]
    return ranks


def _order_by_score(questions: Questions) -> tuple[Indices, Mask]:
    """Return the rows of answers by question and falling score, and which differ from the one before, [m]."""
    scores, owners = questions.number("score"), questions.owners
    order = np.lexsort((-scores, owners))
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(scores[order]) != 0) | (np.diff(owners[order]) != 0)
    return order, is_new


def has_dates(questions: Questions) -> Mask:
    """Return whether the source says anything about an answer's age, by a date or by votes, [m]."""
    created = questions.answers.column("created")
    has_any: Mask = pc.not_equal(created, "").to_numpy(zero_copy_only=False)
    has_any |= questions.number("votes") != 0
    return has_any


def rank_ages(questions: Questions) -> tuple[Indices, Mask]:
    """Return the rank of each answer by age, the oldest 1, [m], and which questions have such ranks, [n]."""
    order = np.lexsort((questions.number("id"), dates(questions), questions.owners))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(questions.starts[:-1], questions.sizes) + 1
    num_dated = np.bincount(questions.owners[has_dates(questions)], minlength=len(questions.compared))
    return ranks, num_dated > 0


def compare_ages(questions: Questions, pairs: Indices) -> tuple[Mask, Mask]:
    """Return for pairs [k, 2] whether the first answer is older than the second, and whether that is known.

    Ids decide if the source has votes but no dates; without either, ids are hashes of the texts.
    """
    first, second = pairs.T
    votes, date, number = questions.number("votes"), dates(questions), questions.number("id")
    is_known = has_dates(questions)[first] | (votes[second] != 0)  # one date says that the source has dates
    is_older = (date[first] < date[second]) | (
        (date[first] == date[second]) & (number[first] < number[second])
    )
    return is_older, is_known


class _Comparisons:
    """All comparisons of n questions, numbered per question from 0, without a list of them.

    If scores decide, each answer wins against a tail of its question's answers by falling score, so that a
    comparison is computed from its number. For two questions with the scores [5, 5, 3] and [2, 1], at the
    places 0 to 4, the tails begin at [2, 2, 3, 4, 5], and the answers have [1, 1, 0, 1, 0] wins; ``wins``
    holds the sums before each place, [0, 1, 2, 2, 3, 3].
    """

    def __init__(self, questions: Questions) -> None:
        self.questions = questions
        self.order, is_new = _order_by_score(questions)
        ends = questions.starts[1:][questions.owners]  # of the question of each place in the order
        next_new = np.append(np.flatnonzero(is_new), len(is_new))
        self.tails = np.minimum(next_new[np.cumsum(is_new)] if len(is_new) else ends, ends)
        self.wins = to_starts(np.where(questions.compared[questions.owners], 0, ends - self.tails))
        own = np.bincount(questions.owners[questions.pairs[:, 0]], minlength=len(questions.compared))
        self.own_starts = to_starts(own)
        self.totals = np.where(questions.compared, own, np.diff(self.wins[questions.starts]))  # [n]

    def get(self, owners: Indices, numbers: Indices) -> Indices:
        """Return the comparisons with these numbers of these questions, [k, 2]."""
        pairs = np.empty((len(owners), 2), dtype=np.int64)
        own = self.questions.compared[owners]
        pairs[own] = self.questions.pairs[self.own_starts[owners[own]] + numbers[own]]
        positions = self.wins[self.questions.starts[owners[~own]]] + numbers[~own]
        places = np.searchsorted(self.wins, positions, side="right") - 1
        pairs[~own, 0] = self.order[places]
        pairs[~own, 1] = self.order[self.tails[places] + positions - self.wins[places]]
        return pairs


def count_pairs(questions: Questions) -> Indices:
    """Return the number of comparisons that can be drawn from each question, [n]."""
    return _Comparisons(questions).totals


def draw_pairs(questions: Questions, *, max_pairs: int, seed: int) -> tuple[Indices, Indices]:
    """Draw at most ``max_pairs`` comparisons of each question, without replacement.

    Return them, question by question, [k, 2], and how many there were to draw from, [n]. A question's
    generator is seeded from (seed, question id) alone.
    """
    comparisons = _Comparisons(questions)
    taken = np.minimum(comparisons.totals, max_pairs)
    starts = to_starts(taken)
    owners = np.repeat(np.arange(len(taken)), taken)
    numbers = np.arange(len(owners)) - starts[owners]
    ids = questions.about.column("id")
    for row in np.flatnonzero(comparisons.totals > max_pairs).tolist():
        drawn = draw_numbers(int(comparisons.totals[row]), max_pairs, seed, ids[row].as_py())
        numbers[starts[row] : starts[row + 1]] = drawn
    return comparisons.get(owners, numbers), comparisons.totals


def draw_numbers(total: int, count: int, seed: int, question_id: int) -> list[int]:
    """Draw ``count`` numbers below ``total``, sorted."""
    return sorted(random.Random(f"{seed}/{question_id}").sample(range(total), count))
