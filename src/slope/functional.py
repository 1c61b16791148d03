"""The three products of SLoPe in one autograd function (arXiv:2405.16325, equations 4-6).

    Y       = X (W^R)ᵀ + b          forward: n of every m along d_in
    ∇X      = ∇Y W^{R,C}            input gradient: pruned again, n of every m along d_out
    ∇values = (∇Yᵀ X)[kept]         weight gradient: a dense product, only kept entries are stored

∇X is by design not the exact gradient of Y: 2:4 leaves out 18.75 % of the kept weights there, and
there only. Shape letters: T tokens, I = d_in, O = d_out, K = kept per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope.backends import AdapterTerm, Backend, Operands, SparseWeight
from slope.pattern import NMPattern


class _SlopeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        values_OK: Tensor,
        bias_O: Tensor | None,
        metadata: Tensor,
        column_mask: Tensor,
        pattern: NMPattern,
        backend: Backend,
        operands: Operands | None,
    ) -> Tensor:
        ctx.pattern, ctx.backend, ctx.operands = pattern, backend, operands
        # Buffers go round save_for_backward's version check: DDP writes equal bytes into them
        # before each forward.
        ctx.buffers = metadata, column_mask
        ctx.save_for_backward(x_TI, values_OK)
        weight = SparseWeight(values_OK, metadata, column_mask, pattern, x_TI.shape[1])
        return backend.forward(x_TI, weight, bias_O, operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        dy_TO = grad_outputs[0]
        x_TI, values_OK = ctx.saved_tensors
        metadata, column_mask = ctx.buffers
        weight = SparseWeight(values_OK, metadata, column_mask, ctx.pattern, x_TI.shape[1])
        dx_TI = dvalues_OK = dbias_O = None
        if ctx.needs_input_grad[0]:
            dx_TI = ctx.backend.input_gradient(dy_TO, weight, ctx.operands)
        if ctx.needs_input_grad[1]:
            dvalues_OK = ctx.backend.values_gradient(dy_TO, x_TI, weight)
        if ctx.needs_input_grad[2]:
            dbias_O = dy_TO.sum(0)
        return dx_TI, dvalues_OK, dbias_O, None, None, None, None, None


def slope_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    metadata: Tensor,
    column_mask: Tensor,
    pattern: NMPattern,
    backend: Backend,
    operands: Operands | None = None,
    packed: Tensor | None = None,
    adapter: AdapterTerm | None = None,
) -> Tensor:
    """Sparse linear layer: ``Y = X (W^R)ᵀ + b`` with the double-pruned input gradient.

    Args:
        x: (..., I), a float dtype.
        values: (O, K), kept weights; cast to the dtype of ``x`` for the products.
        bias: (O,) or None, dtype of ``x``.
        metadata: (O, bytes) uint8, positions of ``values``.
        column_mask: (O, ceil(K/8)) uint8, one bit per kept value: does it survive in W^{R,C}.
        pattern: N:M pattern.
        backend: who multiplies.
        operands: prepared W^R and W^{R,C} of these very values in the dtype of ``x``; None expands
            them for this call.
        packed: the backend's own operand of these very values, or None.
        adapter: low-rank term to add; only where no gradient is needed.

    Returns:
        (..., O), dtype of ``x``.

    Raises:
        ValueError: if ``x`` has another number of features than the weight.
    """
    # Nothing later would notice: positions are read group by group.
    if x.shape[-1] * pattern.n != values.shape[1] * pattern.m:
        raise ValueError(
            f"the input has {x.shape[-1]} features, and the weight takes "
            f"{values.shape[1] * pattern.m // pattern.n}."
        )
    x_TI = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        weight = SparseWeight(values, metadata, column_mask, pattern, x.shape[-1], packed)
        y = backend.forward(x_TI, weight, bias, operands, adapter)
        return y.view(*x.shape[:-1], y.shape[-1])
    y = _SlopeLinear.apply(x_TI, values, bias, metadata, column_mask, pattern, backend, operands)
    return y.view(*x.shape[:-1], y.shape[-1])
