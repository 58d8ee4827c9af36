"""Test the scores of RewardBench 2 against numbers computed by hand."""

import math

import pytest

from tasks.rlhf.evaluation import reward_bench
from tasks.rlhf.evaluation.reward_bench import RowScores


def row(chosen: list[float], rejected: list[float], *, id: str = "1", subset: str = "Math") -> RowScores:
    return RowScores(id, subset, chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "score"),
    [
        ([2.0], [1.0, 0.0, -1.0], 1.0),
        ([1.0], [2.0, 0.0, -1.0], 0.0),
        ([2.0], [2.0, 0.0, -1.0], 0.5),
        ([2.0], [2.0, 2.0, 2.0], 0.25),
        ([1.0], [2.0, 2.0, 0.0], 0.0),
    ],
)
def test_a_row_counts_by_the_answers_that_share_the_best_score(
    chosen: list[float], rejected: list[float], score: float
) -> None:
    assert reward_bench.row_score(row(chosen, rejected)) == score


def test_a_subset_is_the_mean_of_its_rows_and_the_total_that_of_the_subsets() -> None:
    rows = [
        row([2.0], [1.0, 0.0, 0.0]),
        row([2.0], [2.0, 0.0, 0.0]),
        row([0.0], [1.0, 0.0, 0.0]),
        row([2.0], [1.0, 0.0, 0.0], subset="Focus"),
    ]
    scores = reward_bench.subset_scores(rows)
    assert list(scores) == ["Focus", "Math"]
    assert scores["Math"].value == 0.5
    assert scores["Math"].n == 3
    assert reward_bench.total_score(scores) == 0.75


def ties(number: int, reference: tuple[float, float], tied: tuple[list[float], float]) -> list[RowScores]:
    """Return a question asked in both ways: right and wrong scores of each."""
    return [
        row([reference[0]], [reference[1]], id=f"ref:{number}", subset="Ties"),
        row(tied[0], [tied[1]], id=f"tied:{number}", subset="Ties"),
    ]


def test_ties_are_scored_by_accuracy_and_margins() -> None:
    # right everywhere; right answers are 1 apart and 2 above the wrong one: all four shares count
    good = ties(0, (5.0, 2.0), ([4.0, 3.0], 1.0))
    expected = 1.0 + 0.01 * math.tanh(2 / 1 - 1)
    assert reward_bench.ties_score(reward_bench.pair_ties(good)) == pytest.approx(expected)
    # right answers are 3 apart and 1 above the wrong one: only the accuracies count
    spread = ties(1, (5.0, 2.0), ([5.0, 2.0], 1.0))
    expected = 0.6 + 0.01 * math.tanh(1 / 3 - 1)
    assert reward_bench.ties_score(reward_bench.pair_ties(spread)) == pytest.approx(expected)
    # the reference's margin of .5 is below the gap of 1: preferred in the tied asking, not in both
    near = ties(2, (2.5, 2.0), ([4.0, 3.0], 1.0))
    expected = 0.8 + 0.01 * math.tanh(0.5 / 1 - 1)
    assert reward_bench.ties_score(reward_bench.pair_ties(near)) == pytest.approx(expected)
    # wrong everywhere
    wrong = ties(3, (1.0, 2.0), ([1.0, 0.0], 2.0))
    expected = 0.01 * math.tanh(-2 / 1 - 1)
    assert reward_bench.ties_score(reward_bench.pair_ties(wrong)) == pytest.approx(expected)
    together = reward_bench.pair_ties([*good, *spread, *near, *wrong])
    mean = sum(reward_bench.ties_score([one]) for one in together) / 4
    assert reward_bench.ties_score(together) == pytest.approx(mean)
    interval = reward_bench.ties_interval(together)
    assert interval.low < mean < interval.high
    assert interval.n == 4


def test_equal_scores_are_no_preference() -> None:
    same = ties(0, (1.0, 1.0), ([1.0, 1.0], 1.0))
    assert reward_bench.ties_score(reward_bench.pair_ties(same)) == 0
    no_gap = ties(1, (2.0, 1.0), ([2.0, 2.0], 1.0))
    assert reward_bench.ties_score(reward_bench.pair_ties(no_gap)) == pytest.approx(1.01)


def test_questions_asked_in_one_way_only_are_left_out_of_ties() -> None:
    rows = ties(0, (5.0, 2.0), ([4.0, 3.0], 1.0))[:1]
    assert reward_bench.subset_scores(rows) == {}
    assert list(reward_bench.subset_scores([*rows, row([1.0], [0.0])])) == ["Math"]
