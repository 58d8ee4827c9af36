"""Test the statistics of text by values computed by hand, and alarms by planted degenerations."""

import random
import zlib

import pytest

from tasks.rlhf.evaluation.text_statistics import (
    TextStatistics,
    describe_answer,
    mean_statistics,
    measure_baseline,
    standard_errors,
)


def test_values_by_hand() -> None:
    text = "ab```cd```e"
    found = describe_answer([1, 2, 1, 2, 1, 2, 3], text, ended=True)
    # runs of four: 1212 2121 1212 2123; pairs: 12 21 12 21 12 23
    assert found.repeated_4grams == pytest.approx(1 / 4)
    assert found.distinct_2 == pytest.approx(3 / 6)
    assert found.fenced == pytest.approx(2 / 11)
    assert found.zlib_ratio == 1.0, "short texts do not shrink"
    assert (found.length, found.ended) == (7, 1)
    long = "again and " * 50
    assert describe_answer([1], long, ended=False).zlib_ratio == len(zlib.compress(long.encode(), 6)) / 500


def test_an_open_fence_counts_to_the_end() -> None:
    assert describe_answer([1], "a```bcd", ended=True).fenced == pytest.approx(3 / 7)


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3]])
def test_short_answers_are_not_degenerate(ids: list[int]) -> None:
    found = describe_answer(ids, "", ended=True)
    assert found[:4] == (0.0, 1.0, 0.0, 1.0)


def answers(seed: int, *, looping: float = 0.0, longer: int = 0) -> list[TextStatistics]:
    """Return 64 answers of varied words, some of which loop."""
    rng = random.Random(seed)
    found = []
    for _ in range(64):
        length = rng.randint(10, 30) + longer
        ids = [rng.randrange(200) for _ in range(length)]
        if rng.random() < looping:
            ids = (ids[:3] * length)[:length]
        found.append(describe_answer(ids, " ".join(map(str, ids)), ended=rng.random() < 0.9))
    return found


def test_answers_of_the_same_model_raise_no_alarm() -> None:
    baseline = measure_baseline(answers(0))
    worst = [max(standard_errors(baseline, mean_statistics(answers(seed)), 64)) for seed in range(1, 301)]
    assert max(worst) < 5


@pytest.mark.parametrize(
    ("planted", "names"),
    [
        ({"looping": 0.3}, {"repeated_4grams", "distinct_2", "zlib_ratio"}),
        ({"longer": 15}, {"length", "zlib_ratio"}),  # a longer text shrinks more
    ],
)
def test_planted_degeneration_is_found_and_named(planted: dict[str, float], names: set[str]) -> None:
    baseline = measure_baseline(answers(0))
    found = standard_errors(baseline, mean_statistics(answers(1, **planted)), 64)._asdict()  # type: ignore[arg-type]
    assert {name for name, size in found.items() if size > 6} == names


def test_the_good_direction_raises_no_alarm() -> None:
    baseline = measure_baseline(answers(0, looping=0.5))
    found = standard_errors(baseline, mean_statistics(answers(1)), 64)
    assert found.repeated_4grams == found.distinct_2 == 0
