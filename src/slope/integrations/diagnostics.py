"""Mask diagnostics as the numbers that other people's loggers take."""

from __future__ import annotations

from torch import nn

from slope.diagnostics import MaskSnapshot, layer_diagnostics, total
from slope.layers import adapted_layers


class MaskLog:
    """Totals over the sparse layers; flips are counted since the row before.

    Args:
        model: as it is when counting begins; dense is allowed, and gives empty rows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = MaskSnapshot(model)

    def row(self, model: nn.Module) -> dict[str, float]:
        """``mask/density`` and its like (docs/method.md), without those that have no meaning."""
        if not any(True for _ in adapted_layers(model)):
            return {}
        everything = total(layer_diagnostics(model, self._before)).row()
        self._before = MaskSnapshot(model)
        return {f"mask/{name}": value for name, value in everything.items() if value is not None}
