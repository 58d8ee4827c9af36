"""Accuracy by stratum and against rules of thumb: who is in which, and intervals that know that pairs of one question hang together."""

import math

import pytest
import torch
from scipy.stats import bootstrap, spearmanr
from torch import Tensor

from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.evaluation.pair_accuracy import (
    accuracy_difference,
    by_gap,
    by_length,
    centre_by_question,
    clustered_mean,
    correct,
    credit,
    measure,
    spearman,
)

SHARE = (0.0, 1.0)


def some(num_questions: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Credits and question ids: one to eight pairs a question, whose accuracies differ widely between questions."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.arange(num_questions).repeat_interleave(
        torch.randint(1, 9, (num_questions,), generator=generator)
    )
    rate = torch.rand(num_questions, generator=generator)[question]
    return (torch.rand(len(question), generator=generator) < rate).double(), question


def test_credits_count_a_tie_as_half() -> None:
    assert credit(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).tolist() == [1.0, 0.0, 0.5]
    assert credit(torch.tensor([30, 7, 7]), torch.tensor([7, 30, 7])).tolist() == [
        1.0,
        0.0,
        0.5,
    ]  # the longer wins


def test_a_models_tie_is_no_success() -> None:
    assert correct(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).tolist() == [1.0, 0.0, 0.0]
    assert correct(torch.zeros(3), torch.zeros(3)).sum() == 0


def test_a_credit_and_its_reverse_sum_to_one() -> None:
    ours, theirs = torch.randn(50).round(decimals=1), torch.randn(50).round(decimals=1)
    assert (credit(ours, theirs) + credit(theirs, ours)).eq(1).all()


def test_measure_by_hand() -> None:
    found = measure(torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([9, 9, 4, 4]))
    assert found.wilson == wilson(2.5, 4)
    assert (found.clustered.value, found.clustered.n, found.questions) == (0.625, 4, 2)
    assert (found.clustered.low, found.clustered.high) == (
        0.5,
        0.75,
    )  # both draws of one question are not rare: 1/4 each


def test_gaps() -> None:
    """Steps of 1, 2, 3 and more; a fraction counts up."""
    credits, gap = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 2.0, 3.0, 8.0, 1.5])
    found = by_gap(credits, gap, torch.arange(6))
    assert {name: part.wilson for name, part in found.items()} == {
        "gap_1": wilson(1, 2),
        "gap_2": wilson(1, 2),
        "gap_3_up": wilson(1.5, 2),
    }
    assert list(by_gap(credits[:2], gap[:2], torch.arange(2))) == ["gap_1"]
    assert list(by_gap(credits[:1], torch.tensor([0.25]), torch.arange(1))) == ["gap_1"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (20, 18, "length_matched"),
        (18, 20, "length_matched"),
        (20, 17, "longer_chosen"),
        (17, 20, "shorter_chosen"),
        (9, 9, "length_matched"),
        (10, 9, "length_matched"),
        (9, 8, "longer_chosen"),
        (1, 2, "shorter_chosen"),
        *((10 * k, 9 * k, "length_matched") for k in (3, 7, 11, 13)),  # a tenth to the token
        *((9 * k - 1, 10 * k, "shorter_chosen") for k in (3, 7, 11, 13)),
    ],
)
def test_lengths_match_within_a_tenth_of_the_longer(chosen: int, rejected: int, expected: str) -> None:
    found = by_length(
        torch.ones(1), torch.tensor([chosen]), torch.tensor([rejected]), torch.zeros(1, dtype=torch.long)
    )
    assert list(found) == [expected]


def test_every_pair_is_in_one_stratum() -> None:
    credits, question = some(80)
    lengths = torch.randint(1, 40, (2, len(credits)), generator=torch.Generator().manual_seed(1))
    gap = torch.randint(1, 7, (len(credits),), generator=torch.Generator().manual_seed(2)).double()
    for parts in (by_length(credits, *lengths, question), by_gap(credits, gap, question)):
        assert len(parts) == 3
        assert sum(part.wilson.n for part in parts.values()) == len(credits)
        assert sum(part.wilson.value * part.wilson.n for part in parts.values()) == pytest.approx(
            credits.sum().item()
        )


def test_clustered_interval_is_scipys() -> None:
    """scipy redraws questions' (sum, count) with a generator of its own: ends agree to the noise of the draws."""
    credits, question = some(150)
    sums = torch.zeros(150, dtype=torch.float64).index_add(0, question, credits)
    data = (sums.numpy(), question.bincount().double().numpy())
    ratio = bootstrap(
        data,
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=0,
    )
    found = clustered_mean(credits, question, bounds=SHARE, draws=20_000)
    assert found.value == pytest.approx(credits.mean().item())
    assert found.low == pytest.approx(ratio.confidence_interval.low, abs=0.004)
    assert found.high == pytest.approx(ratio.confidence_interval.high, abs=0.004)


def test_pairs_of_one_question_are_one_observation() -> None:
    """Each pair eight times over in its question: Wilson's interval shrinks by sqrt(8), the clustered one stays as wide as of single pairs."""
    single = (torch.rand(100, generator=torch.Generator().manual_seed(3)) < 0.6).double()
    question = torch.arange(100)
    one, many = measure(single, question), measure(single.repeat(8), question.repeat(8))
    assert many.clustered[:3] == pytest.approx(one.clustered[:3])
    assert many.wilson.high - many.wilson.low < 0.4 * (many.clustered.high - many.clustered.low)
    assert one.wilson.high - one.wilson.low == pytest.approx(one.clustered.high - one.clustered.low, rel=0.15)


def test_the_clustered_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Truth 1/2 by symmetry; 95 % of 200 is 190, and five standard deviations below is 174."""
    held = 0
    for seed in range(200):
        found = clustered_mean(*some(60, seed=seed), bounds=SHARE, draws=200)
        held += found.low <= 0.5 <= found.high
    assert 174 <= held < 200


def test_one_seed_one_interval() -> None:
    credits, question = some(40)
    mixed = torch.randperm(len(credits), generator=torch.Generator().manual_seed(5))
    assert (
        measure(credits, question) == measure(credits, question) == measure(credits[mixed], question[mixed])
    )
    assert measure(credits, question + 10**12) == measure(credits, question)
    assert measure(credits, question).clustered != measure(credits, question, seed=1).clustered


def test_one_question_says_nothing_about_questions() -> None:
    assert measure(torch.ones(5), torch.zeros(5, dtype=torch.long)).clustered == (1.0, 0.0, 1.0, 5)
    assert accuracy_difference(torch.ones(5), torch.zeros(5), torch.zeros(5, dtype=torch.long)) == (
        1.0,
        -1.0,
        1.0,
        5,
    )


def test_advantage_is_of_the_same_pairs() -> None:
    """Two rules that agree everywhere but on six questions differ by those alone, however widely both vary."""
    theirs, question = some(100)
    ours = theirs.clone()
    better = torch.nonzero(theirs == 0)[:30:5, 0]
    ours[better] = 1.0
    found = accuracy_difference(ours, theirs, question)
    assert found.value == pytest.approx(6 / len(question))
    assert 0 < found.low < found.value < found.high < 0.05
    assert accuracy_difference(theirs, ours, question)[:3] == pytest.approx(
        (-found.value, -found.high, -found.low), abs=0.002
    )
    assert accuracy_difference(ours, ours, question)[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 12, (70,), generator=generator)
    rewards = (seed * tokens / 5 + torch.randn(70, generator=generator)).double().round(decimals=1)
    found = spearman(rewards, tokens)
    assert found.value == pytest.approx(spearmanr(rewards.numpy(), tokens.numpy()).statistic)
    assert -1 < found.low < found.value < found.high < 1
    assert spearman(rewards.exp(), tokens**3) == found  # ranks alone count
    assert spearman(-rewards, tokens)[:3] == pytest.approx((-found.value, -found.high, -found.low))


def test_spearman_interval_by_hand() -> None:
    """Ranks 1..5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8; z = atanh 0.8 = 1.09861, half = 1.96 * sqrt(1.32 / 2) = 1.59229."""
    found = spearman(torch.arange(5), torch.tensor([2, 1, 4, 3, 5]))
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high) == pytest.approx(
        (math.tanh(1.098612 - 1.592287), math.tanh(1.098612 + 1.592287)), abs=1e-5
    )


def test_answers_of_one_question_are_one_observation_of_a_rank_correlation() -> None:
    """Each pair of numbers four times over in its question: the interval of independent answers halves, that of redrawn questions does not."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(80, generator=generator)
    b = a + torch.randn(80, generator=generator)
    question = torch.arange(80).repeat(4)
    once, alone, grouped = (
        spearman(a, b),
        spearman(a.repeat(4), b.repeat(4)),
        spearman(a.repeat(4), b.repeat(4), question=question),
    )
    assert once.value == pytest.approx(grouped.value, abs=1e-6) == pytest.approx(alone.value, abs=1e-6)
    assert alone.high - alone.low < 0.55 * (once.high - once.low)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.2)
    order = torch.randperm(320, generator=generator)
    mixed = spearman(a.repeat(4)[order], b.repeat(4)[order], question=question[order])
    assert mixed[:3] == pytest.approx(grouped[:3])


def test_spearman_at_its_ends() -> None:
    for n in range(4, 40):  # rounding makes some exactly 1, whose z is infinite
        assert spearman(torch.arange(n), torch.arange(n))[:3] == pytest.approx((1.0, 1.0, 1.0))
    assert spearman(torch.arange(3), -torch.arange(3)) == (pytest.approx(-1.0), -1.0, 1.0, 3)
    constant = spearman(torch.ones(9), torch.arange(9))
    assert math.isnan(constant.value)
    assert constant[1:] == (-1.0, 1.0, 9)


def test_centring_takes_away_what_questions_differ_by() -> None:
    question = torch.tensor([5, 2, 5, 2, 8])
    assert centre_by_question(torch.tensor([1.0, 10.0, 3.0, 30.0, 7.0]), question).tolist() == [
        -1.0,
        -10.0,
        1.0,
        10.0,
        0.0,
    ]
    tokens, rewards = torch.tensor([1, 2, 101, 102]), torch.tensor([2.0, 1.0, 20.0, 10.0])
    pairs = torch.tensor([0, 0, 1, 1])
    assert spearman(rewards, tokens).value == pytest.approx(0.6)  # long questions have high rewards
    assert (
        spearman(centre_by_question(rewards, pairs), centre_by_question(tokens, pairs)).value < -0.8
    )  # but of two answers the shorter has the higher
