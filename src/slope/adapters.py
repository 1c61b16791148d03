"""Lazy low-rank adapters: Y += scale * (X downᵀ) upᵀ (arXiv:2405.16325, section 2.2).

An adapter exists from step 0, dormant: it is not computed, gets no gradient and so no optimizer
state. It wakes by :attr:`Adapter.active`. ``up`` starts at zero, so the output does not change at
that step. Shape letters: T tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _normal(rank: int, in_features: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(rank, in_features, generator=generator)


def _kaiming(rank: int, in_features: int, generator: torch.Generator | None) -> Tensor:
    return (torch.rand(rank, in_features, generator=generator) * 2 - 1) / in_features**0.5


def _orthogonal(rank: int, in_features: int, generator: torch.Generator | None) -> Tensor:
    gauss = torch.randn(in_features, rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    # QR leaves the signs open; those of the diagonal make the rows uniform over all directions.
    return (q * r.diagonal().sign()).t()


_INITS = {"normal": _normal, "kaiming": _kaiming, "orthogonal": _orthogonal}


class Adapter(nn.Module):
    """Low-rank term of one linear layer.

    Args:
        in_features: I.
        out_features: O.
        rank: R, from 1 to min(I, O).
        scale: factor of the product; None means 1/rank, as the authors' code has it.
        generator: draws ``down``, on the CPU; None uses torch's default generator.
        device: where the parameters live.
        dtype: of the parameters.
        init: how ``down`` is drawn. ``"normal"``: N(0, 1), as the authors' code has it, so that the
            square of each component of X downᵀ is ‖x‖² on average. ``"kaiming"``: uniform in
            ±1/√I, as LoRA's (arXiv:2106.09685) and PEFT's ``kaiming_uniform_(a=√5)``; on average
            ‖x‖²/(3 I). ``"orthogonal"``: orthonormal rows, uniformly random; on average ‖x‖²/I.

    Attributes:
        down: parameter (R, I), random.
        up: parameter (O, R), zero.
        active: False while dormant. Loading a state dict with a trained ``up`` sets it.
        corners: where several adapters are one, whose ``up`` is then blocks on a diagonal: output
            and rank at which the second begins, the third, and so on; empty elsewhere.

    Raises:
        ValueError: if the rank does not fit the layer, or the initialisation is unknown.
    """

    corners: tuple[int, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init: str = "normal",
    ) -> None:
        super().__init__()
        largest = min(in_features, out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"rank={rank} does not fit the adapter of a layer of {out_features} x "
                f"{in_features}; choose a rank from 1 to {largest}, for example rank={largest}."
            )
        if init not in _INITS:
            raise ValueError(
                f"adapter init {init!r} is unknown; choose one of {', '.join(_INITS)}."
            )
        self.rank = rank
        self.scale = 1.0 / rank if scale is None else float(scale)
        self.active = False
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        if self.down.device.type != "meta":
            with torch.no_grad():
                self.down.copy_(_INITS[init](rank, in_features, generator))

    def forward(self, x: Tensor) -> Tensor:
        """The term added to the layer's output: (..., I) -> (..., O)."""
        low = nn.functional.linear(x, self.down)
        return nn.functional.linear(low, self.up) * self.scale

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """Wake for loaded weights that were trained; ``up`` of a dormant adapter is zero."""
        super()._load_from_state_dict(state, prefix, *others)
        # Only the schedule wakes what is sharded: a process may hold a part without any row.
        if type(self.up.data) is Tensor and not self.up.is_meta and bool(self.up.any()):
            self.active = True

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
