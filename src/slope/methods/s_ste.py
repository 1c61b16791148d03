"""S-STE: pruning as a continuous function, so that no weight jumps when the order changes.

    S(w) = sign(w) · max(|w| − t, 0),  t = the (n+1)-th largest magnitude of the group
    Y = X (β S(W))ᵀ,  ∇X = ∇Y (β S(W)),  ∇W = ∇Yᵀ X (straight through)

S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training (arXiv:2409.09099). The
scale β is the least-squares one of the initial weight, ⟨W, S(W)⟩ / ‖S(W)‖², computed once and
frozen (section 4.2 of the paper). Its FP8 products and its pruning of ∇Y are not part of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slope.methods.base import Method, Products
from slope.pattern import NMPattern

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


def soft_threshold(weight: Tensor, pattern: NMPattern) -> Tensor:
    """S(W), groups of m along the last dimension.

    Args:
        weight: (..., I), I divisible by m.
        pattern: N:M pattern.

    Returns:
        Shape and dtype of ``weight``; at most n entries of each group are not zero.
    """
    groups = weight.unflatten(-1, (-1, pattern.m))
    magnitude = groups.abs()
    # kthvalue counts from the smallest: of m the (n+1)-th largest is the (m-n)-th smallest.
    threshold = magnitude.kthvalue(pattern.m - pattern.n, dim=-1, keepdim=True).values
    return ((magnitude - threshold).clamp_min(0) * groups.sign()).flatten(-2)


class SoftThreshold(Method):
    """S-STE with its frozen scale, a buffer ``scale`` of the layer."""

    name = "s-ste"
    row_pruned = True

    def setup(self, layer: PrunedLinear) -> None:
        """Freeze β."""
        weight = layer.weight.detach()
        soft = soft_threshold(weight, layer.pattern)
        norm = (soft * soft).sum()
        # A weight of equal magnitudes has nothing above its threshold, and no scale helps.
        scale = torch.where(norm > 0, (weight * soft).sum() / norm, torch.ones_like(norm))
        layer.register_buffer("scale", scale)

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """β S(W) in both products; thresholds in the weight's own precision."""
        soft = soft_threshold(layer.weight.detach(), layer.pattern) * layer.scale
        pruned = soft.to(weight.dtype)
        return Products(x, pruned, pruned, x)

    def masks(self, layer: PrunedLinear) -> tuple[Tensor, Tensor]:
        """Where S(W) is not zero, twice."""
        keep_mask = soft_threshold(layer.weight.detach(), layer.pattern) != 0
        return keep_mask, keep_mask
