"""Seeds of random numbers as functions of (seed, step, rank), so that a resumed run needs no generator state."""

import torch


def seed_step(seed: int, step: int, *, rank: int = 0) -> None:
    """Seed torch for one step: random numbers depend on (seed, step, rank) alone, so a resumed run draws what an uninterrupted one does."""
    torch.manual_seed(mix(seed, step, rank) if rank else mix(seed, step))


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers (SplitMix64, folded), so that neighbouring steps and streams share nothing."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
