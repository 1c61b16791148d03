"""Backends: who computes the three products. One seam, chosen by name."""

from __future__ import annotations

from slope.backends.base import AdapterTerm, Backend, Operands, SparseWeight
from slope.backends.dense import DenseBackend
from slope.backends.dispatch import PATHS, AutoBackend
from slope.backends.support import why_not_sparse_kernels

__all__ = [
    "AdapterTerm",
    "Backend",
    "DenseBackend",
    "Operands",
    "SparseWeight",
    "get_backend",
    "why_not_sparse_kernels",
]


def get_backend(name: str, prune_backward: bool = True) -> Backend:
    """The backend of that name; ``"auto"`` takes the fastest that serves a product.

    Args:
        name: ``"auto"``, ``"dense"``, ``"cusparselt"``, ``"gemm"`` for many tokens, or ``"mma"`` or
            ``"triton"`` for the forward of a few.
        prune_backward: False for layers whose column mask keeps everything.

    Raises:
        ValueError: if there is none of that name.
    """
    if name == DenseBackend.name:
        return DenseBackend()
    if name == "auto" or name in PATHS:
        return AutoBackend(None if name == "auto" else name, prune_backward)
    known = ", ".join(("auto", DenseBackend.name, *PATHS))
    raise ValueError(f"backend={name!r} is unknown; choose one of {known}.")
