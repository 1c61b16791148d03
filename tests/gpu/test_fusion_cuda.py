"""Projections of the same input as one product, by every path, compiled and captured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slope
from slope.backends import why_not_sparse_kernels

NO_KERNELS = why_not_sparse_kernels("2:4", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NO_KERNELS is not None, reason=f"needs sparse tensor cores: {NO_KERNELS}"),
]

ROUNDING = {torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture(scope="module", autouse=True)
def _own_choices(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOPE_TUNING_DIR", str(tmp_path_factory.mktemp("tuning")))
        yield


class Projections(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.embedding = nn.Embedding(8, 512)
        self.all = nn.ModuleList(nn.Linear(512, size, bias=size > 300) for size in outputs)

    def forward(self, x):
        return [layer(x) for layer in self.all]


def a_model(outputs, dtype, rank):
    torch.manual_seed(0)
    model = Projections(outputs).to("cuda", dtype)
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=rank, adapter_scale=0.5))
    for adapter in slope.layers.adapters(model):
        nn.init.normal_(adapter.up, std=0.05)
        nn.init.normal_(adapter.down, std=0.05)
    slope.activate_adapters(model)
    return model.eval().requires_grad_(False)


def expected(model, x):
    for _, layer in slope.sparse_layers(model):
        weight = layer.to_dense().double()
        if layer.adapter is not None:
            a = layer.adapter
            weight = weight + a.scale * a.up.double() @ a.down.double()
        y = x.double() @ weight.t()
        yield y if layer.bias is None else y + layer.bias.double()


def assert_right(model, call, x):
    for y, right in zip(call(x), expected(model, x), strict=True):
        bound = ROUNDING[x.dtype] * right.norm()
        assert (y.double() - right).norm() < bound


@pytest.mark.parametrize(
    ("outputs", "rank", "dtype"),
    [
        ((512, 256, 256), 64, torch.bfloat16), ((512, 256, 256), 0, torch.bfloat16),
        ((320, 136), 24, torch.bfloat16), ((512, 256), 64, torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_few_and_many_tokens(outputs, rank, dtype):
    model = a_model(outputs, dtype, rank)
    (fusion,) = slope.fuse_projections(model, torch.zeros(1, 512, device="cuda", dtype=dtype))
    assert fusion.why_apart is None
    with torch.no_grad():
        for tokens in (3, 64, 300, 3000):
            x = torch.randn(tokens, 512, device="cuda", dtype=dtype)
            assert_right(model, model, x)
            parts = model(x)
            assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # in inductor
@pytest.mark.parametrize("rank", [0, 64])
def test_compiled_and_captured_it_follows_the_weights(rank):
    model = a_model((512, 256, 256), torch.bfloat16, rank)
    x = torch.randn(7, 512, device="cuda", dtype=torch.bfloat16)
    slope.fuse_projections(model, x)
    with torch.no_grad():
        model(x)
        compiled = torch.compile(model, fullgraph=True)
        assert_right(model, compiled, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = compiled(x)
        for _ in range(2):
            graph.replay()
            assert_right(model, lambda _: outputs, x)
            for _, layer in slope.sparse_layers(model):
                layer.values.mul_(-3)


def test_each_goes_on_alone_with_other_inputs_and_where_moved():
    model = a_model((512, 256, 256), torch.bfloat16, 16)
    x, other = torch.randn(2, 9, 512, device="cuda", dtype=torch.bfloat16)
    slope.fuse_projections(model, x)
    first, second, third = model.all
    with torch.no_grad():
        apart = first(x), second(other), third(x)
        wanted = (list(expected(model, given))[i] for i, given in enumerate((x, other, x)))
        for y, right in zip(apart, wanted, strict=True):
            assert (y.double() - right).norm() < ROUNDING[x.dtype] * right.norm()
        moved = copy.deepcopy(model).cpu().cuda()
        assert_right(moved, moved, x)
