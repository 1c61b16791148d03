"""SLoPe: pretrain language models with N:M sparse weights and lazy low-rank adapters.

    model = ...                                                   # any nn.Module
    slope.sparsify(model, slope.SparsityConfig(pattern="2:4", adapter_rank=16))
    optimizer = torch.optim.AdamW(model.parameters())             # yours, unchanged

Paper: arXiv:2405.16325. Names are imported when they are first used: ``import slope`` alone does
not even import torch, so the command line can speak before torch has loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slope.adapters import Adapter
    from slope.config import SparsityConfig
    from slope.convert import compress_weights, densify, sparsify
    from slope.export import load_pretrained, save_pretrained
    from slope.fusion import fuse_projections
    from slope.layers import (
        activate_adapters,
        adapter_parameters,
        adapters_active,
        deactivate_adapters,
        refresh_column_masks,
        sparse_layers,
    )
    from slope.linear import SlopeLinear
    from slope.methods import PrunedLinear
    from slope.pattern import NMPattern
    from slope.schedule import SlopeSchedule
    from slope.sparsity import LayerReport, SparsityReport, sparsity_report

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters",
    "LayerReport": "sparsity",
    "NMPattern": "pattern",
    "PrunedLinear": "methods",
    "SlopeLinear": "linear",
    "SlopeSchedule": "schedule",
    "SparsityConfig": "config",
    "SparsityReport": "sparsity",
    "activate_adapters": "layers",
    "adapter_parameters": "layers",
    "adapters_active": "layers",
    "compress_weights": "convert",
    "deactivate_adapters": "layers",
    "densify": "convert",
    "fuse_projections": "fusion",
    "load_pretrained": "export",
    "refresh_column_masks": "layers",
    "save_pretrained": "export",
    "sparse_layers": "layers",
    "sparsify": "convert",
    "sparsity_report": "sparsity",
}
_MODULES = (
    "compressed",
    "diagnostics",
    "export",
    "functional",
    "masks",
    "methods",
    "models",
    "schedule",
)

__all__ = [
    "Adapter",
    "LayerReport",
    "NMPattern",
    "PrunedLinear",
    "SlopeLinear",
    "SlopeSchedule",
    "SparsityConfig",
    "SparsityReport",
    "activate_adapters",
    "adapter_parameters",
    "adapters_active",
    "compress_weights",
    "deactivate_adapters",
    "densify",
    "fuse_projections",
    "load_pretrained",
    "refresh_column_masks",
    "save_pretrained",
    "sparse_layers",
    "sparsify",
    "sparsity_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"slope.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"slope.{name}")
    else:
        raise AttributeError(f"module 'slope' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
