"""Backends: who computes the three products. One seam, chosen by name."""

from __future__ import annotations

from slope.backends.dense import Backend, DenseBackend, Operands

__all__ = ["Backend", "DenseBackend", "Operands", "get_backend"]


def get_backend(name: str) -> Backend:
    """The backend of that name; ``"auto"`` is the dense reference, the only one so far.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in ("auto", DenseBackend.name):
        return DenseBackend()
    raise ValueError(f"backend={name!r} is unknown; choose 'auto' or {DenseBackend.name!r}.")
