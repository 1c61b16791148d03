"""torch.compile of sparse models equals eager, without graph breaks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slope

pytestmark = pytest.mark.filterwarnings(
    # torch's own compiler, not ours
    "ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*",
    "ignore:.*TensorFloat32.*:UserWarning",
)  # fmt: skip


def mlp(rank=0, interval=1):
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
    model.double()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=rank, column_mask_interval=interval))
    return model


def step(model, function, x):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.square().sum().backward()
    found = [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [tensor.clone() for tensor in found]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_mlp_equals_eager_through_training_steps(backend, interval):
    eager = mlp(interval=interval)
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend=backend)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, fused=True) for m in (eager, compiled)]
    for number in range(3):
        x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        for expected, found in zip(step(eager, eager, x), step(compiled, function, x), strict=True):
            torch.testing.assert_close(found, expected)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, expected), found in zip(
        eager.state_dict().items(), compiled.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)


def test_adapters_wake_inside_a_compiled_model():
    eager = mlp(rank=2)
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 16, dtype=torch.float64)
    dormant = step(compiled, function, x)
    for model in (eager, compiled):
        model.zero_grad()
        slope.activate_adapters(model)
    active = step(compiled, function, x)
    assert len(active) == len(dormant) + 4
    for expected, found in zip(step(eager, eager, x), active, strict=True):
        torch.testing.assert_close(found, expected)


def test_compiled_model_sees_writes_and_evaluates_like_eager():
    model = mlp()
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 16, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            model[0].values.data.mul_(1.5)
            torch.testing.assert_close(function(x), model(x))


def test_compiled_autocast_equals_eager():
    model = mlp().float()
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(function(x), model(x), rtol=2e-2, atol=2e-2)
