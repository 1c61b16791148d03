"""The n:m selection of :func:`slope.masks.top_n` on a GPU, in one pass over the scores.

A score's rank is the number of scores of its group that beat it, counted by comparing all with all
in registers: exact, and the same on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COMPARISONS = 8192  # of a program


@triton.jit
def select_kernel(
    scores, keep, groups, inner, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK groups; entry j of group g stands at ``(g // inner * M + j) * inner + g % inner``."""
    g = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, M)
    at = (g // inner * M)[:, None] * inner + j[None, :] * inner + (g % inner)[:, None]
    inside = (g < groups)[:, None]
    score = tl.load(scores + at, mask=inside, other=0.0)
    mine, other = score[:, :, None], score[:, None, :]
    # Compared as the reference does, so that NaN, which compares as equal, gives the same mask too.
    before = j[None, None, :] < j[None, :, None]
    beaten = (before & ~(mine > other)) | (~before & (other > mine))
    rank = tl.sum(beaten.to(tl.int32), axis=2)
    tl.store(keep + at, (rank < N).to(tl.int8), mask=inside)


def select(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """True for the n highest of each m along ``dim``; of equals the first.

    Args:
        scores: (O, I) on a GPU, float; m divides the dimension and is a power of two.
        n: kept of each group.
        m: group size.
        dim: 0 or 1.

    Returns:
        (O, I) bool. Moves the scores and the result once.
    """
    scores = scores.contiguous()
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    inner = scores.shape[1] if dim == 0 else 1
    groups = scores.numel() // m
    block = max(1, _COMPARISONS // (m * m))
    if groups:
        grid = (-(-groups // block),)
        with torch.cuda.device_of(scores):  # Triton launches on the current device
            select_kernel[grid](scores, keep.view(torch.int8), groups, inner, n, m, block)
    return keep
