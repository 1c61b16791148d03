"""Backends: who computes the three products. One seam, chosen by name."""

from __future__ import annotations

from slope.backends.dense import Backend, DenseBackend, Operands
from slope.pattern import NMPattern

__all__ = ["Backend", "DenseBackend", "Operands", "get_backend", "why_not_sparse_kernels"]


def get_backend(name: str) -> Backend:
    """The backend of that name; ``"auto"`` is the dense reference, the only one so far.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in ("auto", DenseBackend.name):
        return DenseBackend()
    raise ValueError(f"backend={name!r} is unknown; choose 'auto' or {DenseBackend.name!r}.")


def why_not_sparse_kernels(pattern: NMPattern | str, device_type: str) -> str | None:
    """Why no sparse tensor core can run the products of SLoPe; None if one can.

    Args:
        pattern: of the weights.
        device_type: of the tensors, as ``torch.device`` has it: ``"cpu"``, ``"cuda"``.

    Returns:
        The reason, as the end of a sentence.
    """
    if str(pattern) != "2:4":
        return f"sparse tensor cores run the pattern 2:4 alone, not {pattern}"
    if device_type != "cuda":
        return f"device type {device_type!r} has no sparse tensor cores"
    return "this version of slope has no sparse kernels"
