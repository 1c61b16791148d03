"""The reference backend: expand the compressed weight and multiply densely.

Any device, pattern and dtype; the oracle that every fast path is compared with. Shape letters:
T tokens, I = d_in, O = d_out, K kept per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope.backends.base import AdapterTerm, Operands, SparseWeight
from slope.compressed import column_indices, decompress, pack_bits, unpack_bits
from slope.masks import survivors
from slope.pattern import NMPattern


class DenseBackend:
    """Dense products over expanded weights."""

    name = "dense"

    def why_not(self, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> str | None:
        """None: the reference serves everything."""
        return None

    def expand(self, weight: SparseWeight, dtype: torch.dtype) -> Operands:
        """W^R and W^{R,C}, (O, I) with zeros."""
        return Operands(self.forward_operand(weight, dtype), self.backward_operand(weight, dtype))

    def forward_operand(self, weight: SparseWeight, dtype: torch.dtype) -> Tensor:
        """W^R, (O, I) with zeros."""
        values = weight.values.detach().to(dtype)
        return decompress(values, weight.metadata, weight.pattern, weight.in_features)

    def backward_operand(self, weight: SparseWeight, dtype: torch.dtype) -> Tensor:
        """W^{R,C}, (O, I) with zeros."""
        values = weight.values.detach().to(dtype)
        survives = unpack_bits(weight.column_mask, values.shape[1])
        kept = torch.where(survives, values, torch.zeros_like(values))
        return decompress(kept, weight.metadata, weight.pattern, weight.in_features)

    def forward(
        self,
        x: Tensor,
        weight: SparseWeight,
        bias: Tensor | None,
        operands: Operands | None = None,
        adapter: AdapterTerm | None = None,
    ) -> Tensor:
        """(T, I) -> (T, O)."""
        w_r = self.forward_operand(weight, x.dtype) if operands is None else operands.w_r
        y = torch.nn.functional.linear(x, w_r, bias)
        if adapter is not None and adapter.down is not None and adapter.up is not None:
            low = torch.nn.functional.linear(x, adapter.down)
            y = y + torch.nn.functional.linear(low, adapter.up) * adapter.scale
        return y

    def input_gradient(
        self, dy: Tensor, weight: SparseWeight, operands: Operands | None = None
    ) -> Tensor:
        """(T, O) -> (T, I)."""
        w_rc = self.backward_operand(weight, dy.dtype) if operands is None else operands.w_rc
        return dy @ w_rc

    def values_gradient(self, dy: Tensor, x: Tensor, weight: SparseWeight) -> Tensor:
        """(T, O), (T, I) -> (O, K): a dense product of which only the kept entries stay."""
        columns = column_indices(weight.metadata, weight.pattern, weight.in_features)
        return (dy.t() @ x).gather(1, columns).to(weight.values.dtype)

    def refresh_column_mask(self, weight: SparseWeight) -> None:
        """(O, ceil(K/8)) uint8, written in place."""
        columns = column_indices(weight.metadata, weight.pattern, weight.in_features)
        survives = survivors(weight.values.detach(), columns, weight.in_features, weight.pattern)
        weight.column_mask.copy_(pack_bits(survives))

    def share_operand(self, weight: SparseWeight) -> Tensor | None:
        """None: dense operands have zeros between the values."""
        return None
