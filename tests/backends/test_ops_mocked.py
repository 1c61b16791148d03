"""The ops on their GPU path, on the CPU: a stand-in library, and plain torch for the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fake_cusparselt import FakeLibrary

import slope
from slope.backends import DenseBackend, dispatch, ops, support
from slope.backends import gemm as many_tokens
from slope.backends.choices import ChoiceStore
from slope.backends.cusparselt import layout
from slope.backends.cusparselt.binding import Library
from slope.backends.cusparselt.plans import Products
from slope.backends.tuning import Tuner
from slope.compressed import compress, decompress, unpack_bits

PATTERN = layout.PATTERN


def expand(values, metadata, column_mask, dtype):
    if column_mask is not None:
        values = torch.where(unpack_bits(column_mask, values.shape[1]), values, 0)
    return decompress(values.to(dtype), metadata, PATTERN, 2 * values.shape[1])


def pack_columns(values, metadata, column_mask, dtype):
    w_rc = expand(values, metadata, column_mask, dtype).t().contiguous()
    # Any two places of four do where fewer survive; those that survive must be among them.
    keep_mask = slope.masks.row_keep_mask(w_rc, PATTERN)
    return layout.pack(*compress(w_rc, keep_mask, PATTERN))


def gather_gradient(dense, metadata, dtype):
    columns = slope.compressed.column_indices(metadata, PATTERN, dense.shape[1])
    return dense.gather(1, columns).to(dtype)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    library = FakeLibrary()
    products = Products(Library(library))
    kernels = SimpleNamespace(
        pack_rows=lambda values, metadata, dtype: layout.pack(values.to(dtype), metadata),
        pack_columns=pack_columns, expand=expand, gather_gradient=gather_gradient,
    )  # fmt: skip
    tuner = Tuner(ChoiceStore(tmp_path), {}, lambda paths, _: dict.fromkeys(paths, 1.0))
    chosen = {}
    for name, value in {
        "_on_gpu": lambda tensor: True, "_can_measure": lambda: True, "_kernels": lambda: kernels,
        "_products": lambda: products, "tuner": lambda: tuner, "_chosen": lambda: chosen,
        "why_no_cusparselt": lambda device, dtype: None,
        "why_no_decode": lambda tokens, in_features: "not here",
        "why_no_mma": lambda *_: "not here",
        "why_no_gemm": lambda *_: "not here",
    }.items():  # fmt: skip
        monkeypatch.setattr(ops, name, value)
    library.products = products
    return library


CORNERS = [32, 4]  # the op's: where the blocks of an adapter's up begin


def operands(tokens=16, rank=0, only="cusparselt"):
    layer = slope.SlopeLinear(128, 64, dtype=torch.bfloat16)
    x = torch.randn(tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(rank, 128, dtype=torch.bfloat16) if rank else None
    up = torch.randn(64, rank, dtype=torch.bfloat16) if rank else None
    masks = layer.metadata, layer.column_mask
    return layer, (x, layer.values, *masks, None, layer.bias, down, up, 0.5, only, [])


@pytest.mark.parametrize("tokens", [1, 13, 16, 100])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_forward_equals_the_reference(fake, tokens, rank):
    layer, given = operands(tokens, rank)
    with torch.no_grad():
        y = ops.sparse_linear(*given)
        term = None if not rank else (*given[6:8], 0.5)
        reference = DenseBackend().forward(
            given[0], layer.compressed_weight(), layer.bias,
            adapter=None if term is None else slope.backends.AdapterTerm(*term),
        )  # fmt: skip
    torch.testing.assert_close(y, reference, rtol=2e-2, atol=5e-2)
    assert "Matmul" in fake.names()


@pytest.mark.parametrize("rank", [0, 3])
def test_few_tokens_go_to_the_decode_kernel_in_one_call(fake, monkeypatch, rank):
    calls = []

    def decode(x, values, metadata, bias, down, up, scale):
        calls.append((x.shape[0], None if up is None else up.shape[1], scale))
        return x.new_zeros(x.shape[0], values.shape[0])

    monkeypatch.setattr(ops, "decode", decode)
    monkeypatch.setattr(ops, "why_no_decode", lambda tokens, in_features: None)
    layer, given = operands(16, rank, only="triton")
    layer.requires_grad_(False)
    backend = slope.backends.get_backend("triton")
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda pattern, dtype, device: None)
    term = slope.backends.AdapterTerm(*given[6:8], 0.5) if rank else None
    for _ in range(2):
        backend.forward(given[0], layer.compressed_weight(), layer.bias, None, term)
    assert calls[-2:] == [(16, rank or None, 0.5 if rank else 1.0)] * 2  # before, it was measured


@pytest.mark.parametrize(("rank", "low"), [(0, ""), (3, ""), (3, "/2")])
@pytest.mark.parametrize("tokens", [50, 90])
def test_the_compiled_kernel_adds_the_adapter_if_it_splits_it(fake, monkeypatch, tokens, rank, low):
    calls, offered = [], [f"8.1.4.2.3g/1{low}", f"8.1.4.2.3g/2{low}"]

    def decode(x, values, metadata, bias, down, up, scale, launch):
        calls.append((str(launch), None if up is None else up.shape[1]))
        return x.new_zeros(x.shape[0], values.shape[0])

    def launches(number, *shape):
        assert (number, *shape) == (64 if tokens == 50 else 128, 64, 128, rank, None)
        return offered

    monkeypatch.setattr(ops, "decode_mma", decode)
    monkeypatch.setattr(ops, "launches", launches)
    monkeypatch.setattr(ops, "why_no_mma", lambda *product: None)
    _, given = operands(tokens, rank, only="mma")
    with torch.no_grad():
        y = ops.sparse_linear(*given)
    x, down, up = given[0], *given[6:8]
    expected = torch.zeros(tokens, 64)
    if rank and not low:  # two products beside it
        expected = 0.5 * (x @ down.t()) @ up.t()
    torch.testing.assert_close(y, expected.to(y.dtype), rtol=2e-2, atol=5e-2)
    assert calls == [(name, rank if low else None) for name in (*offered, offered[0])]


def test_where_x_down_is_made_competes_for_each_kind_of_scale(fake, monkeypatch):
    asked = []

    def gemm(packed, x, bias, out_features, up=None, z=None, down=None, scale=1.0, corners=()):
        asked.append("up" if up is None else "joined" if z is None else "ahead")
        return x.new_zeros(x.shape[0], out_features)

    for module in (ops, many_tokens):
        monkeypatch.setattr(module, "gemm", gemm)
    monkeypatch.setattr(ops, "why_no_gemm", lambda *case: None)
    _, given = operands(tokens=100, rank=8, only="")
    with torch.no_grad():
        for scale, ways in ((2.0**-70, {"up"}), (0.5, {"joined", "ahead"}), (1.0, set())):
            asked.clear()
            torch.ops.slope.sparse_linear(*given[:8], scale, *given[9:])
            assert set(asked) >= ways and (len(ways) < 2 or "up" not in asked)
    kinds = {key.usual_scale for key in ops.tuner().known() if key.adapter_rank}
    assert kinds == {True, False}


@pytest.mark.parametrize("scale", [0.5, 2.0**-70])
@pytest.mark.parametrize(("rank", "way"), [(0, None), (3, None), (8, "joined"), (8, "ahead")])
def test_the_kernel_for_many_tokens_adds_the_adapter_that_it_can_read(
    fake, monkeypatch, rank, way, scale
):
    calls, asked = [], []

    def gemm(packed, x, bias, out_features, up=None, z=None, down=None, scale=1.0, corners=()):
        assert list(corners) == (CORNERS if up is not None else [])
        calls.append(
            tuple(name for name, has in (("up", up), ("z", z), ("down", down)) if has is not None)
        )
        y = fake.products.matmul(packed, x, bias, out_features, None)
        if z is None and up is not None:
            z = scale * (x @ down.t())
        return y if up is None else y.addmm_(z, up.t())

    for module in (ops, many_tokens):
        monkeypatch.setattr(module, "gemm", gemm)
    assert ops.WAYS == ("joined", "ahead")
    monkeypatch.setattr(ops, "WAYS", (way,))
    monkeypatch.setattr(ops, "why_no_gemm", lambda *case: asked.append(case))
    layer, given = operands(tokens=100, rank=rank, only="gemm")
    given = *given[:8], scale, given[9], CORNERS
    term = slope.backends.AdapterTerm(*given[6:8], scale) if rank else None
    with torch.no_grad():
        y = torch.ops.slope.sparse_linear(*given)
        expected = DenseBackend().forward(
            given[0], layer.compressed_weight(), layer.bias, adapter=term
        )
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=5e-2)
    # A scale that the dtype of Z cannot be multiplied by is left to two more products.
    added = {"joined": ("up", "down"), "ahead": ("up", "z"), None: ()}[way]
    assert set(calls) == {added if scale == 0.5 else ()}
    dy = torch.randn(100, 64, dtype=torch.bfloat16)
    dx = torch.ops.slope.sparse_input_gradient(dy, *given[1:4], "gemm")
    expected = DenseBackend().input_gradient(dy, layer.compressed_weight())
    torch.testing.assert_close(dx, expected, rtol=2e-2, atol=5e-2)
    assert calls[-1] == ()
    # Of the bucket, so that all its numbers of tokens have the choice that one was measured for.
    assert asked == [(128, 64, 128, None), (128, 128, 64, None)]


def test_the_device_of_the_operands_is_the_current_one_in_every_launch(fake, monkeypatch):
    inside = []

    class device_of:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            inside.append(self.tensor)

        def __exit__(self, *_):
            inside.pop()

    kernels, product = ops._kernels(), fake.products.matmul
    seen = []

    def watched(function):
        def call(*arguments):
            seen.append(len(inside))
            return function(*arguments)

        return call

    for name, function in vars(kernels).items():
        monkeypatch.setattr(kernels, name, watched(function))
    monkeypatch.setattr(fake.products, "matmul", watched(product))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    _, given = operands(rank=3)
    ops.sparse_linear(*given).backward(torch.randn(16, 64, dtype=torch.bfloat16))
    assert len(seen) >= 6 and all(seen) and not inside


def test_gradients_equal_the_references_and_plans_are_made_once(fake):
    layer, given = operands()
    dy = torch.randn(16, 64, dtype=torch.bfloat16)
    for _ in range(4):
        given[0].grad = layer.values.grad = layer.bias.grad = None
        ops.sparse_linear(*given).backward(dy)
    weight = layer.compressed_weight()
    reference = DenseBackend()
    x = given[0].detach()
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(given[0].grad, reference.input_gradient(dy, weight), **close)
    torch.testing.assert_close(layer.values.grad, reference.values_gradient(dy, x, weight), **close)
    # a search each and a plan each, for the forward and the input gradient
    assert fake.names().count("MatmulSearch") == 2
    assert fake.products.counts.misses == 2 and fake.products.counts.hits >= 6


def test_the_ops_pass_opcheck_over_the_mocked_library(fake):
    _, given = operands()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.slope.sparse_linear, given, test_utils=tests)
    x, values, metadata, column_mask, *_ = (t.detach() if torch.is_tensor(t) else t for t in given)
    dy = torch.randn(16, 64, dtype=torch.bfloat16)
    gradient = (dy, values, metadata, column_mask, "cusparselt")
    torch.library.opcheck(torch.ops.slope.sparse_input_gradient, gradient, test_utils=tests)
    weight = (dy, x, metadata, torch.bfloat16)
    torch.library.opcheck(torch.ops.slope.values_gradient, weight, test_utils=tests)


def test_out_of_memory_in_the_search_is_a_reason_and_a_dense_product(fake, monkeypatch):
    def search(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128 MiB")

    monkeypatch.setattr(fake.products, "search", search)
    layer, given = operands(tokens=100, only="")
    with torch.no_grad():
        y = ops.sparse_linear(*given)
        reference = DenseBackend().forward(given[0], layer.compressed_weight(), layer.bias)
    assert torch.equal(y, reference)
    (choice,) = ops._chosen().values()
    assert choice.path == "dense" and "CUDA out of memory" in choice.reason()


@pytest.mark.parametrize(
    ("capability", "triton", "said"),
    [
        ((7, 5), True, "Tesla T4 is sm_75, sparse tensor cores begin with sm_80"),
        ((9, 0), False, "triton is not installed; pip install triton"),
        ((9, 0), True, None),
    ],
)
def test_what_a_gpu_lacks_is_said(monkeypatch, capability, triton, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(support, "find_spec", lambda name: object() if triton else None)
    support.why_no_gpu_kernels.cache_clear()
    try:
        assert support.why_no_kernels(PATTERN, torch.bfloat16, "cuda:0") == said
        assert support.why_no_kernels(PATTERN, torch.float32, "cuda:0") == (
            "dtype float32 has no sparse kernels; use bf16 or fp16"
        )
    finally:
        support.why_no_gpu_kernels.cache_clear()


@pytest.mark.parametrize(
    ("available", "matches", "error", "said"),
    [
        (False, True, None, "comes without cuSPARSELt"),
        (True, False, None, "cuSPARSELt 800 on H200 stores a compressed matrix in a layout that"),
        (True, True, OSError("libcusparseLt.so.0: no such file"), "cannot be used: libcusparseLt"),
        (True, True, None, None),
    ],
)
def test_what_the_library_lacks_is_said(monkeypatch, available, matches, error, said):
    from slope.backends.cusparselt import plans

    class Version:
        def version(self, device):
            if error is not None:
                raise error
            return 800

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(plans, "products", Version)
    monkeypatch.setattr(layout, "matches_library", lambda device, dtype: matches)
    support.why_no_cusparselt.cache_clear()
    try:
        reason = support.why_no_cusparselt(0, torch.bfloat16)
        assert reason is None if said is None else said in reason
    finally:
        support.why_no_cusparselt.cache_clear()


def test_an_op_drops_an_operand_that_other_values_were_packed_into(monkeypatch):
    seen = []

    def forward(x, values, metadata, column_mask, packed, *rest):
        seen.append(packed)
        return x.new_empty((x.shape[0], values.shape[0]))

    monkeypatch.setattr(ops, "sparse_linear_forward", forward)
    packed, x = torch.zeros(9 * 64, dtype=torch.bfloat16), torch.zeros(3, 32, dtype=torch.bfloat16)
    values, moved = packed[:512].view(32, 16), torch.zeros(32, 16, dtype=torch.bfloat16)
    metadata = torch.zeros(32, 4, dtype=torch.uint8)
    for each in (values, moved):
        torch.ops.slope.sparse_linear(
            x, each, metadata, metadata, packed, None, None, None, 1.0, ""
        )
    assert seen[0] is not None and seen[1] is None
