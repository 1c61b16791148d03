"""Run by test_kernels.py with TRITON_INTERPRET=1: each kernel against its plain torch reference."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from fake_cusparselt import unpack

import slope
from slope import selection
from slope.backends import DenseBackend, decoding, decoding_kernels, dispatch, get_backend, ops
from slope.backends.cusparselt import kernels, layout
from slope.backends.decoding import DecodeLaunch
from slope.backends.launch import Launcher
from slope.backends.tuning import Choice
from slope.compressed import column_indices, compress, decompress, pack_bits
from slope.masks import column_keep_mask, row_keep_mask, top_n

PATTERN = slope.NMPattern(2, 4)
# fp32 values that fp16 holds exactly: the interpreter rounds otherwise than a GPU.
SHAPES = [(64, 64), (128, 320), (256, 128)]
DTYPES = [torch.float32, torch.float16]


def weights(shape, dtype):
    dense = torch.randn(shape).half().float()
    row = row_keep_mask(dense, PATTERN)
    values, metadata = compress(dense.to(dtype), row, PATTERN)
    column = column_keep_mask(dense * row, row, PATTERN)
    bits = pack_bits(column[row].view(shape[0], -1))
    return values, metadata, bits, dense * row, dense * column


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def pack_rows():
    for shape in SHAPES:
        for dtype in DTYPES:
            values, metadata, *_ = weights(shape, dtype)
            packed = kernels.pack_rows(values, metadata, torch.float16)
            same(packed, layout.pack(values.half(), metadata))


def pack_columns():
    for shape in SHAPES:
        for dtype in DTYPES:
            values, metadata, bits, _, w_rc = weights(shape, dtype)
            packed = kernels.pack_columns(values, metadata, bits, torch.float16)
            same(unpack(packed, shape[1], shape[0]).float(), w_rc.t().contiguous())


def select_column_mask():
    # Of one and of several programs along O and I, in pairs of groups of rows and alone.
    for shape in [(64, 64), (32, 320), (16, 544), (12, 48), (4, 16)]:
        for dtype in DTYPES:
            values, metadata, bits, *_ = weights(shape, dtype)
            same(kernels.select_column_mask(values, metadata), bits)
            # Many equal magnitudes, and kept zeros: the upper row wins, and they outrank pruned.
            ties = (values * 2).round() / 2
            dense = decompress(ties, metadata, PATTERN, shape[1])
            row = slope.compressed.keep_mask_from_metadata(metadata, PATTERN, shape[1])
            column = column_keep_mask(dense, row, PATTERN)
            out = torch.empty_like(bits)
            kernels.select_column_mask(ties, metadata, out)
            same(out, pack_bits(column[row].view(shape[0], -1)))


def expand():
    for shape in [*SHAPES, (4, 48)]:
        values, metadata, bits, w_r, w_rc = weights(shape, torch.float32)
        same(kernels.expand(values, metadata, None, torch.float32), w_r)
        same(kernels.expand(values, metadata, bits, torch.float16), w_rc.half())


def gather_gradient():
    for shape in SHAPES:
        values, metadata, *_ = weights(shape, torch.float32)
        gradient = torch.randn(shape)
        expected = gradient.gather(1, column_indices(metadata, PATTERN, shape[1]))
        same(kernels.gather_gradient(gradient, metadata, torch.float32), expected)
        total = torch.randn_like(values)
        wanted = total + expected
        kernels.gather_gradient(gradient, metadata, torch.float32, total)
        same(total, wanted)


def decode():
    cuts = [
        None,
        DecodeLaunch(16, 16, 64, 4, 2, 8, 132, True),
        DecodeLaunch(64, 8, 64, 4, 2, 4, 132, False),
    ]
    for number, (rows, columns, rank) in enumerate([(72, 352, 0), (33, 1056, 5), (8, 32, 40)]):
        values, metadata, w_r = weights_of(rows, columns)
        down, up = (None, None) if not rank else (halves(rank, columns), halves(rows, rank))
        bias = halves(rows)
        for tokens in (1, 2, 3, 16, 17, 33, 64):
            for dtype in (torch.float32, torch.float16):
                x = halves(tokens, columns + 5)[:, :columns]  # rows that lie apart
                exact = x.double() @ w_r.double().t() + (0 if number == 2 else bias.double())
                if rank:
                    low = (x.double() @ down.double().t()).to(dtype)
                    exact += 0.25 * (low.double() @ up.double().t())
                cut = cuts[number] if tokens <= 16 else None
                given = [None if t is None else t.to(dtype) for t in (bias, down, up)]
                if number == 2:
                    given[0] = None
                kept = values if number == 1 else values.to(dtype)
                y = decoding.decode(x.to(dtype), kept, metadata, *given, 0.25, cut)
                assert y.dtype == dtype
                error = (y.double() - exact).abs().max() / exact.abs().max()
                assert error < (1e-5 if dtype is torch.float32 else 2e-3), (tokens, dtype, error)
                again = decoding.decode(x.to(dtype), kept, metadata, *given, 0.25, cut)
                same(y, again)
    assert decoding.decode(torch.empty(0, 32), values, metadata).shape == (0, 8)


@triton.jit
def _dot_in_fp32(a, b, accumulator):
    # The interpreter takes bf16 operands of a dot for the integers that it stores them as.
    return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")


@mock.patch.object(decoding_kernels, "_dot", _dot_in_fp32)
def decode_bf16():
    """Small whole numbers, so that every sum and cast is exact, of whatever order and rounding."""

    def whole(*shape):
        return (torch.randn(shape) * 0.6).round().clamp(-2, 2)

    rows, columns, rank = 40, 96, 3
    dense = whole(rows, columns)
    row = row_keep_mask(dense, PATTERN)
    down = whole(rank, columns) * (torch.rand(rank, columns) < 0.1)
    bias, up = whole(rows), whole(rows, rank)
    for values_dtype in (torch.bfloat16, torch.float32):
        values, metadata = compress(dense.to(values_dtype), row, PATTERN)
        for tokens in (1, 2, 9, 64):
            x = whole(tokens, columns)
            low = x @ down.t()
            expected = x @ (dense * row).t() + bias + 2 * low @ up.t()
            assert expected.abs().max() <= 256 and low.abs().max() <= 256  # bf16 holds these
            given = [tensor.bfloat16() for tensor in (bias, down, up)]
            y = decoding.decode(x.bfloat16(), values, metadata, *given, 2.0)
            same(y, expected.bfloat16())


def serve():
    """A backend asked for by name, down to the kernels: a launch, or two with an adapter."""
    launched = []
    call = Launcher.__call__
    patches = (
        mock.patch.object(ops, "_on_gpu", lambda tensor: True),
        mock.patch.object(ops, "_can_measure", lambda: True),
        mock.patch.object(ops, "why_no_cusparselt", lambda device, dtype: "not here"),
        mock.patch.object(ops, "why_no_gemm", lambda *_: "not here"),
        mock.patch.object(ops, "tuner", lambda: SimpleNamespace(choose=lambda *_: Choice("dense"))),
        mock.patch.object(dispatch, "why_no_kernels", lambda pattern, dtype, device: None),
        mock.patch.object(
            Launcher,
            "__call__",
            lambda self, *rest, **options: launched.append(self) or call(self, *rest, **options),
        ),
    )
    # One step along I, so one split.
    layer = slope.SlopeLinear(64, 200).half().requires_grad_(False)
    layer.add_adapter(5, scale=0.5)
    torch.nn.init.normal_(layer.adapter.up)
    weight = layer.compressed_weight()
    x = halves(9, 128).half()[:, ::2]  # columns that lie apart
    with contextlib.ExitStack() as stack, torch.no_grad():
        for patch in patches:
            stack.enter_context(patch)
        backend = get_backend("triton")
        for adapter in (None, layer._adapter_term(torch.float16)):
            launched.clear()
            y = backend.forward(x, weight, layer.bias, None, adapter)
            assert len(launched) == (1 if adapter is None else 2), launched
            expected = DenseBackend().forward(x, weight, layer.bias, None, adapter)
            torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


def select():
    for n, m, shape in [(2, 4, (12, 48)), (1, 2, (6, 70)), (2, 16, (32, 64)), (7, 32, (64, 96))]:
        for dtype in (torch.float32, torch.float16, torch.float64):
            scores = torch.randn(shape).half().abs().to(dtype)
            some_nan = scores.masked_fill(torch.rand(shape) < 0.1, float("nan"))
            ties = (scores * 2).round() / 2
            for given in (scores, ties, some_nan, scores.t().contiguous().t()):
                for dim in (0, 1):
                    if shape[dim] % m == 0:
                        expected = top_n(given, slope.NMPattern(n, m), dim)
                        same(selection.select(given, n, m, dim), expected)


def halves(*shape):
    return torch.randn(shape).half().float()


def weights_of(rows, columns):
    dense = halves(rows, columns)
    row = row_keep_mask(dense, PATTERN)
    values, metadata = compress(dense, row, PATTERN)
    return values, metadata, dense * row


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
