"""A linear layer with a dense weight under a pruning method: what SLoPe is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slope.linear import AdaptedLinear, check_divides, dense_weight, trained_bias
from slope.methods.base import Method, pruned_linear
from slope.pattern import NMPattern


class PrunedLinear(AdaptedLinear):
    """Linear layer whose products are pruned by a method, over a dense weight.

    The parameter is the whole weight, and the products are dense ones with zeros: it costs what a
    dense layer costs, and more. Who multiplies by ``layer.weight`` instead of calling the layer
    gets the unpruned weight; :meth:`to_dense` is the forward's.

    Args:
        linear: ``nn.Linear`` or transformers' ``Conv1D``; its weight is copied, its bias shared. On
            the meta device only shapes are converted.
        method: who is pruned, and when.
        pattern: N:M pattern.
        keep_mask: (O, I) bool for a method with a static weight mask; None lets the method choose.

    Attributes:
        weight: parameter (O, I), dense.
        method: the :class:`Method`.
        dense: while True the method rests and the layer is an ordinary linear layer (the dense
            last phase of FST). Not saved: a schedule sets it.

    Raises:
        ValueError: if the pattern does not divide the layer, or its bias is no parameter.
    """

    weight: nn.Parameter
    keep_mask: Tensor
    scale: Tensor

    def __init__(
        self,
        linear: nn.Module,
        method: Method,
        pattern: NMPattern | str = "2:4",
        keep_mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        weight = dense_weight(linear)
        self.out_features, self.in_features = weight.shape
        self.pattern = NMPattern.parse(pattern)
        self.method = method
        self.origin = type(linear).__name__
        if method.grouped:
            check_divides(self.in_features, self.out_features, self.pattern)
        trained = next(linear.parameters()).requires_grad
        self.weight = nn.Parameter(
            weight.clone(memory_format=torch.contiguous_format), requires_grad=trained
        )
        self.bias = trained_bias(linear)
        self.adapter = None
        self.dense = False
        self.train(linear.training)
        if keep_mask is not None:
            self.register_buffer("keep_mask", keep_mask.to(weight.device))
        with torch.no_grad():
            method.setup(self)

    def stored(self) -> nn.Parameter:
        """The dense weight."""
        return self.weight

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The forward's weight as a detached (O, I) tensor with zeros; the adapter is not in it."""
        weight = self.weight.detach()
        if not self.dense:
            weight = self.method.products(self, weight.new_empty(0, self.in_features), weight).w
        return weight.clone()

    @torch.no_grad()
    def masks(self) -> tuple[Tensor, Tensor]:
        """keep_masks (O, I) of the forward's and the input gradient's weight, as they are now."""
        return (Method() if self.dense else self.method).masks(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O); under autocast in its dtype, else x and the weight share theirs."""
        x = self._in_call_dtype(x, self.weight.dtype, "weights")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dense:
            y = nn.functional.linear(x, self.weight.to(x.dtype), bias)
        else:
            y = pruned_linear(x, self.weight, bias, self)
        return self._with_adapter(x, y)

    def extra_repr(self) -> str:
        """Shape, pattern and method, for ``print(model)``."""
        return f"{super().extra_repr()}, method={self.method.name}"
