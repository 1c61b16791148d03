"""SLoPe: pretrain language models with N:M sparse weights and lazy low-rank adapters.

    model = ...                                                   # any nn.Module
    slope.sparsify(model, slope.SparsityConfig(pattern="2:4", adapter_rank=16))
    optimizer = torch.optim.AdamW(model.parameters())             # yours, unchanged

Paper: arXiv:2405.16325. Only torch is imported here; saving and loading import safetensors when
they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slope.adapters import Adapter
from slope.config import SparsityConfig
from slope.convert import (
    LayerReport,
    SparsityReport,
    activate_adapters,
    adapter_parameters,
    adapters_active,
    deactivate_adapters,
    densify,
    refresh_column_masks,
    sparse_layers,
    sparsify,
    sparsity_report,
)
from slope.linear import SlopeLinear
from slope.pattern import NMPattern
from slope.schedule import SlopeSchedule

if TYPE_CHECKING:
    from slope.export import load_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LayerReport",
    "NMPattern",
    "SlopeLinear",
    "SlopeSchedule",
    "SparsityConfig",
    "SparsityReport",
    "activate_adapters",
    "adapter_parameters",
    "adapters_active",
    "deactivate_adapters",
    "densify",
    "load_pretrained",
    "refresh_column_masks",
    "save_pretrained",
    "sparse_layers",
    "sparsify",
    "sparsity_report",
]


def __getattr__(name: str) -> Any:
    if name in ("load_pretrained", "save_pretrained"):
        from slope import export

        return getattr(export, name)
    raise AttributeError(f"module 'slope' has no attribute {name!r}")
