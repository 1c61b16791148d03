"""Lazy low-rank adapters: Y += scale * (X downᵀ) upᵀ (arXiv:2405.16325, section 2.2).

An adapter exists from step 0, dormant: it is not computed, gets no gradient and so no optimizer
state. It wakes by :attr:`Adapter.active`. ``up`` starts at zero, so the output does not change at
that step. Shape letters: T tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """Low-rank term of one linear layer.

    Args:
        in_features: I.
        out_features: O.
        rank: R, from 1 to min(I, O).
        scale: factor of the product; None means 1/rank, as the authors' code has it.
        generator: draws ``down`` from N(0, 1), on the CPU; None uses torch's default generator.
        device: where the parameters live.
        dtype: of the parameters.

    Attributes:
        down: parameter (R, I), random.
        up: parameter (O, R), zero.
        active: False while dormant.

    Raises:
        ValueError: if the rank does not fit the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        largest = min(in_features, out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"adapter rank {rank} does not fit a layer of {out_features} x {in_features}; "
                f"choose lora_rank from 1 to {largest}."
            )
        self.rank = rank
        self.scale = 1.0 / rank if scale is None else float(scale)
        self.active = False
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        if self.down.device.type != "meta":
            with torch.no_grad():
                self.down.copy_(torch.randn(rank, in_features, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """The term added to the layer's output: (..., I) -> (..., O)."""
        low = nn.functional.linear(x, self.down)
        return nn.functional.linear(low, self.up) * self.scale

    def delta(self) -> Tensor:
        """The dense (O, I) matrix that the adapter adds to the weight."""
        return (self.up @ self.down) * self.scale

    def extra_repr(self) -> str:
        """Rank, scale and state, for ``print(model)``."""
        return f"rank={self.rank}, scale={self.scale:g}, {'active' if self.active else 'dormant'}"


def resolve_rank(rank: int | float, in_features: int) -> int:
    """Rank of one layer: a whole number as it is; a ratio in (0, 1) times d_in, at least 1.

    Example:
        >>> resolve_rank(0.0156, 1024)
        16
    """
    return max(1, round(rank * in_features)) if 0 < rank < 1 else int(rank)
