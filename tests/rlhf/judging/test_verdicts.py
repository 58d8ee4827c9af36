"""Test that verdicts in two orders become outcomes, and that failures are never losses."""

import numpy as np
import pytest

from tasks.rlhf.judging.verdicts import Counts, Verdict, resolve


@pytest.mark.parametrize(
    ("forward", "backward", "outcome", "flipped"),
    [
        ("first", "second", 1.0, False),
        ("second", "first", 0.0, False),
        ("first", "first", 0.5, True),
        ("second", "second", 0.5, True),
        ("tie", "tie", 0.5, False),
        ("first", "tie", 0.5, False),
        ("tie", "first", 0.5, False),
        ("unparseable", "second", np.nan, False),
        ("first", "unparseable", np.nan, False),
        ("unparseable", "unparseable", np.nan, False),
    ],
)
def test_an_answer_wins_if_it_wins_in_both_orders(
    forward: Verdict, backward: Verdict, outcome: float, flipped: bool
) -> None:
    found = resolve([forward], [backward])
    assert found.outcomes[0] == pytest.approx(outcome, nan_ok=True)
    assert bool(found.flipped[0]) is flipped


def test_counts_are_of_every_kind() -> None:
    assert Counts.of(np.array([1, 1, 0.5, 0, np.nan])) == Counts(wins=2, ties=1, losses=1, unparseable=1)


def test_swapping_the_answers_swaps_wins_and_losses() -> None:
    kinds: list[Verdict] = ["first", "second", "tie", "unparseable"]
    forward, backward = [a for a in kinds for _ in kinds], [b for _ in kinds for b in kinds]
    ours, theirs = resolve(forward, backward).outcomes, resolve(backward, forward).outcomes
    np.testing.assert_array_equal(ours, 1 - theirs)
