"""Pruning methods over dense weights, one file each: what SLoPe is compared with.

``base`` is the seam (the three products and what a method says about their operands), ``layer`` the
layer that every method shares. SLoPe itself is :class:`slope.SlopeLinear`, compressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slope.methods.base import Method
from slope.methods.layer import PrunedLinear

if TYPE_CHECKING:
    from slope.config import SparsityConfig

__all__ = ["Method", "PrunedLinear", "make_method"]


def make_method(config: SparsityConfig) -> Method:
    """The method that ``config`` asks for; layers share it.

    Args:
        config: checked settings, not those of SLoPe itself (``config.compressed``).

    Returns:
        The method; each lives in a file of its own, imported here when it is first needed.
    """
    assert not config.compressed, "SLoPe is slope.SlopeLinear, not a method over a dense weight"
    match config.method:
        case "static-weight" if config.unstructured_sparsity is not None:
            from slope.methods.static import UnstructuredWeight

            return UnstructuredWeight(config.unstructured_sparsity)
        case "static-weight":
            from slope.methods.static import StaticWeight

            return StaticWeight(config.prune_backward)
        case "dynamic-weight":
            from slope.methods.dynamic_weight import DynamicWeight

            double = config.reduction_dim and config.prune_backward
            return DynamicWeight(double, config.srste_decay)
        case "static-input":
            from slope.methods.inputs import StaticInput

            return StaticInput(config.reduction_dim)
        case "dynamic-input":
            from slope.methods.inputs import DynamicInput

            return DynamicInput(config.reduction_dim)
        case "dynamic-output-grad":
            from slope.methods.output_grad import DynamicOutputGrad

            return DynamicOutputGrad(config.reduction_dim)
        case "fst":
            from slope.methods.fst import FST

            return FST(srste_decay=config.srste_decay, mvue=config.mvue)
        case "s-ste":
            from slope.methods.s_ste import SoftThreshold

            return SoftThreshold()
    raise AssertionError(f"no method named {config.method!r}")
