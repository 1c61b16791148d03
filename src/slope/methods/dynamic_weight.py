"""SR-STE: a dense weight, pruned anew in each forward, with a straight-through gradient.

    Y = X W^Rᵀ,  ∇X = ∇Y W^R or ∇Y W^{R,C},  ∇W = ∇Yᵀ X (every weight learns)

Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (arXiv:2102.04010), whose
decay λ adds λ·W to the gradient of the pruned weights (equation 9). Extended SR-STE, with which
SLoPe compares itself (arXiv:2405.16325, section 3), prunes all layers and uses W^{R,C} in ∇X.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from slope.masks import column_keep_mask, top_n
from slope.methods.base import Method, Products, decay_pruned

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


class DynamicWeight(Method):
    """SR-STE, or Extended SR-STE with the double-pruned backward.

    Args:
        prune_backward: the input gradient uses W^{R,C} instead of W^R.
        srste_decay: λ; 0 is the plain straight-through estimator.
    """

    name = "dynamic-weight"
    row_pruned = True

    def __init__(self, prune_backward: bool = True, srste_decay: float = 0.0) -> None:
        self.prune_backward = prune_backward
        self.srste_decay = srste_decay

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """W^R in the forward, W^{R,C} or W^R for ∇X; no mask for ∇W: straight-through."""
        row, column = self.masks(layer)
        w_r = weight * row
        return Products(x, w_r, weight * column if self.prune_backward else w_r, x)

    def adjust_gradient(self, layer: PrunedLinear) -> None:
        """Add λ·W to the gradient of the weights that W^R leaves out now."""
        if self.srste_decay and not layer.dense:
            decay_pruned(layer, self.row_mask(layer), self.srste_decay)

    def row_mask(self, layer: PrunedLinear) -> Tensor:
        """Mask of W^R, by the magnitudes of the present weight in its own precision."""
        return top_n(layer.weight.detach().abs(), layer.pattern, dim=1)

    def masks(self, layer: PrunedLinear) -> tuple[Tensor, Tensor]:
        """Masks of W^R, and of what the input gradient reads."""
        row = self.row_mask(layer)
        if not self.prune_backward:
            return row, row
        return row, column_keep_mask(layer.weight.detach(), row, layer.pattern)
