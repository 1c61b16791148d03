"""The seam of the pruning methods: one autograd function, and a method that picks its operands.

Every method that keeps a dense weight is a choice of the operands of the same three products:

    Y  = A Bᵀ + b           A: X or X pruned        B: W, W^R, …
    ∇X = G₁ C (· keep_x)    G₁: ∇Y or ∇Y pruned     C: W, W^R, W^{R,C}, …
    ∇W = G₂ᵀ D (· keep_w)   G₂: ∇Y or ∇Y pruned     D: X or X pruned

SLoPe itself does not pass through here: its weights are stored compressed (`slope.functional`).
These methods simulate: dense products, any device, no gain in speed. T tokens, I d_in, O d_out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope.masks import column_keep_mask
from slope.pattern import NMPattern

if TYPE_CHECKING:
    from slope.methods.layer import PrunedLinear


class Products(NamedTuple):
    """What the products of one call read; all detached, dtype of the call.

    Attributes:
        x: (T, I), A.
        w: (O, I), B.
        w_backward: (O, I), C.
        x_backward: (T, I), D.
        x_keep_mask: (T, I) or (I,) bool for ∇X, or None.
        w_keep_mask: (O, I) bool for ∇W, or None: straight-through, every weight gets a gradient.
    """

    x: Tensor
    w: Tensor
    w_backward: Tensor
    x_backward: Tensor
    x_keep_mask: Tensor | None = None
    w_keep_mask: Tensor | None = None


class Method:
    """One pruning method; stateless beside its settings, so that layers may share it.

    A method's tensors (masks, scales) are persistent buffers of the layer, registered in
    :meth:`setup`.

    Attributes:
        name: as ``SparsityConfig.method`` has it.
        grouped: the method prunes groups of m, so the pattern must divide the layer.
        row_pruned: the forward's weight is n:m along d_in, so it can be shipped compressed.
        sparsity: percent of zeros of an unstructured weight mask, else None.
    """

    name: str
    grouped: bool = True
    row_pruned: bool = False
    sparsity: float | None = None

    @property
    def note(self) -> str:
        """What a report says of a layer under this method: its name, or more."""
        return self.name

    def setup(self, layer: PrunedLinear) -> None:
        """Register buffers, and choose masks from the layer's weight; meta tensors must do."""

    def products(self, layer: PrunedLinear, x: Tensor, weight: Tensor) -> Products:
        """Operands of one call.

        Args:
            layer: whose call it is; ``layer.weight`` has the precision in which masks are chosen.
            x: (T, I), detached; T may be 0, of 2-D shape always.
            weight: (O, I), the layer's weight detached, in the dtype of ``x``.
        """
        raise NotImplementedError

    def output_gradients(self, layer: PrunedLinear, dy: Tensor) -> tuple[Tensor, Tensor]:
        """G₁ and G₂ from ∇Y (T, O)."""
        return dy, dy

    def begin_step(self, layer: PrunedLinear, step: int) -> None:
        """Refresh masks at the beginning of optimizer step ``step``, counted from 0."""

    def adjust_gradient(self, layer: PrunedLinear) -> None:
        """Change ``layer.weight.grad`` once per optimizer step, before clipping (decays)."""

    def masks(self, layer: PrunedLinear) -> tuple[Tensor, Tensor]:
        """keep_masks (O, I) of the forward's and the input gradient's weight, as they are now."""
        everything = torch.ones_like(layer.weight, dtype=torch.bool)
        return everything, everything


def token_keep_mask(entries: Tensor, pattern: NMPattern, keep_mask: Tensor | None = None) -> Tensor:
    """The n largest magnitudes of every m consecutive tokens, feature by feature.

    Args:
        entries: (T, F), activations or their gradients.
        pattern: N:M pattern.
        keep_mask: (T, F) bool, who competes; None: everybody.

    Returns:
        keep_mask (T, F) bool. Tokens of the ragged tail that fill no group of m stay as they are.
    """
    keep = torch.ones_like(entries, dtype=torch.bool) if keep_mask is None else keep_mask.clone()
    whole = entries.shape[0] // pattern.m * pattern.m
    if whole:
        keep[:whole] = column_keep_mask(entries[:whole], keep[:whole], pattern)
    return keep


def decay_pruned(layer: PrunedLinear, keep_mask: Tensor, decay: float) -> None:
    """SR-STE's term: the gradient of each pruned weight grows by ``decay`` times that weight."""
    gradient = layer.weight.grad
    if decay and gradient is not None:
        weight = layer.weight.detach()
        gradient.add_(weight.masked_fill(keep_mask, 0.0).to(gradient.dtype), alpha=decay)


class _PrunedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        layer: PrunedLinear,
        products: Products,
    ) -> Tensor:
        ctx.layer, ctx.weight_dtype = layer, weight_OI.dtype
        # .data goes round the version check: masks may be buffers, and DDP writes equal bytes into
        # buffers before each forward.
        masks = [
            None if mask is None else mask.data
            for mask in (products.x_keep_mask, products.w_keep_mask)
        ]
        ctx.save_for_backward(products.w_backward, products.x_backward, *masks)
        return torch.nn.functional.linear(products.x, products.w, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        dy_TO = grad_outputs[0]
        w_OI, x_TI, x_keep_mask, w_keep_mask = ctx.saved_tensors
        dy_x, dy_w = ctx.layer.method.output_gradients(ctx.layer, dy_TO)
        dx_TI = dw_OI = dbias_O = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_x @ w_OI
            if x_keep_mask is not None:
                dx_TI = dx_TI * x_keep_mask
        if ctx.needs_input_grad[1]:
            dw_OI = dy_w.t() @ x_TI
            if w_keep_mask is not None:
                dw_OI = dw_OI * w_keep_mask
            dw_OI = dw_OI.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            dbias_O = dy_TO.sum(0)
        return dx_TI, dw_OI, dbias_O, None, None


def pruned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: PrunedLinear) -> Tensor:
    """The layer's method applied to ``x`` (..., I), in the dtype of ``x``; (..., O)."""
    x_TI = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        products = layer.method.products(layer, x_TI.detach(), weight.detach().to(x.dtype))
    y = _PrunedProducts.apply(x_TI, weight, bias, layer, products)
    return y.view(*x.shape[:-1], y.shape[-1])
