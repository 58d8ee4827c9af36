"""Token rewards, KL estimators and the KL controller against numbers computed by hand."""

import pytest
import torch

from tasks.rlhf.algorithms.rewards import adapt_kl_coefficient, k1, k2, k3, last_position, token_rewards


def test_estimators_of_the_kl() -> None:
    d = torch.tensor([0.1, -0.1, 1, -1, 3, -3])
    torch.testing.assert_close(k1(d), torch.tensor([0.1, -0.1, 1, -1, 3, -3]))
    torch.testing.assert_close(k2(d), torch.tensor([0.005, 0.005, 0.5, 0.5, 4.5, 4.5]))
    torch.testing.assert_close(
        k3(d),
        torch.tensor([0.004837, 0.005171, 0.367879, 0.718282, 2.049787, 16.085537]),
        atol=1e-6,
        rtol=1e-6,
    )


def test_estimators_agree_on_the_kl_of_two_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    kl = (p * (p / q).log()).sum()
    d = (p / q).log()
    torch.testing.assert_close((p * k1(d)).sum(), kl)
    torch.testing.assert_close((p * k3(d)).sum(), kl)
    assert (k3(d) >= 0).all()


def test_only_k2_has_the_gradient_of_the_kl_as_a_loss() -> None:
    logits, reference = (
        torch.tensor([0.3, -0.2, 0.9], requires_grad=True),
        torch.log_softmax(torch.tensor([0.0, 0.5, 0.1]), 0),
    )
    logp = torch.log_softmax(logits, 0)
    p = logp.exp()
    (exact,) = torch.autograd.grad((p * (logp - reference)).sum(), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad((p.detach() * k2(logp - reference)).sum(), logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad((p.detach() * k1(logp - reference)).sum(), logits)
    torch.testing.assert_close(of_k2, exact)
    torch.testing.assert_close(of_k1, torch.zeros(3))


def test_adaptive_coefficient_one_observation_after_another() -> None:
    coefficient = 0.2
    for kl, expected in ((3, 0.198976), (6, 0.198976), (9, 0.19999476), (30, 0.20101873), (0, 0.19998951)):
        coefficient = adapt_kl_coefficient(coefficient, kl, target=6, horizon=10_000, num_rollouts=256)
        assert coefficient == pytest.approx(expected, abs=1e-8)


def test_score_stands_at_the_last_response_token() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    rewards = token_rewards(
        torch.tensor([1.5, -0.5, 7.0]), torch.zeros(3, 4), torch.zeros(3, 4), mask, kl_coefficient=0.2
    )
    assert rewards.tolist() == [[0, 0, 1.5, 0], [0, 0, 0, -0.5], [0, 7.0, 0, 0]]


def test_penalty_is_beta_times_the_log_ratio_inside_the_response_only() -> None:
    logp, ref = torch.tensor([[5.0, -1.0, -2.0]]), torch.tensor([[-5.0, -1.5, -1.0]])
    rewards = token_rewards(
        torch.zeros(1), logp, ref, torch.tensor([[False, True, True]]), kl_coefficient=0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.05, 0.1]]))


def test_inputs_stay_as_they_were() -> None:
    scores, logp, ref = torch.tensor([1.0]), torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -3.0]])
    token_rewards(scores, logp, ref, torch.tensor([[True, True]]), kl_coefficient=1.0)
    assert (scores.tolist(), logp.tolist(), ref.tolist()) == ([1.0], [[-1.0, -2.0]], [[-1.0, -3.0]])


def test_last_position() -> None:
    assert last_position(torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]]).bool()).tolist() == [1, 2, 0]
