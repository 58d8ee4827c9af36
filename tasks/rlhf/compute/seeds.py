"""Compute seeds from (seed, step, rank), so that a resumed run needs no generator state."""

import torch


def seed_step(seed: int, step: int, *, rank: int = 0) -> None:
    """Seed torch for one step. A resumed run draws the same numbers as an uninterrupted one."""
    torch.manual_seed(mix(seed, step, rank) if rank else mix(seed, step))


def mix(*numbers: int) -> int:
    """Return one 63-bit seed from several numbers (SplitMix64, folded); neighbours get unrelated seeds."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
