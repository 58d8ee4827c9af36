"""Test GAE and whitening against numbers computed by hand, a whole padded PPO step, and invariants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.rlhf.algorithms.advantages import gae, group_relative, leave_one_out, whiten
from tasks.rlhf.algorithms.losses import ppo_policy_loss, ppo_value_loss
from tasks.rlhf.algorithms.rewards import token_rewards

# A padded batch of two answers, worked out by hand; what stands outside the mask is meant to mislead.
MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
SCORES = torch.tensor([1.5, -0.5])
OLD = torch.tensor([[-9, -1, -2, -0.5, -1.5, -9], [-9, -9, -0.3, -0.7, -1.1, -2]])
REF = torch.tensor([[-9, -1.1, -1.9, -0.7, -1.2, -9], [-9, -9, -0.4, -0.7, -1, -2.5]])
NEW = OLD + torch.tensor([[0, 0.1, -0.3, 0.25, 0, 0], [0, 0, 0.05, -0.1, 0.3, -0.05]])
VALUES = torch.tensor([[9, 0.1, 0.2, 0.4, 0.7, 9], [9, 9, -0.1, 0, 0.1, 0.2]])
NEW_VALUES = VALUES + torch.tensor([[0, 0.3, -0.1, 0.05, -0.4, 0], [0, 0, 0.1, 0.25, -0.3, 0]])
REWARDS = [[0, -0.02, 0.02, -0.04, 1.56, 0], [0, 0, -0.02, 0, 0.02, -0.6]]
ADVANTAGES = [[0, 1.260992, 1.243150, 1.077, 0.86, 0], [0, 0, -0.4026, -0.508, -0.64, -0.8]]
RETURNS = [[0, 1.360992, 1.443150, 1.477, 1.56, 0], [0, 0, -0.5026, -0.508, -0.54, -0.6]]
WHITENED = [
    [0, 1.083525, 1.064186, 0.884100, 0.648898, 0],
    [0, 0, -0.719606, -0.833846, -0.976918, -1.150339],
]


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=2e-6, rtol=0)


def with_filler(values: Tensor, filler: float) -> Tensor:
    return torch.where(MASK, values, filler)


@pytest.mark.parametrize("filler", [None, 0.0, 1e5, -1e5])
def test_one_step_on_a_padded_batch(filler: float | None) -> None:
    old, ref, new, values, new_values = (
        x if filler is None else with_filler(x, filler) for x in (OLD, REF, NEW, VALUES, NEW_VALUES)
    )

    rewards = token_rewards(SCORES, old, ref, MASK, kl_coefficient=0.2)
    advantages, returns = gae(rewards, values, MASK, discount=1.0, gae_lambda=0.95)
    whitened = whiten(advantages, MASK)
    close(rewards, REWARDS)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)
    close(whitened, WHITENED)

    policy = ppo_policy_loss(new, old, whitened, MASK, clip_range=0.2)
    value = ppo_value_loss(new_values, values, returns, MASK, clip_range=0.2)
    assert policy.loss.item() == pytest.approx(0.028533, abs=1e-6)
    assert 0.1 * value.loss.item() == pytest.approx(0.045205, abs=1e-6)
    assert policy.clip_fraction.item() == 0.125
    assert value.clip_fraction.item() == 0.25
    assert policy.approx_kl.item() == pytest.approx(0.016719, abs=1e-6)


def test_a_single_answer() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    advantages, returns = gae(
        torch.tensor([[-0.02, 0.01, -0.03, 1.5]]),
        torch.tensor([[0.1, 0.2, 0.4, 0.7]]),
        mask,
        discount=1.0,
        gae_lambda=0.95,
    )
    close(advantages, [[1.209075, 1.1885, 1.03, 0.8]])
    close(returns, [[1.309075, 1.3885, 1.43, 1.5]])
    close(whiten(advantages, mask), [[0.805064, 0.696219, -0.142272, -1.35901]])  # unbiased


answers = st.integers(1, 6).flatmap(
    lambda n: st.tuples(*(st.lists(st.floats(-2, 2), min_size=n, max_size=n) for _ in range(2)))
)


@settings(deadline=None)
@given(answers, st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_advantage_is_the_discounted_sum_of_the_residuals(
    answer: tuple[list[float], list[float]], discount: float, gae_lambda: float
) -> None:
    rewards, values = answer
    advantages, returns = gae(
        torch.tensor([rewards]),
        torch.tensor([values]),
        torch.ones(1, len(rewards), dtype=torch.bool),
        discount=discount,
        gae_lambda=gae_lambda,
    )
    residuals = [
        r + discount * after - now for r, now, after in zip(rewards, values, [*values[1:], 0.0], strict=True)
    ]
    expected = [
        sum((discount * gae_lambda) ** (k - t) * residuals[k] for k in range(t, len(residuals)))
        for t in range(len(residuals))
    ]
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert returns[0].tolist() == pytest.approx(
        [a + v for a, v in zip(expected, values, strict=True)], abs=1e-4
    )


def test_lambda_one_gives_the_sum_of_the_rewards_to_come() -> None:
    _, returns = gae(torch.tensor(REWARDS), VALUES, MASK, discount=1.0, gae_lambda=1.0)
    close(returns, [[0, 1.52, 1.54, 1.52, 1.56, 0], [0, 0, -0.6, -0.58, -0.58, -0.6]])


def test_a_row_is_not_moved_by_its_company() -> None:
    together = gae(torch.tensor(REWARDS), VALUES, MASK, discount=1.0, gae_lambda=0.95)
    for row in range(2):
        alone = gae(
            torch.tensor(REWARDS)[row : row + 1],
            VALUES[row : row + 1],
            MASK[row : row + 1],
            discount=1.0,
            gae_lambda=0.95,
        )
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


@settings(deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=3, max_size=20).filter(lambda v: max(v) - min(v) > 0.1),
    st.floats(-1e3, 1e3),
)
def test_whitened_values_have_mean_zero_and_deviation_one(values: list[float], filler: float) -> None:
    mask = torch.tensor([[True] * len(values) + [False] * 3])
    white = whiten(torch.tensor([[*values, filler, filler, filler]]), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-4)
    assert white[mask].std(unbiased=True).item() == pytest.approx(1, abs=1e-4)
    assert not white[~mask].any()


def test_whitening_is_over_the_whole_batch_and_not_per_row() -> None:
    white = whiten(torch.tensor(ADVANTAGES), MASK)
    assert (white[0][MASK[0]] > 0.6).all()  # per row the good answer's last tokens would come out at -1.34
    assert (white[1][MASK[1]] < -0.7).all()


# ------------------------------------------------------------------------------------ without a critic

GROUP = torch.tensor([[1.0, 0.0, 0.5, -0.5]])


def test_an_answer_is_compared_with_the_others_of_its_prompt() -> None:
    """Numbers worked out by hand; of the second prompt all answers are as good as each other."""
    rewards = torch.cat([GROUP, torch.full((1, 4), 7.0)])
    close(leave_one_out(rewards), [[1, -0.333333, 0.333333, -1], [0, 0, 0, 0]])
    close(group_relative(rewards, scale=False), [[0.75, -0.25, 0.25, -0.75], [0, 0, 0, 0]])
    scaled = [[1.161893, -0.387298, 0.387298, -1.161893], [0, 0, 0, 0]]
    close(group_relative(rewards, scale=True), scaled)


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**31), st.floats(-100, 100))
@settings(max_examples=100, deadline=None)
def test_what_all_answers_to_a_prompt_have_in_common_changes_nothing(
    prompts: int, count: int, seed: int, added: float
) -> None:
    rewards = torch.randn(prompts, count, generator=torch.Generator().manual_seed(seed)).double()
    shift = torch.linspace(-1, 1, prompts)[:, None] * added
    for compare in (
        leave_one_out,
        lambda found: group_relative(found, scale=False),
        lambda found: group_relative(found, scale=True),
    ):
        found = compare(rewards)
        torch.testing.assert_close(compare(rewards + shift), found, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.sum(dim=1), torch.zeros(prompts).double(), atol=1e-9, rtol=0)
    expected = [
        [row[i] - sum(row[:i] + row[i + 1 :]) / (count - 1) for i in range(count)] for row in rewards.tolist()
    ]
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor(expected).double())


def test_one_answer_is_no_group() -> None:
    for compare in (leave_one_out, lambda found: group_relative(found, scale=False)):
        with pytest.raises(AssertionError, match="two answers or more"):
            compare(torch.ones(3, 1))
