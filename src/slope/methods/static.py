"""A static weight mask over a dense weight: n:m along d_out, or unstructured.

    Y = X W₁ᵀ + b,  ∇X = ∇Y W₂,  ∇W = (∇Yᵀ X)·mask,  W₁ = W·mask,  W₂ = W₁ or W₁ pruned again

The mask is chosen once: by the magnitudes of the layer's weight, or by :func:`slope.sparsify`. What
it prunes is set to zero and stays there. n:m along d_in, compressed, is SLoPe itself
(:class:`slope.SlopeLinear`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slope.masks import top_n
from slope.methods.base import Method, Products

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


class StaticWeight(Method):
    """The forward's weight n:m along d_out, fixed; the input gradient's again along d_in.

    The other way round than SLoPe: ``static-weight`` with ``reduction_dim=False`` of the published
    program. No sparse tensor core serves it, since neither product sums along its groups.

    Args:
        prune_backward: prune the kept weights again in each backward, n:m along d_in by magnitude;
            False: the input gradient uses the forward's weight.
    """

    name = "static-weight"

    def __init__(self, prune_backward: bool = True) -> None:
        self.prune_backward = prune_backward

    @property
    def note(self) -> str:
        """The method and its dimension."""
        return f"{self.name} along d_out"

    def setup(self, layer: PrunedLinear) -> None:
        """Choose ``keep_mask`` (O, I) bool, if it was not given, and set the rest to zero."""
        if "keep_mask" not in dict(layer.named_buffers(recurse=False)):
            layer.register_buffer("keep_mask", self.choose(layer))
        layer.weight.mul_(layer.keep_mask)

    def choose(self, layer: PrunedLinear) -> Tensor:
        """The n largest magnitudes of every m along d_out."""
        return top_n(layer.weight.abs(), layer.pattern, dim=0)

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """The masks are applied in each call: a weight that was loaded may hold anything there."""
        forward, backward = self.masks(layer)
        return Products(x, weight * forward, weight * backward, x, w_keep_mask=forward)

    def masks(self, layer: PrunedLinear) -> tuple[Tensor, Tensor]:
        """The static mask, and the part of it that the input gradient reads."""
        keep_mask = layer.keep_mask
        if not self.prune_backward:
            return keep_mask, keep_mask
        # A kept weight that happens to be 0.0 outranks every pruned one.
        scores = torch.where(keep_mask, layer.weight.detach().abs(), -1.0)
        return keep_mask, top_n(scores, layer.pattern, dim=1) & keep_mask


class UnstructuredWeight(StaticWeight):
    """The largest magnitudes of the whole matrix, fixed; the input gradient uses the same weight.

    Args:
        sparsity: percent of zeros, above 0 and below 100.
    """

    grouped = False
    sparsity: float

    def __init__(self, sparsity: float) -> None:
        super().__init__(prune_backward=False)
        self.sparsity = sparsity

    @property
    def note(self) -> str:
        """The method and that it has no pattern."""
        return f"{self.name}, unstructured"

    def choose(self, layer: PrunedLinear) -> Tensor:
        """The largest magnitudes of the matrix; of equals the first wins."""
        magnitudes = layer.weight.abs().flatten()
        # Multiplied first: (1 - 90/100) * 10 is 0.9999999999999998, and would keep none of ten.
        kept = int((100 - self.sparsity) * magnitudes.numel() / 100)
        order = magnitudes.sort(descending=True, stable=True).indices
        keep_mask = torch.zeros_like(magnitudes, dtype=torch.bool)
        keep_mask[order[:kept]] = True
        return keep_mask.view_as(layer.weight)
