"""Test Krippendorff's alpha against the tables of his paper, and against its definition."""

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.rlhf.judging.agreement import MISSING, alpha_interval, krippendorff_alpha


def labels(*raters: str) -> NDArray[np.int64]:
    """Return labels (R, N) of strings with a letter for each unit, "." if there is none."""
    letters = sorted({letter for rater in raters for letter in rater} - {"."})
    return np.array([[letters.index(one) if one != "." else MISSING for one in rater] for rater in raters])


# Krippendorff 2011, sections A, B and C
BINARY = ("0100000010", "1110010000")
NOMINAL = ("aabbdcccedda", "babbbccceddd")
MISSING_DATA = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


@pytest.mark.parametrize(
    ("raters", "alpha"), [(BINARY, 0.095), (NOMINAL, 0.692), (MISSING_DATA, 0.743)], ids=["A", "B", "C"]
)
def test_alpha_is_that_of_the_paper(raters: tuple[str, ...], alpha: float) -> None:
    found = krippendorff_alpha(labels(*raters))
    assert found == pytest.approx(alpha, abs=5e-4)
    shuffled = labels(*raters)[::-1, ::-1]
    assert krippendorff_alpha(shuffled) == pytest.approx(found), "no order of raters or units matters"


def test_alpha_is_one_minus_observed_by_expected_disagreement() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        codes = rng.integers(MISSING, 3, size=(4, 9))
        units = [[code for code in unit if code != MISSING] for unit in codes.T]
        units = [unit for unit in units if len(unit) > 1]
        values = [code for unit in units for code in unit]
        observed = sum(
            sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units
        ) / len(values)
        every = [*permutations(values, 2)]
        expected = sum(a != b for a, b in every) / len(every)
        assert krippendorff_alpha(codes) == pytest.approx(1 - observed / expected)


def test_raters_who_agree_have_one_and_who_guess_have_about_zero() -> None:
    rng = np.random.default_rng(1)
    first = rng.integers(0, 2, 4000)
    assert krippendorff_alpha(np.stack([first, first])) == 1.0
    assert abs(krippendorff_alpha(np.stack([first, rng.integers(0, 2, 4000)]))) < 0.06


def test_without_two_labels_of_a_pair_or_two_kinds_of_labels_there_is_no_alpha() -> None:
    assert np.isnan(krippendorff_alpha(labels("ab.", "..a")))
    assert np.isnan(krippendorff_alpha(labels("aaa", "aaa")))
    assert alpha_interval(labels("ab.", "..a")).n == 0


def test_the_interval_redraws_units_with_two_labels() -> None:
    found = alpha_interval(labels(*MISSING_DATA))
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert found.low < found.value < found.high <= 1
    assert found.n == 11, "the twelfth unit has one label"
    # two raters who agree on 328 of 400 pairs, half of either kind, and by chance on half of them: .64
    pairs = [(0, 0)] * 164 + [(1, 1)] * 164 + [(0, 1)] * 36 + [(1, 0)] * 36
    many = alpha_interval(np.array(pairs).T)
    assert many.value == pytest.approx(0.64, abs=1e-3)
    # the deviation of an agreement of .82 is .0192, and alpha is twice that agreement less one
    assert many.low == pytest.approx(0.64 - 1.96 * 2 * 0.0192, abs=0.01)
    assert many.high == pytest.approx(0.64 + 1.96 * 2 * 0.0192, abs=0.01)
