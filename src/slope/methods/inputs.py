"""Pruned activations: X is n:m along d_in, the weight stays dense.

    Y = X̃ Wᵀ,  ∇X = (∇Y W)·mask,  ∇W = ∇Yᵀ X̃ᵀ

X̃ is X pruned; with ``reduction_dim`` ∇W reads it pruned once more along the tokens, the dimension
that this product sums over (SLoPe's comparison of what to prune, arXiv:2405.16325, appendix).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slope.masks import top_n
from slope.methods.base import Method, Products, token_keep_mask

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


class DynamicInput(Method):
    """The n largest of every m features, chosen for each token of each batch.

    Args:
        reduction_dim: ∇W reads the pruned X pruned again, n of every m consecutive tokens by
            magnitude. Tokens are those of the flattened batch; up to m - 1 last ones that fill no
            group stay as they are.
    """

    name = "dynamic-input"

    def __init__(self, reduction_dim: bool = True) -> None:
        self.reduction_dim = reduction_dim

    def features(self, layer: PrunedLinear, x: Tensor) -> Tensor:
        """keep_mask of X: (T, I), or (I,) for all tokens."""
        return top_n(x.abs(), layer.pattern, dim=1)

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """X pruned in the forward, and for ∇W perhaps again; ∇X only where X was kept."""
        keep_mask = self.features(layer, x)
        pruned = x * keep_mask
        again = pruned
        if self.reduction_dim:
            again = x * token_keep_mask(x, layer.pattern, keep_mask.expand_as(x))
        return Products(pruned, weight, weight, again, x_keep_mask=keep_mask)


class StaticInput(DynamicInput):
    """One feature mask per layer, n of every m, fixed at the first training batch.

    Features are ranked by their L2 norms over the tokens of that batch (of every rank, if
    torch.distributed runs), so all ranks choose alike. Before it, in an evaluation, nothing is
    pruned. Buffers: ``feature_keep_mask`` (I,) bool, all True until chosen, and ``chosen`` () bool.
    """

    name = "static-input"

    def setup(self, layer: PrunedLinear) -> None:
        """Register the mask, all True, and that it is to be chosen."""
        device = layer.weight.device
        everything = torch.ones(layer.in_features, dtype=torch.bool, device=device)
        layer.register_buffer("feature_keep_mask", everything)
        layer.register_buffer("chosen", torch.zeros((), dtype=torch.bool, device=device))

    def features(self, layer: PrunedLinear, x: Tensor) -> Tensor:
        """The layer's one mask (I,), chosen first if this is the first training batch."""
        mask, chosen = layer.get_buffer("feature_keep_mask"), layer.get_buffer("chosen")
        if layer.training and len(x) and not bool(chosen):
            squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(squares)
            mask.copy_(top_n(squares, layer.pattern, dim=0))
            chosen.fill_(True)
        return mask
