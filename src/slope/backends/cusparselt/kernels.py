"""Triton kernels around cuSPARSELt: from our compressed weight to the operand that it multiplies.

All of them are copies that permute on the way, so the floor is the bytes moved; none makes an index
tensor. O = d_out, I = d_in; values (O, I/2), metadata (O, I/8). Plain torch references stand in
:mod:`.layout` and :mod:`slope.compressed`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope.backends.cusparselt.layout import packed_numel
from slope.backends.launch import Launcher


@triton.jit
def _pack_rows_kernel(values, metadata, target, out_features, in_features, TILES: tl.constexpr):
    """One program: TILES tiles of 64 rows by 64 columns, one beside the other."""
    width, kept, tiles_per_row = in_features // 8, in_features // 2, in_features // 64
    row_tile, first_tile = tl.program_id(0), tl.program_id(1) * TILES

    row = row_tile * 64 + tl.arange(0, 64)
    column = first_tile * 32 + tl.arange(0, 32 * TILES)
    at = row[:, None] * kept + column[None, :]
    inside = (column < kept)[None, :]
    value = tl.load(values + at, mask=inside, other=0.0)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=inside)

    tile = first_tile + tl.arange(0, TILES)[:, None]
    place = tl.arange(0, 512)[None, :]
    # Bits of a byte's place, lowest first: group 4, 1, 2, row 1, 2, 4, 16, 32, group 8.
    group = (
        ((place & 1) << 2)
        | ((place >> 1) & 1)
        | (((place >> 2) & 1) << 1)
        | (((place >> 8) & 1) << 3)
    )
    tile_row = row_tile * 64 + (((place >> 3) & 7) | (((place >> 6) & 3) << 4))
    exists = (tile < tiles_per_row) & (place < 512)
    source = tile_row * width + tile * 8 + (group >> 1)
    shift = (group & 1) * 4
    low = (tl.load(metadata + source, mask=exists, other=0) >> shift) & 15
    high = (tl.load(metadata + source + 8 * width, mask=exists, other=0) >> shift) & 15
    tail = (target + out_features * kept).to(tl.pointer_type(tl.uint8))
    tl.store(tail + (row_tile * tiles_per_row + tile) * 512 + place, low | (high << 4), mask=exists)


_pack_rows = Launcher(_pack_rows_kernel)


def pack_rows(values: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """The library's operand of W^R, 2:4 along I, in one launch.

    Args:
        values: (O, I/2), contiguous, any float dtype; cast.
        metadata: (O, I/8) uint8; O and I divisible by 64.
        dtype: of the operand, bf16 or fp16.

    Returns:
        (9/16 * O * I,). Moves the values, the metadata and the operand once.
    """
    rows, kept = values.shape
    packed = torch.empty(packed_numel(rows, 2 * kept), dtype=dtype, device=values.device)
    grid = (rows // 64, -(-kept // (32 * 4)), 1)
    _pack_rows(grid, (values, metadata, packed), (rows, 2 * kept), (4,))
    return packed


@triton.jit
def _entry(first, second, p, q, column: tl.constexpr):
    """The value at one column of each group, and whether it is kept."""
    is_first, is_second = p == column, q == column
    none = tl.zeros_like(second)
    return tl.where(is_first, first, tl.where(is_second, second, none)), is_first | is_second


@triton.jit
def _expand_kernel(
    values,
    metadata,
    column_mask,
    dense,
    groups,
    SURVIVORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK groups of four: two values and a nibble in, four elements out."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    nibble = (tl.load(metadata + group // 2, mask=inside, other=0) >> ((group % 2) * 4)) & 15
    p, q = nibble & 3, nibble >> 2
    pair = 2 * group[:, None] + tl.arange(0, 2)[None, :]
    first, second = tl.split(tl.load(values + pair, mask=inside[:, None], other=0.0))
    if SURVIVORS:
        bits = tl.load(column_mask + group // 4, mask=inside, other=0) >> ((group % 4) * 2)
        p = tl.where((bits & 1) != 0, p, 4)
        q = tl.where((bits & 2) != 0, q, 4)
    dtype = dense.dtype.element_ty
    first, second = first.to(dtype), second.to(dtype)
    e0, _ = _entry(first, second, p, q, 0)
    e1, _ = _entry(first, second, p, q, 1)
    e2, _ = _entry(first, second, p, q, 2)
    e3, _ = _entry(first, second, p, q, 3)
    # join puts its last axis innermost: ((0, 2), (1, 3)) reads 0 1 2 3.
    four = tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [BLOCK, 4])
    lane = tl.arange(0, 4)[None, :]
    tl.store(dense + 4 * group[:, None] + lane, four.to(dtype), mask=inside[:, None])


_expand = Launcher(_expand_kernel)


def expand(
    values: Tensor, metadata: Tensor, column_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dense W^R, or W^{R,C} where a column mask is given.

    Args:
        values: (O, I/2), contiguous, any float dtype.
        metadata: (O, I/8) uint8.
        column_mask: (O, I/16) uint8 or None; I must be divisible by 16 with one, else by 8.
        dtype: of the result.

    Returns:
        (O, I). Moves the values, the metadata and the result once.
    """
    rows, kept = values.shape
    dense = torch.empty((rows, 2 * kept), dtype=dtype, device=values.device)
    groups = values.numel() // 2
    block = 256
    grid = (-(-groups // block), 1, 1)
    constants = (column_mask is not None, block)
    _expand(grid, (values, metadata, column_mask, dense), (groups,), constants)
    return dense


@triton.jit
def _load_pairs(values, row, chunk, inside, kept):
    """Of each row, the two kept values of four groups of columns: a word of both for each group.

    What one thread needs lies together, so that it is one load, or two of fp32.
    """
    if values.dtype.element_ty.primitive_bitwidth == 32:
        words = values.to(tl.pointer_type(tl.int64))
        at = (row[:, None] * (kept // 2) + 4 * chunk[None, :])[:, :, None]
        two = at + tl.arange(0, 2)[None, None, :]
        mask = inside[None, :, None]
        w0, w1 = tl.split(tl.load(words + two, mask=mask, other=0))
        w2, w3 = tl.split(tl.load(words + two + 2, mask=mask, other=0))
    else:
        words = values.to(tl.pointer_type(tl.int32))
        at = (row[:, None] * (kept // 2) + 4 * chunk[None, :])[:, :, None]
        four = tl.load(words + at + tl.arange(0, 4)[None, None, :], inside[None, :, None], other=0)
        even, odd = tl.split(tl.reshape(four, [four.shape[0], four.shape[1], 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _load_nibbles(metadata, row, chunk, inside, chunks):
    """The positions of those four pairs: two bits for the first, two for the second of each."""
    at = metadata.to(tl.pointer_type(tl.uint16)) + row[:, None] * chunks + chunk[None, :]
    return tl.load(at, mask=inside[None, :], other=0).to(tl.int32)


# Positions ascend, so single bits tell them apart: the first is 1 if its low bit is set and 2 if
# its high bit is; the second is 1 if its high bit is clear and 2 if its low bit is.


@triton.jit
def _magnitudes(pair, nibbles, GROUP: tl.constexpr):
    """Of one group in one row: magnitudes by column, as whole numbers; -1 where pruned."""
    if pair.dtype.primitive_bitwidth == 64:
        first, second = pair.to(tl.int32) & 0x7FFFFFFF, (pair >> 32).to(tl.int32) & 0x7FFFFFFF
    else:
        first, second = pair & 0x7FFF, (pair >> 16) & 0x7FFF
    m0 = tl.where((nibbles & (3 << 4 * GROUP)) == 0, first, -1)
    m1 = tl.where((nibbles & (8 << 4 * GROUP)) == 0, second, -1)
    m1 = tl.where((nibbles & (1 << 4 * GROUP)) != 0, first, m1)
    m2 = tl.where((nibbles & (4 << 4 * GROUP)) == 0, second, -1)
    m2 = tl.where((nibbles & (2 << 4 * GROUP)) != 0, first, m2)
    m3 = tl.where((nibbles & (12 << 4 * GROUP)) == (12 << 4 * GROUP), second, -1)
    return m0, m1, m2, m3


@triton.jit
def _majority(a, b, c):
    return (a & b) | (c & (a | b))


@triton.jit
def _losers(m0, m1, m2, m3):
    """Of four magnitudes in a column: a sign bit for each that two others outrank.

    Of equals the upper row wins. A difference is negative where the lower row outranks the upper.
    """
    d01, d02, d03, d12, d13, d23 = m0 - m1, m0 - m2, m0 - m3, m1 - m2, m1 - m3, m2 - m3
    return (
        _majority(d01, d02, d03),
        _majority(~d01, d12, d13),
        _majority(~d02, ~d12, d23),
        _majority(~d03, ~d13, ~d23),
    )


@triton.jit
def _surviving_bits(l0, l1, l2, l3, nibbles, GROUP: tl.constexpr):
    """Of one group in one row: two bits of its byte, set where a kept value is no loser."""
    low = tl.where((nibbles & (1 << 4 * GROUP)) != 0, l1, l2)
    low = tl.where((nibbles & (3 << 4 * GROUP)) == 0, l0, low)
    high = tl.where((nibbles & (4 << 4 * GROUP)) == 0, l2, l1)
    high = tl.where((nibbles & (12 << 4 * GROUP)) == (12 << 4 * GROUP), l3, high)
    low, high = ~low >> (31 - 2 * GROUP), ~high >> (30 - 2 * GROUP)
    return (low & (1 << 2 * GROUP)) | (high & (2 << 2 * GROUP))


@triton.jit
def _group_bits(w0, w1, w2, w3, n0, n1, n2, n3, GROUP: tl.constexpr):
    """Of a group of four rows and columns: the two bits of each row's byte."""
    a0, a1, a2, a3 = _magnitudes(w0, n0, GROUP)
    b0, b1, b2, b3 = _magnitudes(w1, n1, GROUP)
    c0, c1, c2, c3 = _magnitudes(w2, n2, GROUP)
    d0, d1, d2, d3 = _magnitudes(w3, n3, GROUP)
    a0, b0, c0, d0 = _losers(a0, b0, c0, d0)
    a1, b1, c1, d1 = _losers(a1, b1, c1, d1)
    a2, b2, c2, d2 = _losers(a2, b2, c2, d2)
    a3, b3, c3, d3 = _losers(a3, b3, c3, d3)
    return (
        _surviving_bits(a0, a1, a2, a3, n0, GROUP),
        _surviving_bits(b0, b1, b2, b3, n1, GROUP),
        _surviving_bits(c0, c1, c2, c3, n2, GROUP),
        _surviving_bits(d0, d1, d2, d3, n3, GROUP),
    )


@triton.jit
def _column_mask_kernel(
    values,
    metadata,
    column_mask,
    in_features,
    ROW_GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program: CHUNKS x 16 columns by ROW_GROUPS groups of four rows."""
    kept, chunks = in_features // 2, in_features // 16
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    inside = chunk < chunks
    row = 4 * (tl.program_id(1) * ROW_GROUPS + tl.arange(0, ROW_GROUPS))
    a0, a1, a2, a3 = _load_pairs(values, row, chunk, inside, kept)
    b0, b1, b2, b3 = _load_pairs(values, row + 1, chunk, inside, kept)
    c0, c1, c2, c3 = _load_pairs(values, row + 2, chunk, inside, kept)
    d0, d1, d2, d3 = _load_pairs(values, row + 3, chunk, inside, kept)
    n0 = _load_nibbles(metadata, row, chunk, inside, chunks)
    n1 = _load_nibbles(metadata, row + 1, chunk, inside, chunks)
    n2 = _load_nibbles(metadata, row + 2, chunk, inside, chunks)
    n3 = _load_nibbles(metadata, row + 3, chunk, inside, chunks)
    p0, p1, p2, p3 = _group_bits(a0, b0, c0, d0, n0, n1, n2, n3, 0)
    q0, q1, q2, q3 = _group_bits(a1, b1, c1, d1, n0, n1, n2, n3, 1)
    r0, r1, r2, r3 = _group_bits(a2, b2, c2, d2, n0, n1, n2, n3, 2)
    s0, s1, s2, s3 = _group_bits(a3, b3, c3, d3, n0, n1, n2, n3, 3)
    at, mask = column_mask + row[:, None] * chunks + chunk[None, :], inside[None, :]
    tl.store(at, (p0 | q0 | r0 | s0).to(tl.uint8), mask=mask)
    tl.store(at + chunks, (p1 | q1 | r1 | s1).to(tl.uint8), mask=mask)
    tl.store(at + 2 * chunks, (p2 | q2 | r2 | s2).to(tl.uint8), mask=mask)
    tl.store(at + 3 * chunks, (p3 | q3 | r3 | s3).to(tl.uint8), mask=mask)


_column_mask = Launcher(_column_mask_kernel)


def select_column_mask(values: Tensor, metadata: Tensor, out: Tensor | None = None) -> Tensor:
    """The column mask by magnitude, bit for bit that of :func:`slope.masks.survivors`.

    Args:
        values: (O, I/2), contiguous, fp32, bf16 or fp16, ranked in their own dtype; O divisible by
            4, I by 16.
        metadata: (O, I/8) uint8.
        out: (O, I/16) uint8 to write to, or None.

    Returns:
        (O, I/16) uint8. Moves the values, the metadata and the mask once.
    """
    rows, kept = values.shape
    in_features = 2 * kept
    column_mask = out
    if column_mask is None:
        size = (rows, in_features // 16)
        column_mask = torch.empty(size, dtype=torch.uint8, device=values.device)
    row_groups = 1 if rows // 4 % 2 else 2
    chunks, num_warps = (32, 2) if values.itemsize == 4 else (16, 1)
    grid = (-(-in_features // (16 * chunks)), rows // (4 * row_groups), 1)
    tensors = (_aligned(values), metadata, column_mask)
    _column_mask(grid, tensors, (in_features,), (row_groups, chunks), num_warps)
    return column_mask


def _aligned(values: Tensor) -> Tensor:
    """Values that can be loaded 16 bytes at a time; a copy of the rare ones that cannot."""
    return values.clone() if values.data_ptr() % 16 else values


@triton.jit
def _survivors_by_column(nibbles, bits):
    """Of one row: words whose bit 4g says whether group g has a survivor in column 0, 1, 2, 3."""
    spread = (bits | (bits << 4)) & 0x0F0F
    spread = (spread | (spread << 2)) & 0x3333
    first, second = spread & 0x1111, (spread >> 1) & 0x1111
    p1, p2, q_low, q_high = nibbles, nibbles >> 1, nibbles >> 2, nibbles >> 3
    return (
        first & ~(p1 | p2),
        (first & p1) | (second & ~q_high),
        (first & p2) | (second & ~q_low),
        second & q_low & q_high,
    )


@triton.jit
def _pair_bits(pair, kind: tl.constexpr, dtype: tl.constexpr):
    """Both values of a word in the operand's dtype, each in the lower half of a word of its own."""
    if pair.dtype.primitive_bitwidth == 32 and kind == dtype:
        first, second = pair, pair >> 16
    else:
        if pair.dtype.primitive_bitwidth == 64:
            first, second = pair.to(tl.int32), (pair >> 32).to(tl.int32)
        else:
            first, second = pair.to(tl.int16), (pair >> 16).to(tl.int16)
        first = first.to(kind, bitcast=True).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        second = second.to(kind, bitcast=True).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    return first, second


@triton.jit
def _in_column(first, second, nibbles, GROUP: tl.constexpr, COLUMN: tl.constexpr):
    """Of one group in one row: the value that is kept in a column, if one is."""
    if COLUMN == 0:
        value = first
    elif COLUMN == 3:
        value = second
    else:
        value = tl.where((nibbles & (COLUMN << 4 * GROUP)) != 0, first, second)
    return value


@triton.jit
def _store_column(target, v0, v1, v2, v3, a, b, c, d, ab, both, GROUP: tl.constexpr):
    """The two slots of a group of four rows with at most two survivors, a word."""
    bit: tl.constexpr = 1 << 4 * GROUP
    first = tl.where((c & bit) != 0, v2, 0)
    first = tl.where((b & bit) != 0, v1, first)
    first = tl.where((a & bit) != 0, v0, first)
    second = tl.where((ab & bit) != 0, v1, 0)
    second = tl.where((both & bit) != 0, v2, second)
    second = tl.where((d & bit) != 0, v3, second)
    tl.store(target, (first & 0xFFFF) | (second << 16))


@triton.jit
def _store_group(
    words, stride, w0, w1, w2, w3, n0, n1, n2, n3,
    planes, kind: tl.constexpr, dtype: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The slots of the four columns of one group, transposed."""
    f0, s0 = _pair_bits(w0, kind, dtype)
    f1, s1 = _pair_bits(w1, kind, dtype)
    f2, s2 = _pair_bits(w2, kind, dtype)
    f3, s3 = _pair_bits(w3, kind, dtype)
    for COLUMN in tl.static_range(4):
        a, b, c, d, ab, both = planes[COLUMN]
        _store_column(
            words + (4 * GROUP + COLUMN) * stride,
            _in_column(f0, s0, n0, GROUP, COLUMN),
            _in_column(f1, s1, n1, GROUP, COLUMN),
            _in_column(f2, s2, n2, GROUP, COLUMN),
            _in_column(f3, s3, n3, GROUP, COLUMN),
            a, b, c, d, ab, both, GROUP,
        )  # fmt: skip


@triton.jit
def _places(a, b, ab, both):
    """The positions of both slots of one column, a nibble per group.

    The library's own rule for empty slots: (2, 3), and a lone survivor of the last row comes
    second, since positions ascend.
    """
    first = (b & ~a) | ((~(a | b) & 0x1111) << 1)
    second = (~both & 0x1111) | ((~ab & 0x1111) << 1)
    return first | (second << 2)


@triton.jit
def _pack_columns_kernel(
    values,
    metadata,
    column_mask,
    target,
    out_features,
    in_features,
    ROW_GROUPS: tl.constexpr,
):
    """One program: 64 columns of W^R by ROW_GROUPS groups of four rows, transposed, compressed.

    A thread has four rows by 16 columns and needs nothing of the others.
    """
    kept, chunks = in_features // 2, in_features // 16
    kind: tl.constexpr = values.dtype.element_ty
    dtype: tl.constexpr = target.dtype.element_ty
    group = tl.program_id(1) * ROW_GROUPS + tl.arange(0, ROW_GROUPS)
    quarter = tl.arange(0, 4)
    chunk, row = tl.program_id(0) * 4 + quarter, 4 * group
    inside = chunk < chunks
    a0, a1, a2, a3 = _load_pairs(values, row, chunk, inside, kept)
    b0, b1, b2, b3 = _load_pairs(values, row + 1, chunk, inside, kept)
    c0, c1, c2, c3 = _load_pairs(values, row + 2, chunk, inside, kept)
    d0, d1, d2, d3 = _load_pairs(values, row + 3, chunk, inside, kept)
    n0 = _load_nibbles(metadata, row, chunk, inside, chunks)
    n1 = _load_nibbles(metadata, row + 1, chunk, inside, chunks)
    n2 = _load_nibbles(metadata, row + 2, chunk, inside, chunks)
    n3 = _load_nibbles(metadata, row + 3, chunk, inside, chunks)
    at = column_mask + row[:, None] * chunks + chunk[None, :]
    p0, p1, p2, p3 = _survivors_by_column(n0, tl.load(at).to(tl.int32))
    q0, q1, q2, q3 = _survivors_by_column(n1, tl.load(at + chunks).to(tl.int32))
    r0, r1, r2, r3 = _survivors_by_column(n2, tl.load(at + 2 * chunks).to(tl.int32))
    s0, s1, s2, s3 = _survivors_by_column(n3, tl.load(at + 3 * chunks).to(tl.int32))
    # Columns of a survivor each in rows 0 to 3; in rows 0 and 1; in row 2 and one above it.
    planes = (
        (p0, q0, r0, s0, p0 & q0, r0 & (p0 | q0)),
        (p1, q1, r1, s1, p1 & q1, r1 & (p1 | q1)),
        (p2, q2, r2, s2, p2 & q2, r2 & (p2 | q2)),
        (p3, q3, r3, s3, p3 & q3, r3 & (p3 | q3)),
    )
    stride = out_features // 4
    # Words of neighbouring threads lie together, and are stored by the threads that made them.
    across = group[:, None] + (16 * chunk)[None, :] * stride
    words = target.to(tl.pointer_type(tl.int32)) + tl.max_contiguous(across, [1, 1])
    _store_group(words, stride, a0, b0, c0, d0, n0, n1, n2, n3, planes, kind, dtype, 0)
    _store_group(words, stride, a1, b1, c1, d1, n0, n1, n2, n3, planes, kind, dtype, 1)
    _store_group(words, stride, a2, b2, c2, d2, n0, n1, n2, n3, planes, kind, dtype, 2)
    _store_group(words, stride, a3, b3, c3, d3, n0, n1, n2, n3, planes, kind, dtype, 3)

    # Rows of the transposed operand that are 8 apart share a byte: groups 0 and 2, 1 and 3.
    tail = (target + out_features // 2 * in_features).to(tl.pointer_type(tl.uint8))
    tile = (tl.program_id(0) * (out_features // 64) + group // 16) * 512
    place = ((group >> 2) & 1) | ((group & 1) << 1) | (((group >> 1) & 1) << 2)
    place += ((group >> 3) & 1) << 8
    tail += (tile + place)[:, None] + (quarter << 6)[None, :]
    for COLUMN in tl.static_range(4):
        a, b, c, d, ab, both = planes[COLUMN]
        nibbles = _places(a, b, ab, both)
        even, odd = (nibbles & 15) | ((nibbles >> 4) & 240), (nibbles >> 4) & 15
        tl.store(tail + (COLUMN << 3), even.to(tl.uint8))
        tl.store(tail + (COLUMN << 3) + 32, (odd | ((nibbles >> 8) & 240)).to(tl.uint8))


_pack_columns = Launcher(_pack_columns_kernel)


def pack_columns(
    values: Tensor, metadata: Tensor, column_mask: Tensor, dtype: torch.dtype
) -> Tensor:
    """The library's operand of the transposed W^{R,C}, 2:4 along O, in one launch.

    Args:
        values: (O, I/2), contiguous, fp32, bf16 or fp16; cast.
        metadata: (O, I/8) uint8; O and I divisible by 64.
        column_mask: (O, I/16) uint8, at most two survivors of every four rows.
        dtype: of the operand, bf16 or fp16.

    Returns:
        (9/16 * O * I,), an (I, O) operand. Moves the values, both masks and the operand once.
    """
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    packed = torch.empty(packed_numel(in_features, out_features), dtype=dtype, device=values.device)
    row_groups = 8  # one warp, and a thread for each of its 8 x 4 tiles of 4 rows by 16 columns
    grid = (in_features // 64, out_features // (4 * row_groups), 1)
    tensors = (_aligned(values), metadata, column_mask, packed)
    _pack_columns(grid, tensors, (out_features, in_features), (row_groups,), num_warps=1)
    return packed


@triton.jit
def _gather_kernel(
    dense, metadata, values_gradient, groups, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK groups of four: four elements and a nibble in, two out."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    nibble = (tl.load(metadata + group // 2, mask=inside, other=0) >> ((group % 2) * 4)) & 15
    lane = tl.arange(0, 2)[None, :]
    place = (nibble[:, None] >> (2 * lane)) & 3
    value = tl.load(dense + 4 * group[:, None] + place, mask=inside[:, None], other=0.0)
    at = values_gradient + 2 * group[:, None] + lane
    value = value.to(values_gradient.dtype.element_ty)
    if ACCUMULATE:
        value += tl.load(at, mask=inside[:, None], other=0.0)
    tl.store(at, value, mask=inside[:, None])


_gather = Launcher(_gather_kernel)


def gather_gradient(
    dense: Tensor, metadata: Tensor, dtype: torch.dtype, accumulate_into: Tensor | None = None
) -> Tensor:
    """The kept entries of a dense ∇W.

    Args:
        dense: (O, I), contiguous, any float dtype; I divisible by 8.
        metadata: (O, I/8) uint8.
        dtype: of the result.
        accumulate_into: (O, I/2) of that dtype to add to, or None.

    Returns:
        (O, I/2); ``accumulate_into`` if given. Moves ∇W, the metadata and the result once.
    """
    rows, columns = dense.shape
    out = accumulate_into
    if out is None:
        out = torch.empty((rows, columns // 2), dtype=dtype, device=dense.device)
    groups = dense.numel() // 4
    block = 1024
    constants = (accumulate_into is not None, block)
    _gather((-(-groups // block), 1, 1), (dense, metadata, out), (groups,), constants)
    return out
