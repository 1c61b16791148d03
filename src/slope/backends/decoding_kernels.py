"""Y for a few tokens: W^R is read once, compressed, and expanded in registers.

A word is 32 bits of metadata: 8 groups, 16 kept values, 32 columns. O = outputs of a tile, T =
tokens, I = inputs of a step. Along the first axis of the grid stand the tiles of W^R, then those of
the adapter's down; along the second the splits of I. ``partial`` and ``low_partial`` are (splits,
T, O) and (low_splits, T, R) in fp32; here both are split alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slope.backends.launch import Launcher

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # Triton before 3.4
    gdc_wait = None
CAN_BEGIN_EARLY = gdc_wait is not None
"""Whether this Triton has programmatic dependent launch."""


@triton.jit
def _dot(a, b, accumulator):
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _load_words(metadata, o, start, out_features, in_features, BLOCK_I: tl.constexpr):
    """(O, words): 32 bits of metadata for every 32 columns."""
    w = start // 32 + tl.arange(0, BLOCK_I // 32)
    return tl.load(
        metadata.to(tl.pointer_type(tl.int32))
        + o.to(tl.int64)[:, None] * (in_features // 32)
        + w[None, :],
        mask=(o < out_features)[:, None] & (w < in_features // 32)[None, :],
        other=0,
    )


@triton.jit
def _load_pairs(
    values,
    metadata,
    o,
    start,
    out_features,
    in_features,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """First and second kept value and the nibble of each group: (O, words, 8)."""
    words: tl.constexpr = BLOCK_I // 32
    k = start // 2 + tl.arange(0, 16 * words)
    flat = tl.load(
        values + o.to(tl.int64)[:, None] * (in_features // 2) + k[None, :],
        mask=(o < out_features)[:, None] & (k < in_features // 2)[None, :],
        other=0.0,
    )
    word = _load_words(metadata, o, start, out_features, in_features, BLOCK_I)
    nibble = (word[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    first, second = tl.split(tl.reshape(flat, [BLOCK_O, words, 8, 2]))
    return first, second, nibble


@triton.jit
def _permute(a, b, selector, ASSEMBLY: tl.constexpr):
    """Four bytes of a word, each chosen by a nibble of the selector among the eight of a and b.

    The GPU has an instruction for it, Triton has not.
    """
    if ASSEMBLY:
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        eight = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
        chosen = ((eight >> (8 * (selector & 7))) & 255).to(tl.int32)
        chosen |= ((eight >> (8 * ((selector >> 4) & 7))) & 255).to(tl.int32) << 8
        chosen |= ((eight >> (8 * ((selector >> 8) & 7))) & 255).to(tl.int32) << 16
        chosen |= ((eight >> (8 * ((selector >> 12) & 7))) & 255).to(tl.int32) << 24
    return chosen


@triton.jit
def _choose_bytes(codes, UPPER: tl.constexpr, LOWER: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Of four groups, a byte each: what a table of eight says to their codes."""
    zero = tl.zeros_like(codes)
    return _permute(zero + LOWER, zero + UPPER, codes, ASSEMBLY)


@triton.jit
def _load_expanded(
    values,
    metadata,
    o,
    start,
    out_features,
    in_features,
    dtype: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The dense (O, I) tile of a step."""
    if values.dtype.element_ty == dtype and dtype.primitive_bitwidth == 16:
        words: tl.constexpr = BLOCK_I // 32
        k = start // 4 + tl.arange(0, 8 * words)
        flat = tl.load(
            values.to(tl.pointer_type(tl.int32))
            + o.to(tl.int64)[:, None] * (in_features // 4)
            + k[None, :],
            mask=(o < out_features)[:, None] & (k < in_features // 4)[None, :],
            other=0,
        )
        pair = tl.reshape(flat, [BLOCK_O, words, 8])
        word = _load_words(metadata, o, start, out_features, in_features, BLOCK_I)
        # A code of three bits tells the six pairs of places apart: 01 6, 02 4, 03 2, 12 5, 13 3,
        # 23 1. A table says for each column which bytes of the pair stand in it: 10, 32, or 44,
        # which are zeros.
        codes = (word ^ ((word >> 1) & 0x7FFFFFFF)) & 0x77777777
        lane = tl.arange(0, 8)[None, None, :]
        four = tl.where(lane < 4, codes[:, :, None], (codes >> 16)[:, :, None])
        c0 = _choose_bytes(four, 0x44104410, 0x44104444, ASSEMBLY)
        c1 = _choose_bytes(four, 0x44321044, 0x10444444, ASSEMBLY)
        c2 = _choose_bytes(four, 0x44443232, 0x44441044, ASSEMBLY)
        c3 = _choose_bytes(four, 0x44444444, 0x32323244, ASSEMBLY)
        this = (lane & 3) * 0x11 + 0x40
        zero = tl.zeros_like(pair)
        low = _permute(pair, zero, _permute(c0, c1, this + zero, ASSEMBLY), ASSEMBLY)
        high = _permute(pair, zero, _permute(c2, c3, this + zero, ASSEMBLY), ASSEMBLY)
        e0 = low.to(tl.int16).to(dtype, bitcast=True)
        e1 = (low >> 16).to(tl.int16).to(dtype, bitcast=True)
        e2 = high.to(tl.int16).to(dtype, bitcast=True)
        e3 = (high >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        first, second, nibble = _load_pairs(
            values, metadata, o, start, out_features, in_features, BLOCK_O, BLOCK_I
        )
        first, second = first.to(dtype), second.to(dtype)
        p, q, none = nibble & 3, nibble >> 2, tl.zeros_like(first)
        e0 = tl.where(p == 0, first, none)
        e1 = tl.where(p == 1, first, tl.where(q == 1, second, none))
        e2 = tl.where(p == 2, first, tl.where(q == 2, second, none))
        e3 = tl.where(q == 3, second, none)
    # join puts its axis innermost: ((0, 2), (1, 3)) reads 0 1 2 3.
    return tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [BLOCK_O, BLOCK_I])


@triton.jit
def _pick(x0, x1, x2, x3, place):
    """Of four inputs the one at a place."""
    odd = (place & 1) != 0
    return tl.where((place & 2) != 0, tl.where(odd, x3, x2), tl.where(odd, x1, x0))


@triton.jit
def _load_down(down, r, i, rank, in_features, stop):
    return tl.load(
        down + r.to(tl.int64)[:, None] * in_features + i[None, :],
        mask=(r < rank)[:, None] & (i < stop)[None, :],
        other=0.0,
    )


@triton.jit
def _store(
    y,
    partial,
    bias,
    sums_TO,
    t,
    o,
    tokens,
    out_features,
    HAS_BIAS: tl.constexpr,
    FINAL: tl.constexpr,
):
    """The result where nothing is to be added, else a partial sum of this split."""
    inside = (t < tokens)[:, None] & (o < out_features)[None, :]
    if FINAL:
        if HAS_BIAS:
            b_O = tl.load(bias + o, mask=o < out_features, other=0.0)
            sums_TO += b_O.to(tl.float32)[None, :]
        at = y + t[:, None] * out_features + o[None, :]
        tl.store(at, sums_TO.to(y.dtype.element_ty), mask=inside)
    else:
        at = partial + (tl.program_id(1) * tokens + t)[:, None] * out_features + o[None, :]
        tl.store(at, sums_TO, mask=inside)


@triton.jit
def _few_kernel(
    x,
    values,
    metadata,
    bias,
    down,
    y,
    partial,
    low_partial,
    tokens,
    out_features,
    in_features,
    rank,
    x_stride,
    span,
    HAS_BIAS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A token or two: every kept value is multiplied with the input that stands at its place."""
    words: tl.constexpr = BLOCK_I // 32
    tile, tiles = tl.program_id(0), tl.cdiv(out_features, BLOCK_O)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, in_features)
    t = tl.arange(0, BLOCK_T)
    inside_t = (t < tokens)[:, None]
    if tile < tiles:
        o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = tl.zeros([BLOCK_T, BLOCK_O, words, 8], dtype=tl.float32)
        for start in tl.range(first, stop, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            x_TI = tl.load(
                x + t[:, None] * x_stride + i[None, :],
                mask=inside_t & (i < stop)[None, :],
                other=0.0,
            ).to(tl.float32)
            even, odd = tl.split(tl.reshape(x_TI, [BLOCK_T, 1, words, 8, 2, 2]))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            v, u, nibble = _load_pairs(
                values, metadata, o, start, out_features, in_features, BLOCK_O, BLOCK_I
            )
            v = v.to(x.dtype.element_ty).to(tl.float32)[None, :, :, :]
            u = u.to(x.dtype.element_ty).to(tl.float32)[None, :, :, :]
            nibble = nibble[None, :, :, :]
            sums += v * _pick(x0, x1, x2, x3, nibble & 3)
            sums += u * _pick(x0, x1, x2, x3, nibble >> 2)
        sums_TO = tl.sum(tl.reshape(sums, [BLOCK_T, BLOCK_O, words * 8]), axis=2)
        _store(y, partial, bias, sums_TO, t, o, tokens, out_features, HAS_BIAS, FINAL)
    elif HAS_ADAPTER:
        r = (tile - tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
        low = tl.zeros([BLOCK_T, BLOCK_O, BLOCK_I], dtype=tl.float32)
        for start in tl.range(first, stop, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            x_TI = tl.load(
                x + t[:, None] * x_stride + i[None, :],
                mask=inside_t & (i < stop)[None, :],
                other=0.0,
            )
            down_RI = _load_down(down, r, i, rank, in_features, stop)
            low += x_TI.to(tl.float32)[:, None, :] * down_RI.to(tl.float32)[None, :, :]
        _store(y, low_partial, bias, tl.sum(low, axis=2), t, r, tokens, rank, False, False)


@triton.jit
def _many_kernel(
    x,
    values,
    metadata,
    bias,
    down,
    y,
    partial,
    low_partial,
    tokens,
    out_features,
    in_features,
    rank,
    x_stride,
    span,
    HAS_BIAS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """More tokens: the expanded tile goes through the tensor cores."""
    tile, tiles = tl.program_id(0), tl.cdiv(out_features, BLOCK_O)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, in_features)
    t = tl.arange(0, BLOCK_T)
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    if tile < tiles:
        o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        for start in tl.range(first, stop, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            x_IT = tl.load(
                x + t[None, :] * x_stride + i[:, None],
                mask=(t < tokens)[None, :] & (i < stop)[:, None],
                other=0.0,
            )
            w_OI = _load_expanded(
                values, metadata, o, start, out_features, in_features,
                x.dtype.element_ty, BLOCK_O, BLOCK_I, ASSEMBLY,
            )  # fmt: skip
            sums_OT = _dot(w_OI, x_IT, sums_OT)
        _store(y, partial, bias, tl.trans(sums_OT), t, o, tokens, out_features, HAS_BIAS, FINAL)
    elif HAS_ADAPTER:
        r = (tile - tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
        for start in tl.range(first, stop, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            x_IT = tl.load(
                x + t[None, :] * x_stride + i[:, None],
                mask=(t < tokens)[None, :] & (i < stop)[:, None],
                other=0.0,
            )
            down_RI = _load_down(down, r, i, rank, in_features, stop)
            sums_OT = _dot(down_RI, x_IT, sums_OT)
        _store(y, low_partial, bias, tl.trans(sums_OT), t, r, tokens, rank, False, False)


@triton.jit
def _finish_kernel(
    partial,
    low_partial,
    up,
    bias,
    y,
    tokens,
    out_features,
    rank,
    splits,
    low_splits,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Y = sum of the splits + bias + scale * Z upᵀ, the splits always in the same order."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_t, inside_o = (t < tokens)[:, None], (o < out_features)[None, :]
    y_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if EARLY:
        gdc_wait()  # until the kernel ahead has written the sums
    for split in range(splits):
        at = partial + (split * tokens + t)[:, None] * out_features + o[None, :]
        y_TO += tl.load(at, mask=inside_t & inside_o, other=0.0)
    if HAS_ADAPTER:
        term_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            low_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for split in range(low_splits):
                at = low_partial + (split * tokens + t)[:, None] * rank + r[None, :]
                low_TR += tl.load(at, mask=inside_t & (r < rank)[None, :], other=0.0)
            up_RO = tl.load(
                up + o[None, :] * rank + r[:, None], mask=inside_o & (r < rank)[:, None], other=0.0
            )
            term_TO = _dot(low_TR.to(up.dtype.element_ty), up_RO, term_TO)
        y_TO += scale * term_TO
    if HAS_BIAS:
        b_O = tl.load(bias + o, mask=o < out_features, other=0.0)
        y_TO += b_O.to(tl.float32)[None, :]
    at = y + t[:, None] * out_features + o[None, :]
    tl.store(at, y_TO.to(y.dtype.element_ty), mask=inside_t & inside_o)


few = Launcher(_few_kernel)
many = Launcher(_many_kernel)
finish = Launcher(_finish_kernel)
