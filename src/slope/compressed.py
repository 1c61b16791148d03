"""Dense <-> compressed: the kept values in natural order, and metadata that says where they were.

``values`` is (O, K), K = I * n / m. ``metadata`` holds log2(m) bits per kept value: its position
inside its group, ascending, packed little-endian into uint8 rows. Positions are data: a kept value
may be 0.0 and keeps its slot. Shape letters: O = d_out, I = d_in, K = kept per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slope.pattern import NMPattern


class Compressed(NamedTuple):
    """A row-pruned weight: ``values`` (O, K) and ``metadata`` (O, bytes) uint8."""

    values: Tensor
    metadata: Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans along the last dimension into uint8, little-endian, zero-padded.

    Args:
        bits: (..., N) bool.

    Returns:
        (..., ceil(N / 8)) uint8.
    """
    padding = -bits.shape[-1] % 8
    padded = torch.nn.functional.pad(bits.to(torch.float32), (0, padding)).unflatten(-1, (-1, 8))
    # A product with the powers of two: exact in float32, and quicker than shifting and summing.
    powers = (1 << torch.arange(8, device=bits.device)).to(torch.float32)
    return (padded @ powers).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Undo :func:`pack_bits`: the first ``count`` bits of each row as (..., count) bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :count].to(torch.bool)


def _pack_positions(positions: Tensor, pattern: NMPattern) -> Tensor:
    shifts = torch.arange(pattern.bits, dtype=torch.uint8, device=positions.device)
    bits = (positions.unsqueeze(-1) >> shifts) & 1
    return pack_bits(bits.flatten(-2).to(torch.bool))


def _unpack_positions(metadata: Tensor, pattern: NMPattern, kept: int) -> Tensor:
    if 8 % pattern.bits == 0:  # whole positions inside a byte: m = 2, 4, 16
        shifts = torch.arange(0, 8, pattern.bits, dtype=torch.uint8, device=metadata.device)
        positions = (metadata.unsqueeze(-1) >> shifts) & (pattern.m - 1)
        return positions.flatten(-2)[..., :kept]
    bits = unpack_bits(metadata, kept * pattern.bits).unflatten(-1, (kept, pattern.bits))
    shifts = torch.arange(pattern.bits, dtype=torch.uint8, device=metadata.device)
    return (bits.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def column_indices(metadata: Tensor, pattern: NMPattern, in_features: int) -> Tensor:
    """Column of each kept value, (O, K) int64; transient, never stored beside a layer.

    Args:
        metadata: packed positions, (O, bytes) uint8.
        pattern: N:M pattern.
        in_features: I.

    Returns:
        (O, K) int64, ascending along each row.
    """
    kept = pattern.kept(in_features)
    positions = _unpack_positions(metadata, pattern, kept).to(torch.int64)
    group_start = torch.arange(0, in_features, pattern.m, device=metadata.device)
    return positions + group_start.repeat_interleave(pattern.n, output_size=kept)


def compress(weight: Tensor, keep_mask: Tensor, pattern: NMPattern) -> Compressed:
    """Keep the ``n`` values of each group of ``m`` and record where they were.

    Args:
        weight: dense weight, shape (O, I), any dtype.
        keep_mask: True where kept, shape (O, I), exactly n per group of m along I.
        pattern: N:M pattern; I must be divisible by m.

    Returns:
        values (O, I*n/m) of the weight's dtype; metadata (O, ceil(I*n/m * log2(m) / 8)) uint8.

    Raises:
        ValueError: if I is not divisible by m, the mask has another shape, or a group does not
            hold exactly n kept values.

    Example:
        >>> w = torch.tensor([[1.0, 0.0, 3.0, 0.0]])
        >>> compress(w, w != 0, NMPattern(2, 4)).values
        tensor([[1., 3.]])
    """
    rows, in_features = weight.shape
    if keep_mask.shape != weight.shape:
        raise ValueError(
            f"keep_mask has shape {tuple(keep_mask.shape)}, but the weight is {rows} x "
            f"{in_features}; the mask is (O, I): transpose it for a Conv1D."
        )
    if in_features % pattern.m:
        raise ValueError(
            f"in_features={in_features} is not divisible by m={pattern.m} of pattern {pattern}."
        )
    grouped = keep_mask.unflatten(1, (-1, pattern.m))
    counts = grouped.sum(-1)
    if not bool((counts == pattern.n).all()):
        row, group = torch.nonzero(counts != pattern.n)[0].tolist()
        raise ValueError(
            f"keep_mask holds {int(counts[row, group])} kept entries in row {row}, group {group}; "
            f"pattern {pattern} needs exactly {pattern.n} in each group of {pattern.m}."
        )
    kept = pattern.kept(in_features)
    columns = torch.nonzero(keep_mask)[:, 1].view(rows, kept)
    values = weight.gather(1, columns)
    return Compressed(values, _pack_positions((columns % pattern.m).to(torch.uint8), pattern))


def decompress(values: Tensor, metadata: Tensor, pattern: NMPattern, in_features: int) -> Tensor:
    """Dense (O, I) weight with zeros where pruned; the inverse of :func:`compress`.

    Args:
        values: (O, K), any dtype.
        metadata: (O, bytes) uint8.
        pattern: N:M pattern.
        in_features: I.

    Returns:
        (O, I), dtype of ``values``.

    Raises:
        ValueError: if so many values are not those of I columns.
    """
    kept = values.shape[-1]
    if kept * pattern.m != in_features * pattern.n:
        raise ValueError(
            f"{kept} values of a row with pattern {pattern} are those of in_features="
            f"{kept * pattern.m // pattern.n}, not {in_features}."
        )
    columns = column_indices(metadata, pattern, in_features)
    return values.new_zeros(values.shape[0], in_features).scatter(1, columns, values)


def keep_mask_from_metadata(metadata: Tensor, pattern: NMPattern, in_features: int) -> Tensor:
    """Row mask (O, I) bool that ``metadata`` describes."""
    columns = column_indices(metadata, pattern, in_features)
    keep_mask = torch.zeros(
        metadata.shape[0], in_features, dtype=torch.bool, device=metadata.device
    )
    return keep_mask.scatter(1, columns, True)


def check_metadata(metadata: Tensor, pattern: NMPattern, in_features: int) -> None:
    """Check that positions ascend inside every group, as :func:`compress` writes them.

    Raises:
        ValueError: if a group repeats a position or is out of order (damaged or foreign data).
    """
    positions = _unpack_positions(metadata, pattern, pattern.kept(in_features))
    grouped = positions.unflatten(1, (-1, pattern.n)).to(torch.int16)
    if not bool((grouped.diff(dim=-1) > 0).all()):
        raise ValueError(
            f"metadata does not describe a {pattern} mask (a group repeats a position or is out of "
            "order); the file is damaged or was written for another pattern."
        )
