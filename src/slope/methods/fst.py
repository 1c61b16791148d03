"""FST: transposable masks, masked decay, an unbiased weight gradient, a dense end.

    Y = X (W·M)ᵀ,  ∇X = ∇Y (W·M),  ∇W = MVUE(∇Y)ᵀ X + λ·W·(1 − M)

M is n:m along both dimensions, so one mask serves forward and backward without a second pruning.
Accelerating Transformer Pre-training with 2:4 Sparsity (arXiv:2404.01847); the masks are those of
Hubara et al. (arXiv:2102.08124), the estimator that of Chmiel et al. (arXiv:2203.10991). The dense
last phase is the schedule's (``SlopeSchedule(dense_start=...)``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slope.masks import transposable_keep_mask
from slope.methods.base import Method, Products, decay_pruned
from slope.methods.mvue import mvue_prune

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


class FST(Method):
    """Fully sparse training with transposable masks.

    Args:
        srste_decay: λ of the masked decay, in the gradient (section 4.2 of the paper).
        mvue: prune ∇Y along the tokens for the weight gradient.
        interval: optimizer steps between searches for a new mask (the paper: 40).
    """

    name = "fst"
    row_pruned = True

    def __init__(self, srste_decay: float = 0.0, mvue: bool = True, interval: int = 40) -> None:
        self.srste_decay = srste_decay
        self.mvue = mvue
        self.interval = interval

    def setup(self, layer: PrunedLinear) -> None:
        """Choose ``keep_mask`` (O, I) bool from the weight."""
        layer.register_buffer("keep_mask", self._search(layer))

    def _search(self, layer: PrunedLinear) -> Tensor:
        if layer.weight.device.type == "meta":
            return torch.ones_like(layer.weight, dtype=torch.bool)
        return transposable_keep_mask(layer.weight, layer.pattern)

    def begin_step(self, layer: PrunedLinear, step: int) -> None:
        """Search the mask anew every ``interval`` steps."""
        if step > 0 and step % self.interval == 0 and not layer.dense:
            layer.keep_mask.copy_(self._search(layer))

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """One masked weight for both products; every weight gets a gradient."""
        masked = weight * layer.keep_mask
        return Products(x, masked, masked, x)

    def output_gradients(self, layer: PrunedLinear, dy: Tensor) -> tuple[Tensor, Tensor]:
        """∇Y as it is for ∇X, unbiased n:m along the tokens for ∇W."""
        return dy, mvue_prune(dy, layer.pattern, dim=0) if self.mvue else dy

    def adjust_gradient(self, layer: PrunedLinear) -> None:
        """Add λ·W to the gradient of the masked weights; not in the dense phase."""
        if not layer.dense:
            decay_pruned(layer, layer.keep_mask, self.srste_decay)

    def masks(self, layer: PrunedLinear) -> tuple[Tensor, Tensor]:
        """The transposable mask, twice."""
        return layer.keep_mask, layer.keep_mask
