"""Language models to train: transformers' own classes, randomly initialised, nothing downloaded.

``build_model`` turns the ``model`` section of a configuration into a module; ``structure`` names
the parts of such a module that pruning has to know: blocks, attention, the first QKV, the head.
transformers is imported when a model is built.
"""

from __future__ import annotations

from slope.models.build import FAMILIES, attend_causally, build_model
from slope.models.structure import (
    ModelStructure,
    attention_names,
    block_names,
    structure,
    tied_weights,
)

__all__ = [
    "FAMILIES",
    "ModelStructure",
    "attend_causally",
    "attention_names",
    "block_names",
    "build_model",
    "structure",
    "tied_weights",
]
