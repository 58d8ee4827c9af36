"""Weigh tokens that another distribution than the policy's was the sampler of.

An engine, or rounding in half precision, gives a token another probability than the policy that is trained.
Truncated importance weights correct the gradient for it, with a bounded variance (Ionides 2008; Yao et al.
2025 for engines).
"""

import torch
from torch import Tensor


def importance_weights(logp: Tensor, sampler_logp: Tensor, mask: Tensor, *, most: float) -> Tensor:
    """Return min(policy's probability / sampler's, ``most``) of each token, and 1 outside the mask, (B, T).

    logp and sampler_logp (B, T) are in nats, of the same tokens under the policy before its update and under
    the sampler.
    """
    ratio = torch.exp(logp - sampler_logp).clamp(max=most)
    return torch.where(mask, ratio, 1.0)
