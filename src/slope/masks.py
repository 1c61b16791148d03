"""Who is kept: the row mask of W^R and the column mask of W^{R,C} (arXiv:2405.16325, section 2.1).

A mask is a ``keep_mask``: boolean, True where kept. Shape letters: O = d_out, I = d_in.
"""

from __future__ import annotations

import functools
import itertools
import math
from importlib.util import find_spec

import torch
from torch import Tensor

from slope.pattern import NMPattern, imposed_sparsity

__all__ = [
    "column_keep_mask",
    "imposed_sparsity",
    "random_row_keep_mask",
    "row_keep_mask",
    "survivors",
    "top_n",
    "transposable_keep_mask",
]

# An exact search compares this many tiles with all patterns at once.
_TILES_AT_ONCE = 1 << 16


def top_n(scores: Tensor, pattern: NMPattern, dim: int) -> Tensor:
    """True for the n highest of each group of m along ``dim``; of equals the first wins.

    Each entry's rank is the number of entries of its group that beat it. Counting comparisons is
    exact, deterministic on every device, and for small groups far quicker than sorting them. On a
    GPU one kernel does it. Scores hold no NaN, which would be above nobody and below nobody.

    Raises:
        ValueError: if the size of ``dim`` is not divisible by m.
    """
    dim += scores.dim() if dim < 0 else 0
    _check_divides(scores.shape[dim], pattern, f"scores.shape[{dim}]")
    if scores.is_cuda and scores.dim() == 2 and _has_triton() and not torch.compiler.is_compiling():
        from slope.selection import select

        return select(scores, pattern.n, pattern.m, dim)
    groups = scores.unflatten(dim, (-1, pattern.m))
    entries = groups.unbind(dim + 1)
    # Entry j starts behind the j entries before it, as if they all beat it.
    ranks = [torch.full_like(entry, j, dtype=torch.uint8) for j, entry in enumerate(entries)]
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            beaten = (entries[j] > entries[i]).to(torch.uint8)
            ranks[i] += beaten
            ranks[j] -= beaten
    return torch.stack([rank < pattern.n for rank in ranks], dim + 1).view(scores.shape)


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check_divides(size: int, pattern: NMPattern, what: str) -> None:
    if size % pattern.m:
        raise ValueError(f"{what}={size} is not divisible by m={pattern.m} of pattern {pattern}.")


def _check_no_nan(weight: Tensor) -> None:
    if torch.isnan(weight).any():
        raise ValueError("the weight holds NaN, so magnitudes cannot be ranked; initialise it.")


def _magnitudes(entries: Tensor) -> Tensor:
    """|entries| to be ranked where training may have brought NaN, which counts as 0."""
    return entries.detach().abs().nan_to_num(nan=0.0, posinf=math.inf)


def row_keep_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """Row mask of W^R: the n largest magnitudes in each group of m along d_in.

    Args:
        weight: shape (O, I), any float dtype, without NaN.
        pattern: N:M pattern; I must be divisible by m.

    Returns:
        keep_mask (O, I) bool, exactly n True per group; of equal magnitudes the lower index wins.

    Raises:
        ValueError: if I is not divisible by m, or the weight holds NaN.

    Reference: section 2.1; on a random initialisation this support is uniformly random.
    """
    _check_divides(weight.shape[1], pattern, "in_features")
    _check_no_nan(weight)
    return top_n(weight.detach().abs(), pattern, dim=1)


def random_row_keep_mask(
    shape: tuple[int, int], pattern: NMPattern, generator: torch.Generator
) -> Tensor:
    """Row mask drawn uniformly over all N:M masks, on the CPU, from ``generator``.

    Args:
        shape: (O, I); I must be divisible by m.
        pattern: N:M pattern.
        generator: CPU generator; the same state gives the same mask.

    Returns:
        keep_mask (O, I) bool, exactly n True per group of m along I.

    Raises:
        ValueError: if I is not divisible by m.
    """
    _check_divides(shape[1], pattern, "in_features")
    scores = torch.rand(shape, generator=generator, dtype=torch.float64)
    return top_n(scores, pattern, dim=1)


def column_keep_mask(w_r: Tensor, keep_mask: Tensor, pattern: NMPattern) -> Tensor:
    """Column mask: the entries of W^R that survive in W^{R,C}, used only for the input gradient.

    In each group of m along d_out at most n kept entries survive, the largest magnitudes first. An
    entry that is kept but happens to be 0.0 outranks every pruned one; NaN counts as 0.0.

    Args:
        w_r: row-pruned weight W^R, shape (O, I), any float dtype.
        keep_mask: row mask (O, I) bool.
        pattern: N:M pattern; O must be divisible by m.

    Returns:
        keep_mask (O, I) bool, a subset of the row mask.

    Raises:
        ValueError: if O is not divisible by m.

    Reference: section 2.1, double pruning; Lemma 2.1 gives the mean number dropped.
    """
    _check_divides(w_r.shape[0], pattern, "out_features")
    scores = torch.where(keep_mask, _magnitudes(w_r), -1.0)
    return top_n(scores, pattern, dim=0) & keep_mask


def survivors(values: Tensor, columns: Tensor, in_features: int, pattern: NMPattern) -> Tensor:
    """:func:`column_keep_mask` of a compressed weight, one flag per kept value.

    Args:
        values: kept weights (O, K).
        columns: their columns (O, K) int64.
        in_features: I.
        pattern: N:M pattern; O must be divisible by m.

    Returns:
        (O, K) bool, True where the value survives in W^{R,C}; NaN counts as 0.0.
    """
    scores = values.new_full((values.shape[0], in_features), -1.0)
    scores.scatter_(1, columns, _magnitudes(values))
    return top_n(scores, pattern, dim=0).gather(1, columns)


def transposable_keep_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """N:M mask along d_in and d_out at once that keeps the largest total magnitude.

    Exact: in each m x m tile all masks whose rows and columns hold n entries are compared, 90 for
    2:4 (Hubara et al., arXiv:2102.08124, section 4; FST, arXiv:2404.01847, section 5).

    Args:
        weight: shape (O, I), any float dtype, without NaN; both divisible by m.
        pattern: N:M pattern, m at most 4.

    Returns:
        keep_mask (O, I) bool, exactly n True per group of m along either dimension; of equal totals
        the first pattern wins.

    Raises:
        ValueError: if m is above 4, or does not divide O or I, or the weight holds NaN.
    """
    rows, columns = weight.shape
    _check_divides(columns, pattern, "in_features")
    _check_divides(rows, pattern, "out_features")
    _check_no_nan(weight)
    table = _transposable_tiles(pattern).to(weight.device)
    m = pattern.m
    magnitudes = weight.detach().abs().double()
    infinite = magnitudes.isinf()
    # Infinity times a zero of the table is NaN; this outweighs all that is finite of a tile, too.
    largest = magnitudes.masked_fill(infinite, 0.0).max()
    magnitudes = torch.where(infinite, m * m * (largest + 1), magnitudes)
    tiles = magnitudes.view(rows // m, m, columns // m, m)
    tiles = tiles.transpose(1, 2).reshape(-1, m * m)
    best = torch.cat([(part @ table.t()).argmax(1) for part in tiles.split(_TILES_AT_ONCE)])
    chosen = table[best].bool().view(rows // m, columns // m, m, m)
    return chosen.transpose(1, 2).reshape(rows, columns)


@functools.cache
def _transposable_tiles(pattern: NMPattern) -> Tensor:
    """All m x m masks with n entries in each row and column, (count, m*m) float64."""
    if pattern.m > 4:
        raise ValueError(
            f"a transposable mask of pattern {pattern} has too many tiles to compare; use a "
            "pattern with m up to 4, for example 2:4."
        )
    one_row = [
        tuple(int(i in kept) for i in range(pattern.m))
        for kept in itertools.combinations(range(pattern.m), pattern.n)
    ]
    tiles = [
        rows
        for rows in itertools.product(one_row, repeat=pattern.m)
        if all(sum(column) == pattern.n for column in zip(*rows, strict=True))
    ]
    return torch.tensor(tiles, dtype=torch.float64).flatten(1)
