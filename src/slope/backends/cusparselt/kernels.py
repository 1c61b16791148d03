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
def _load_row(values, metadata, row, column_group, width, kept):
    """Of one row: the two kept values of each group of four columns, and their positions."""
    pair = tl.arange(0, 2)[None, None, :]
    at = row[:, None, None] * kept + 2 * column_group[None, :, None] + pair
    first, second = tl.split(tl.load(values + at))
    byte = tl.load(metadata + row[:, None] * width + column_group[None, :] // 2).to(tl.int32)
    nibble = (byte >> (column_group % 2 * 4)[None, :]) & 15
    return first, second, nibble & 3, nibble >> 2


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
def _low_rank_kernel(
    x,
    down,
    up,
    y,
    scale,
    tokens,
    in_features,
    out_features,
    rank,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: BLOCK_T tokens, all of the rank, all outputs."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    low = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x_TI = tl.load(
            x + t[:, None] * in_features + i[None, :],
            mask=(t[:, None] < tokens) & (i[None, :] < in_features),
            other=0.0,
        )
        down_IR = tl.load(
            down + r[None, :] * in_features + i[:, None],
            mask=(r[None, :] < rank) & (i[:, None] < in_features),
            other=0.0,
        )
        low = tl.dot(x_TI, down_IR, low)
    low_TR = low.to(y.dtype.element_ty)
    for start in range(0, out_features, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        up_RO = tl.load(
            up + o[None, :] * rank + r[:, None],
            mask=(r[:, None] < rank) & (o[None, :] < out_features),
            other=0.0,
        )
        y_TO = tl.dot(low_TR, up_RO) * scale
        tl.store(
            y + t[:, None] * out_features + o[None, :],
            y_TO.to(y.dtype.element_ty),
            mask=(t[:, None] < tokens) & (o[None, :] < out_features),
        )


_low_rank = Launcher(_low_rank_kernel)


def low_rank(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The adapter's term ``scale * (X downᵀ) upᵀ`` in one launch, to be the C of beta * C.

    Args:
        x: (T, I), contiguous, bf16 or fp16.
        down: (R, I), contiguous, same dtype, R up to 256.
        up: (O, R), contiguous, same dtype.
        scale: factor.

    Returns:
        (T, O), dtype of ``x``; X downᵀ is rounded to it as two products would. Moves X and the
        result once, and down and up once per program, from the L2.
    """
    tokens, in_features = x.shape
    out_features, rank = up.shape
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    # 132 programs fill an H100; fewer tokens each where there are not enough.
    block_t = 64 if tokens >= 64 * 132 else 32 if tokens >= 32 * 132 else 16
    block_r = max(16, triton.next_power_of_2(rank))
    block = 64 if block_r <= 64 else 32
    numbers = (scale, tokens, in_features, out_features, rank)
    constants = (block_t, 2 * block, 2 * block, block_r)
    _low_rank((-(-tokens // block_t), 1, 1), (x, down, up, y), numbers, constants)
    return y


@triton.jit
def _compress_column(v0, v1, v2, v3, a0, a1, a2, a3):
    """Two slots of a group of four rows with at most two survivors, as one word; their positions.

    The library's own rule for empty slots: (2, 3), and a lone survivor of the last row comes
    second, since positions ascend.
    """
    first_place = tl.where(a0, 0, tl.where(a1, 1, 2))
    first = tl.where(a0, v0, tl.where(a1, v1, tl.where(a2, v2, 0)))
    middle = a2 & (a0 | a1)
    second_place = tl.where(a3, 3, tl.where(middle, 2, tl.where(a0 & a1, 1, 3)))
    second = tl.where(a3, v3, tl.where(middle, v2, tl.where(a0 & a1, v1, 0)))
    return first | (second << 16), first_place | (second_place << 2)


@triton.jit
def _load_survivors(
    values, metadata, column_mask, row, column_group, width, kept, mask_width, dtype: tl.constexpr
):
    """:func:`_load_row` as bits of ``dtype``; who does not survive has a position of no column."""
    first, second, p, q = _load_row(values, metadata, row, column_group, width, kept)
    at = row[:, None] * mask_width + column_group[None, :] // 4
    bits = tl.load(column_mask + at).to(tl.int32) >> (column_group % 4 * 2)[None, :]
    p, q = tl.where((bits & 1) != 0, p, 4), tl.where((bits & 2) != 0, q, 4)
    first = first.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    second = second.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first, second, p, q


@triton.jit
def _transpose_columns(
    values,
    metadata,
    column_mask,
    target,
    row_group,
    column_group,
    out_features,
    in_features,
):
    """Write the slots of four columns per group; return their positions, a byte per column."""
    width, kept, mask_width = in_features // 8, in_features // 2, in_features // 16
    dtype: tl.constexpr = target.dtype.element_ty
    row = 4 * row_group
    f0, s0, p0, q0 = _load_survivors(
        values, metadata, column_mask, row, column_group, width, kept, mask_width, dtype
    )
    f1, s1, p1, q1 = _load_survivors(
        values, metadata, column_mask, row + 1, column_group, width, kept, mask_width, dtype
    )
    f2, s2, p2, q2 = _load_survivors(
        values, metadata, column_mask, row + 2, column_group, width, kept, mask_width, dtype
    )
    f3, s3, p3, q3 = _load_survivors(
        values, metadata, column_mask, row + 3, column_group, width, kept, mask_width, dtype
    )
    words = target.to(tl.pointer_type(tl.int32))
    places = tl.zeros_like(p0)
    for column in tl.static_range(4):
        v0, a0 = _entry(f0, s0, p0, q0, column)
        v1, a1 = _entry(f1, s1, p1, q1, column)
        v2, a2 = _entry(f2, s2, p2, q2, column)
        v3, a3 = _entry(f3, s3, p3, q3, column)
        word, nibble = _compress_column(v0, v1, v2, v3, a0, a1, a2, a3)
        target_row = (4 * column_group + column)[:, None] * (out_features // 4)
        tl.store(words + target_row + row_group[None, :], tl.trans(word))
        places |= nibble << (8 * column)
    return places


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
    """One program: 64 columns of W^R by ROW_GROUPS groups of four rows, transposed, compressed."""
    row_group = tl.program_id(1) * ROW_GROUPS + tl.arange(0, ROW_GROUPS)
    # Rows of the transposed operand that are 8 apart share a byte of its metadata: the column
    # groups whose bit 1 is clear, and their partners.
    eighth = tl.arange(0, 8)
    column_group = tl.program_id(0) * 16 + ((eighth & 1) | ((eighth & 6) << 1))
    low = _transpose_columns(
        values, metadata, column_mask, target, row_group, column_group, out_features, in_features
    )
    high = _transpose_columns(
        values,
        metadata,
        column_mask,
        target,
        row_group,
        column_group + 2,
        out_features,
        in_features,
    )
    both = low | (high << 4)

    tail = (target + out_features // 2 * in_features).to(tl.pointer_type(tl.uint8))
    g = row_group[:, None]
    place = ((g >> 2) & 1) | ((g & 1) << 1) | (((g >> 1) & 1) << 2) | (((g >> 3) & 1) << 8)
    place += ((eighth & 1) << 5)[None, :] | ((eighth >> 1) << 6)[None, :]
    tile = (tl.program_id(0) * (out_features // 64) + g // 16) * 512
    for column in tl.static_range(4):
        byte = ((both >> (8 * column)) & 255).to(tl.uint8)
        tl.store(tail + tile + place + (column << 3), byte)


_pack_columns = Launcher(_pack_columns_kernel)


def pack_columns(
    values: Tensor, metadata: Tensor, column_mask: Tensor, dtype: torch.dtype
) -> Tensor:
    """The library's operand of the transposed W^{R,C}, 2:4 along O, in one launch.

    Args:
        values: (O, I/2), contiguous, any float dtype; cast.
        metadata: (O, I/8) uint8; O and I divisible by 64.
        column_mask: (O, I/16) uint8, at most two survivors of every four rows.
        dtype: of the operand, bf16 or fp16.

    Returns:
        (9/16 * O * I,), an (I, O) operand. Moves the values, both masks and the operand once.
    """
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    packed = torch.empty(packed_numel(in_features, out_features), dtype=dtype, device=values.device)
    row_groups = 8  # and two warps: 2.2 TB/s on an H200 at 4096 x 4096, where 64 groups reach 0.9
    grid = (in_features // 64, out_features // (4 * row_groups), 1)
    tensors = (values, metadata, column_mask, packed)
    _pack_columns(grid, tensors, (out_features, in_features), (row_groups,), num_warps=2)
    return packed


@triton.jit
def _survives(s0, s1, s2, s3):
    """Which of four scores are among the two highest; of equals the upper row wins."""
    g01, g02, g03 = s1 > s0, s2 > s0, s3 > s0
    g12, g13, g23 = s2 > s1, s3 > s1, s3 > s2
    r0 = g01.to(tl.int32) + g02.to(tl.int32) + g03.to(tl.int32)
    r1 = 1 - g01.to(tl.int32) + g12.to(tl.int32) + g13.to(tl.int32)
    r2 = 2 - g02.to(tl.int32) - g12.to(tl.int32) + g23.to(tl.int32)
    r3 = 3 - g03.to(tl.int32) - g13.to(tl.int32) - g23.to(tl.int32)
    return r0 < 2, r1 < 2, r2 < 2, r3 < 2


@triton.jit
def _score(first, second, p, q, column: tl.constexpr):
    return tl.where(p == column, tl.abs(first), tl.where(q == column, tl.abs(second), -1.0))


@triton.jit
def _group_bits(f0, s0, f1, s1, f2, s2, f3, s3, n0, n1, n2, n3):
    """Of a group of four rows and columns: two bits per row, a byte per row, in one word."""
    p0, q0, p1, q1 = n0 & 3, n0 >> 2, n1 & 3, n1 >> 2
    p2, q2, p3, q3 = n2 & 3, n2 >> 2, n3 & 3, n3 >> 2
    bits = tl.zeros_like(n0)
    for column in tl.static_range(4):
        k0, k1, k2, k3 = _survives(
            _score(f0, s0, p0, q0, column),
            _score(f1, s1, p1, q1, column),
            _score(f2, s2, p2, q2, column),
            _score(f3, s3, p3, q3, column),
        )
        bits |= tl.where(k0 & (p0 == column), 1, 0) | tl.where(k0 & (q0 == column), 2, 0)
        bits |= tl.where(k1 & (p1 == column), 1 << 8, 0) | tl.where(k1 & (q1 == column), 2 << 8, 0)
        bits |= tl.where(k2 & (p2 == column), 1 << 16, 0)
        bits |= tl.where(k2 & (q2 == column), 2 << 16, 0)
        bits |= tl.where(k3 & (p3 == column), 1 << 24, 0)
        bits |= tl.where(k3 & (q3 == column), 2 << 24, 0)
    return bits


@triton.jit
def _load_eight(values, metadata, row, byte, inside, kept, mask_width):
    """The eight values of four column groups, and their four nibbles in 16 bits."""
    lane = tl.arange(0, 8)[None, None, :]
    at = row[:, None, None] * kept + 8 * byte[None, :, None] + lane
    eight = tl.load(values + at, mask=inside[None, :, None], other=0.0)
    pairs = tl.reshape(eight, [eight.shape[0], eight.shape[1], 2, 2, 2])
    even, odd = tl.split(pairs)
    f02, f13 = tl.split(even)
    s02, s13 = tl.split(odd)
    f0, f2 = tl.split(f02)
    f1, f3 = tl.split(f13)
    s0, s2 = tl.split(s02)
    s1, s3 = tl.split(s13)
    pointer = metadata.to(tl.pointer_type(tl.uint16)) + row[:, None] * mask_width + byte[None, :]
    nibbles = tl.load(pointer, mask=inside[None, :], other=0).to(tl.int32)
    return f0, s0, f1, s1, f2, s2, f3, s3, nibbles


@triton.jit
def _column_mask_kernel(
    values,
    metadata,
    column_mask,
    in_features,
    ROW_GROUPS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program: 16 x BYTES columns by ROW_GROUPS groups of four rows."""
    kept, width = in_features // 2, in_features // 16
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = byte < width
    row = 4 * (tl.program_id(1) * ROW_GROUPS + tl.arange(0, ROW_GROUPS))
    a0, b0, a1, b1, a2, b2, a3, b3, n0 = _load_eight(
        values, metadata, row, byte, inside, kept, width
    )
    c0, d0, c1, d1, c2, d2, c3, d3, n1 = _load_eight(
        values, metadata, row + 1, byte, inside, kept, width
    )
    e0, g0, e1, g1, e2, g2, e3, g3, n2 = _load_eight(
        values, metadata, row + 2, byte, inside, kept, width
    )
    h0, i0, h1, i1, h2, i2, h3, i3, n3 = _load_eight(
        values, metadata, row + 3, byte, inside, kept, width
    )
    bits = _group_bits(a0, b0, c0, d0, e0, g0, h0, i0, n0 & 15, n1 & 15, n2 & 15, n3 & 15)
    bits |= _group_bits(
        a1, b1, c1, d1, e1, g1, h1, i1,
        (n0 >> 4) & 15, (n1 >> 4) & 15, (n2 >> 4) & 15, (n3 >> 4) & 15,
    ) << 2  # fmt: skip
    bits |= _group_bits(
        a2, b2, c2, d2, e2, g2, h2, i2,
        (n0 >> 8) & 15, (n1 >> 8) & 15, (n2 >> 8) & 15, (n3 >> 8) & 15,
    ) << 4  # fmt: skip
    bits |= _group_bits(a3, b3, c3, d3, e3, g3, h3, i3, n0 >> 12, n1 >> 12, n2 >> 12, n3 >> 12) << 6
    at = column_mask + row[:, None] * width + byte[None, :]
    for k in tl.static_range(4):
        tl.store(at + k * width, ((bits >> (8 * k)) & 255).to(tl.uint8), mask=inside[None, :])


_column_mask = Launcher(_column_mask_kernel)


def select_column_mask(values: Tensor, metadata: Tensor, out: Tensor | None = None) -> Tensor:
    """The column mask by magnitude, bit for bit that of :func:`slope.masks.survivors`.

    Args:
        values: (O, I/2), contiguous, ranked in their own dtype; O divisible by 4, I by 16.
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
    row_groups = next(g for g in (4, 2, 1) if rows // 4 % g == 0)
    grid = (-(-in_features // 512), rows // (4 * row_groups), 1)
    _column_mask(grid, (values, metadata, column_mask), (in_features,), (row_groups, 32))
    return column_mask


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
