"""The reference backend: expand the compressed weight and multiply densely.

Any device, pattern and dtype; the oracle that every fast path is compared with. Shape letters:
T tokens, I = d_in, O = d_out, K kept per row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slope.compressed import column_indices, decompress, unpack_bits
from slope.pattern import NMPattern


class Operands(NamedTuple):
    """Prepared operands: W^R for the forward, W^{R,C} for the input gradient."""

    w_r: Tensor
    w_rc: Tensor


class Backend(Protocol):
    """The three products of a sparse linear layer and the operands that they read."""

    name: str

    def why_not(self, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> str | None:
        """Reason why this backend cannot serve such a layer, or None if it can."""

    def forward_operand(
        self, values: Tensor, metadata: Tensor, pattern: NMPattern, in_features: int
    ) -> Tensor:
        """W^R in this backend's layout."""

    def backward_operand(
        self,
        values: Tensor,
        metadata: Tensor,
        column_mask: Tensor,
        pattern: NMPattern,
        in_features: int,
    ) -> Tensor:
        """W^{R,C} in this backend's layout."""

    def forward(self, x: Tensor, w_r: Tensor, bias: Tensor | None) -> Tensor:
        """Y = X (W^R)ᵀ + b."""

    def input_gradient(self, dy: Tensor, w_rc: Tensor) -> Tensor:
        """∇X = ∇Y W^{R,C}."""

    def values_gradient(
        self, dy: Tensor, x: Tensor, metadata: Tensor, pattern: NMPattern
    ) -> Tensor:
        """∇values = (∇Yᵀ X)[kept]."""


class DenseBackend:
    """Dense products over expanded weights."""

    name = "dense"

    def why_not(self, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> str | None:
        """None: the reference serves everything."""
        return None

    def forward_operand(
        self, values: Tensor, metadata: Tensor, pattern: NMPattern, in_features: int
    ) -> Tensor:
        """W^R, (O, I) with zeros, dtype of ``values``."""
        return decompress(values, metadata, pattern, in_features)

    def backward_operand(
        self,
        values: Tensor,
        metadata: Tensor,
        column_mask: Tensor,
        pattern: NMPattern,
        in_features: int,
    ) -> Tensor:
        """W^{R,C}, (O, I) with zeros, dtype of ``values``."""
        survives = unpack_bits(column_mask, values.shape[1])
        survivors = torch.where(survives, values, torch.zeros_like(values))
        return decompress(survivors, metadata, pattern, in_features)

    def forward(self, x: Tensor, w_r: Tensor, bias: Tensor | None) -> Tensor:
        """(T, I), (O, I), (O,) -> (T, O)."""
        return torch.nn.functional.linear(x, w_r, bias)

    def input_gradient(self, dy: Tensor, w_rc: Tensor) -> Tensor:
        """(T, O), (O, I) -> (T, I)."""
        return dy @ w_rc

    def values_gradient(
        self, dy: Tensor, x: Tensor, metadata: Tensor, pattern: NMPattern
    ) -> Tensor:
        """(T, O), (T, I) -> (O, K): a dense product of which only the kept entries stay."""
        return (dy.t() @ x).gather(1, column_indices(metadata, pattern, x.shape[1]))
