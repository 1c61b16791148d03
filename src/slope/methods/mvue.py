"""Unbiased n:m pruning: who is kept is drawn, and who is kept grows so that the mean is exact.

    p = inclusion probabilities, Σp = n in each group;  estimate = x / p where kept, else 0

Of all such estimators the one with p proportional to |x|, clipped at 1, has the least variance
(minimum-variance unbiased estimator, Chmiel et al., arXiv:2203.10991, section 4, for 1:2; the same
by Lagrange's rule for n:m). Exactly n entries are drawn with these probabilities by systematic
sampling, one uniform number per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope.pattern import NMPattern


def inclusion_probabilities(groups: Tensor, n: int) -> Tensor:
    """Probability of each entry to be kept.

    Args:
        groups: (..., m), any float dtype.
        n: entries kept of each group.

    Returns:
        (..., m) in [0, 1], summing to n where at least n entries are not zero; proportional to the
        magnitude but for those at 1; zero for zeros.
    """
    magnitude = groups.abs()
    certain = torch.zeros_like(magnitude, dtype=torch.bool)
    scaled = torch.zeros_like(magnitude)
    # Each round makes at least one more certain, or none and is done.
    for _ in range(n + 1):
        rest = torch.where(certain, 0.0, magnitude)
        left = n - certain.sum(-1, keepdim=True)
        total = rest.sum(-1, keepdim=True)
        factor = torch.where(total > 0, left / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
        scaled = rest * factor
        certain = certain | (scaled >= 1)
    return torch.where(certain, 1.0, scaled)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Systematic sampling: entries laid end to end, those at u, u + 1, u + 2, … are drawn.

    Args:
        probabilities: (..., m) in [0, 1].
        uniform: (..., 1) in [0, 1), one number per group.

    Returns:
        (..., m) bool; each entry True with its probability.
    """
    certain = probabilities >= 1
    open_ = torch.where(certain, 0.0, probabilities)
    end = open_.cumsum(-1)
    begin = torch.cat((torch.zeros_like(end[..., :1]), end[..., :-1]), -1)
    # How many of u, u + 1, … lie below a point.
    drawn = (end - uniform).ceil() - (begin - uniform).ceil() > 0
    return certain | (drawn & (open_ > 0))


def mvue_prune(x: Tensor, pattern: NMPattern, dim: int) -> Tensor:
    """Prune to n:m along ``dim`` so that the expectation is ``x``.

    Args:
        x: any shape and float dtype; groups are m consecutive entries along ``dim``.
        pattern: N:M pattern.
        dim: the dimension; a ragged tail that fills no group of m stays as it is.

    Returns:
        Shape and dtype of ``x``, at most n entries of each group not zero. Draws from torch's
        default generator of the device, so a run's saved generator state repeats it.
    """
    dim %= x.ndim
    size = x.shape[dim]
    whole = size // pattern.m * pattern.m
    head, tail = x.narrow(dim, 0, whole), x.narrow(dim, whole, size - whole)
    groups = head.unflatten(dim, (-1, pattern.m)).movedim(dim + 1, -1)
    groups = groups.to(torch.promote_types(x.dtype, torch.float32))
    p = inclusion_probabilities(groups, pattern.n)
    kept = draw(p, torch.rand(*groups.shape[:-1], 1, dtype=groups.dtype, device=x.device))
    estimate = torch.where(kept, groups / torch.where(kept, p, 1.0), 0.0).to(x.dtype)
    return torch.cat((estimate.movedim(-1, dim + 1).flatten(dim, dim + 1), tail), dim)
