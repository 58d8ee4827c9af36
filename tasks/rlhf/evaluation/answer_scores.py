"""Score answers with a reward model, in batches of similar length."""

from collections.abc import Callable

import torch
from torch import Tensor

from tasks.rlhf.batches import sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import distributed

Answer = tuple[list[int], list[int]]  # prompt and answer ids


@torch.no_grad()
def score_answers(
    score: Callable[[Sequences], Tensor],
    answers: list[Answer],
    *,
    pad_id: int,
    device: torch.device,
    batch_size: int,
    report_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the ``score`` of each answer, (N,) float32 on the CPU, in the order of ``answers``; ranks share
    the batches.
    """

    def score_part(part: list[Answer]) -> Tensor:
        prompts, replies = map(list, zip(*part, strict=True))
        return score(sequences.join(prompts, replies, pad_id=pad_id, device=device)).cpu()

    order = sorted(range(len(answers)), key=lambda place: sum(map(len, answers[place])))  # little padding
    by_length = [answers[place] for place in order]
    parts = [by_length[first : first + batch_size] for first in range(0, len(order), batch_size)]
    scores = torch.cat(distributed.map_over_ranks(parts, score_part, report_progress=report_progress))
    return scores[torch.tensor(order).argsort()]
