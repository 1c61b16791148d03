"""Pruned output gradients: ∇Y is n:m in the backward, the forward stays dense.

    Y = X Wᵀ,  ∇X = G₁ W,  ∇W = G₂ᵀ X

G₁ is ∇Y pruned along d_out and G₂ along the tokens, each the dimension that its product sums over.
The paper reports that it diverges (arXiv:2405.16325, appendix). ∇bias sums the unpruned ∇Y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from slope.masks import top_n
from slope.methods.base import Method, Products, token_keep_mask

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


class DynamicOutputGrad(Method):
    """The n largest magnitudes of every m of ∇Y, chosen in each backward.

    Args:
        reduction_dim: ∇W reads ∇Y pruned along the tokens of the flattened batch (up to m - 1 last
            ones that fill no group stay as they are); False: both products read ∇Y pruned along
            d_out.
    """

    name = "dynamic-output-grad"

    def __init__(self, reduction_dim: bool = True) -> None:
        self.reduction_dim = reduction_dim

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """Everything dense: the pruning is in :meth:`output_gradients`."""
        return Products(x, weight, weight, x)

    def output_gradients(self, layer: PrunedLinear, dy: Tensor) -> tuple[Tensor, Tensor]:
        """∇Y pruned along d_out, and along the tokens or once more that one."""
        along_out = dy * top_n(dy.abs(), layer.pattern, dim=1)
        if not self.reduction_dim:
            return along_out, along_out
        return along_out, dy * token_keep_mask(dy, layer.pattern)
