"""The backend seam: who computes the three products of a sparse linear layer, and how.

Shape letters: T tokens, I = d_in, O = d_out, K kept per row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slope.pattern import NMPattern


class SparseWeight(NamedTuple):
    """A compressed weight and the mask of its second pruning.

    Attributes:
        values: (O, K), the kept weights, any float dtype.
        metadata: (O, bytes) uint8, their positions.
        column_mask: (O, ceil(K/8)) uint8, one bit per kept value: does it survive in W^{R,C}.
        pattern: N:M pattern.
        in_features: I.
        packed: cuSPARSELt's operand whose first part the values are a view of, or None.
    """

    values: Tensor
    metadata: Tensor
    column_mask: Tensor
    pattern: NMPattern
    in_features: int
    packed: Tensor | None = None


class AdapterTerm(NamedTuple):
    """``scale * (X downᵀ) upᵀ``, added to Y: down (R, I), up (O, R), dtype of X.

    Where ``up`` is blocks on a diagonal, ``corners`` are the output and the rank at which the
    second begins, the third, and so on.
    """

    down: Tensor | None
    up: Tensor | None
    scale: float
    corners: tuple[int, ...] = ()


class Operands(NamedTuple):
    """Expanded operands that a layer keeps between calls: W^R and W^{R,C}, dense with zeros."""

    w_r: Tensor
    w_rc: Tensor


class Backend(Protocol):
    """The three products; each equals the reference within the rounding of its dtype."""

    name: str

    def why_not(self, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> str | None:
        """Reason why this backend cannot serve such a layer, or None if it can."""

    def expand(self, weight: SparseWeight, dtype: torch.dtype) -> Operands:
        """Both operands, dense, in ``dtype``."""

    def forward(
        self,
        x: Tensor,
        weight: SparseWeight,
        bias: Tensor | None,
        operands: Operands | None = None,
        adapter: AdapterTerm | None = None,
    ) -> Tensor:
        """Y = X (W^R)ᵀ + b [+ adapter]: (T, I) -> (T, O), dtype of ``x``."""

    def input_gradient(
        self, dy: Tensor, weight: SparseWeight, operands: Operands | None = None
    ) -> Tensor:
        """∇X = ∇Y W^{R,C}: (T, O) -> (T, I), dtype of ``dy``."""

    def values_gradient(self, dy: Tensor, x: Tensor, weight: SparseWeight) -> Tensor:
        """∇values = (∇Yᵀ X)[kept]: (O, K), dtype of the values."""

    def refresh_column_mask(self, weight: SparseWeight) -> None:
        """Write the column mask by the magnitudes of the values as they are now, in place."""

    def share_operand(self, weight: SparseWeight) -> Tensor | None:
        """Move the values into an operand of their own and return that, or None; once per weight.

        The values stay the same tensor with the same content; only their storage changes.
        """
