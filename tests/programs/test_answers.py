"""Test the random numbers that a policy's answers are drawn by."""

import torch

from tasks.programs.answers import uniform_numbers


def test_draws_depend_on_the_policys_name_and_the_question_alone() -> None:
    ids = [7, 3, 2**40, -5]
    ppo = uniform_numbers(0, "ppo", ids, 6)
    assert ppo.shape == (4, 6)
    assert ppo.dtype == torch.float64
    assert torch.equal(uniform_numbers(0, "ppo", ids[::-1], 6), ppo.flip(0))
    assert torch.equal(uniform_numbers(0, "ppo", ids[1:2], 6), ppo[1:2])
    others = [
        uniform_numbers(0, "dpo", ids, 6),
        uniform_numbers(1, "ppo", ids, 6),
        uniform_numbers(0, "sft", ids, 6),
    ]
    numbers = torch.cat([ppo, *others])
    assert numbers.unique().numel() == numbers.numel()
