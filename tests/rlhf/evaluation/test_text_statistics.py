"""Test the statistics of text by values computed by hand, and alarms by planted degenerations."""

import random
import zlib

import numpy as np
import pytest

from tasks.rlhf.evaluation.text_statistics import (
    Baseline,
    TextStatistics,
    describe_answer,
    find_departures,
    mean_by_prompt,
    mean_statistics,
    measure_baseline,
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


def far(baseline: Baseline, batch: TextStatistics, count: int) -> set[str]:
    """Return the statistics in which a batch is worse by 6 standard errors and a deviation."""
    found = find_departures(baseline, batch, count)
    return {one.name for one in found if one.standard_errors > 6 and one.deviations > 1}


def test_answers_of_the_same_model_raise_no_alarm() -> None:
    baseline = measure_baseline(answers(0))
    worst = [
        max(one.standard_errors for one in find_departures(baseline, mean_statistics(answers(seed)), 64))
        for seed in range(1, 301)
    ]
    assert max(worst) < 5


def lengths(rng: np.random.Generator, num_prompts: int, group_size: int) -> list[TextStatistics]:
    """Return answers whose lengths vary with the prompt more than within it, one prompt after the other."""
    usual = rng.lognormal(3, 0.5, num_prompts).repeat(group_size)
    found = usual * rng.lognormal(0, 0.2, len(usual))
    return [TextStatistics(0.0, 1.0, 0.0, 0.9, float(length), 1.0) for length in found]


@pytest.mark.parametrize(("num_prompts", "group_size"), [(64, 1), (16, 4), (8, 8), (8, 64), (512, 1)])
def test_an_unchanged_model_rings_in_few_runs_whatever_the_groups(num_prompts: int, group_size: int) -> None:
    """Of 100 runs of 24 steps, in which two batches in a row lie far from the first one."""
    rng, rings = np.random.default_rng(0), 0
    for _ in range(100):
        batches = [mean_by_prompt(lengths(rng, num_prompts, group_size), group_size) for _ in range(25)]
        baseline = measure_baseline(batches[0])
        faults = [bool(far(baseline, mean_statistics(one), num_prompts)) for one in batches[1:]]
        rings += any(map(bool.__and__, faults, faults[1:]))
    assert rings <= 3


def test_a_drift_that_is_small_for_an_answer_is_no_fault_in_a_large_batch() -> None:
    rng = np.random.default_rng(0)
    baseline = measure_baseline(lengths(rng, 1024, 1))
    longer = [one._replace(length=one.length * 1.3) for one in lengths(rng, 1024, 1)]
    (departure,) = (
        one for one in find_departures(baseline, mean_statistics(longer), 1024) if one.name == "length"
    )
    assert departure.standard_errors > 6
    assert departure.deviations < 1
    assert far(baseline, mean_statistics(longer), 1024) == set()


@pytest.mark.parametrize(
    ("planted", "names"),
    [
        ({"looping": 0.3}, {"repeated_4grams", "distinct_2"}),
        ({"longer": 15}, {"length"}),
    ],
)
def test_planted_degeneration_is_found_and_named(planted: dict[str, float], names: set[str]) -> None:
    baseline = measure_baseline(answers(0))
    batch = mean_statistics(answers(1, **planted))  # type: ignore[arg-type]
    assert names <= far(baseline, batch, 64) <= names | {"zlib_ratio"}  # a longer text shrinks more


def test_the_good_direction_is_no_departure() -> None:
    baseline = measure_baseline(answers(0, looping=0.5))
    found = {one.name: one for one in find_departures(baseline, mean_statistics(answers(1)), 64)}
    assert found["repeated_4grams"][1:] == found["distinct_2"][1:] == (0, 0)


def test_answers_to_one_prompt_are_averaged_first() -> None:
    rows = [TextStatistics(0, 1, 0, 1, length, 1) for length in (10, 20, 30, 50)]
    assert [one.length for one in mean_by_prompt(rows, 2)] == [15, 40]
    assert mean_by_prompt(rows, 1) == rows
