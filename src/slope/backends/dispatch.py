"""``backend="auto"``: for each product the fastest of cuSPARSELt, our kernels and a dense product.

2:4 layers in bf16 or fp16 on a GPU go to sparse kernels where these win, and else to a dense
product over a transient expanded weight; everything else goes to the reference. In eager mode the
products are called directly; under ``torch.compile`` through the custom ops of :mod:`.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slope.backends import ops
from slope.backends.base import AdapterTerm, Operands, SparseWeight
from slope.backends.dense import DenseBackend
from slope.backends.support import KERNEL_DTYPES, KERNEL_PATTERN, why_no_kernels
from slope.pattern import NMPattern

PATHS = ("cusparselt", "gemm", "mma", "triton")


class AutoBackend:
    """Dispatch by measurement.

    Args:
        only: use this path or fail; None takes the fastest.
        prune_backward: False: W^{R,C} is W^R, which is not 2:4 along d_out, so the input gradient
            is a dense product.

    Raises:
        RuntimeError: from a product, if the path asked for cannot do it.
    """

    def __init__(self, only: str | None = None, prune_backward: bool = True) -> None:
        self.name = only or "auto"
        self._only = only
        self._only_backward = (only or "") if prune_backward else "dense"
        self._dense = DenseBackend()
        self._reasons: dict[Any, str | None] = {}

    def why_not(self, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> str | None:
        """Reason why this layer gets dense products, or None."""
        return why_no_kernels(pattern, dtype, device)

    def expand(self, weight: SparseWeight, dtype: torch.dtype) -> Operands:
        """The reference's operands."""
        return self._dense.expand(weight, dtype)

    def forward(
        self,
        x: Tensor,
        weight: SparseWeight,
        bias: Tensor | None,
        operands: Operands | None = None,
        adapter: AdapterTerm | None = None,
    ) -> Tensor:
        """(T, I) -> (T, O)."""
        if operands is not None or not self._serves(weight, x):
            return self._dense.forward(x, weight, bias, operands, adapter)
        down, up, scale, corners = adapter or AdapterTerm(None, None, 1.0)
        arguments = (
            x, weight.values, weight.metadata, weight.column_mask, weight.packed, bias,
            down, up, scale, self._only or "", corners,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            return torch.ops.slope.sparse_linear(*arguments)
        return ops.sparse_linear_forward(*arguments)

    def input_gradient(
        self, dy: Tensor, weight: SparseWeight, operands: Operands | None = None
    ) -> Tensor:
        """(T, O) -> (T, I)."""
        if operands is not None or not self._serves(weight, dy):
            return self._dense.input_gradient(dy, weight, operands)
        arguments = dy, weight.values, weight.metadata, weight.column_mask, self._only_backward
        if torch.compiler.is_compiling():
            return torch.ops.slope.sparse_input_gradient(*arguments)
        return ops.sparse_input_gradient_forward(*arguments)

    def values_gradient(self, dy: Tensor, x: Tensor, weight: SparseWeight) -> Tensor:
        """(T, O), (T, I) -> (O, K)."""
        if not self._serves(weight, dy):
            return self._dense.values_gradient(dy, x, weight)
        arguments = dy, x, weight.metadata, weight.values.dtype
        if torch.compiler.is_compiling():
            return torch.ops.slope.values_gradient(*arguments)
        return ops.values_gradient_forward(*arguments)

    def refresh_column_mask(self, weight: SparseWeight) -> None:
        """Write the packed column mask; on a GPU in one pass."""
        values = weight.values
        # The mask is ranked in the dtype of the values, which the kernel takes as they are.
        if (
            weight.pattern != KERNEL_PATTERN
            or not values.is_cuda
            or values.dtype not in (*KERNEL_DTYPES, torch.float32)
            or weight.in_features % 16
        ):
            self._dense.refresh_column_mask(weight)
        elif torch.compiler.is_compiling():
            mask = torch.ops.slope.column_mask(values.detach(), weight.metadata)
            weight.column_mask.copy_(mask)
        elif self._serves(weight, None):
            ops.column_mask_forward(values.detach(), weight.metadata, weight.column_mask)
        else:
            self._dense.refresh_column_mask(weight)

    def share_operand(self, weight: SparseWeight) -> Tensor | None:
        """The operand of W^R in cuSPARSELt's layout, whose first part the values become."""
        values = weight.values
        if not self._serves(weight, values) or type(values.data) is not Tensor:
            return None
        packed = ops.packed_operand(values.detach(), weight.metadata)
        if packed is not None:
            values.data = packed[: values.numel()].view(values.shape)
        return packed

    def _serves(self, weight: SparseWeight, x: Tensor | None) -> bool:
        """Whether kernels may be asked; shapes are theirs to accept or to hand on.

        Args:
            weight: the layer's.
            x: operand of the product, or None for masks, which have no dtype of their own.
        """
        dtype = torch.bfloat16 if x is None else x.dtype
        device = weight.values.device
        if torch.compiler.is_compiling():
            # The op itself falls back where it must; a graph asks the driver nothing.
            reason = None if weight.values.is_cuda and dtype in KERNEL_DTYPES else "no kernels"
            if weight.pattern != KERNEL_PATTERN:
                reason = "no kernels"
        else:
            where = (weight.pattern.m, weight.pattern.n, dtype, device)
            if where not in self._reasons:
                self._reasons[where] = why_no_kernels(weight.pattern, dtype, device)
            reason = self._reasons[where]
        if reason is None and weight.in_features % 16:
            reason = f"in_features={weight.in_features} is not divisible by 16"
        if reason is not None and self._only is not None:
            raise RuntimeError(
                f"backend={self._only!r} cannot serve this layer: {reason}; use backend='auto'."
            )
        return reason is None
