"""The reference backend on a CUDA device: outputs, all gradients, optimizers, compile, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8", "2:16"]


@torch.no_grad()
def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 2e-6),
        (torch.bfloat16, 6e-3),
        (torch.float16, 8e-4),
    ],
)
def test_products_match_the_explicit_formulas(pattern, dtype, tolerance):
    torch.manual_seed(0)
    linear = nn.Linear(128, 256, dtype=dtype, device="cuda")
    layer = slope.SlopeLinear.from_linear(linear, pattern=pattern)
    x = torch.randn(3, 20, 128, dtype=dtype, device="cuda", requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    x64, dy64 = x.detach().double().view(-1, 128), dy.double().view(-1, 256)
    w_r = layer.to_dense().double()
    w_rc = w_r * layer.column_keep_mask()
    dense_gradient = dy64.t() @ x64
    kept = dense_gradient[layer.keep_mask()].view(layer.values.shape)
    assert _relative_error(y.view(-1, 256), x64 @ w_r.t() + linear.bias.double()) < tolerance
    assert _relative_error(x.grad.view(-1, 128), dy64 @ w_rc) < tolerance
    assert _relative_error(layer.values.grad, kept) < tolerance
    assert _relative_error(layer.bias.grad, dy64.sum(0)) < tolerance


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_and_metadata_equal_those_made_on_the_cpu(pattern):
    torch.manual_seed(1)
    linear = nn.Linear(256, 192)
    on_cpu = slope.SlopeLinear.from_linear(linear, pattern=pattern)
    on_gpu = slope.SlopeLinear.from_linear(copy.deepcopy(linear).cuda(), pattern=pattern)
    for name in ("values", "metadata", "column_mask"):
        assert torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu()), name


def test_column_mask_follows_a_fused_optimizer():
    torch.manual_seed(2)
    layer = slope.SlopeLinear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        x = torch.randn(32, 64, device="cuda", requires_grad=True)
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    expected = copy.deepcopy(layer)
    expected.refresh_column_mask()
    w_rc = expected.to_dense() * expected.column_keep_mask()
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ w_rc)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # in inductor
def test_compiled_equals_eager_under_autocast():
    torch.manual_seed(3)
    mlp = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    slope.sparsify(mlp, slope.SparsityConfig(adapter_rank=8))
    slope.activate_adapters(mlp)
    x = torch.randn(64, 256, device="cuda")
    results = []
    for model in (mlp, torch.compile(mlp, fullgraph=True)):
        mlp.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        results.append([loss, *(p.grad for p in mlp.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        assert _relative_error(compiled, eager) < 2e-2


def test_training_matches_the_cpu_run():
    torch.manual_seed(4)
    reference = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).double()
    slope.sparsify(reference, slope.SparsityConfig(adapter_rank=4))
    models = [reference, copy.deepcopy(reference).cuda()]
    data = torch.randn(30, 16, 64, dtype=torch.float64)
    for model in models:
        device = next(model.parameters()).device
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = slope.SlopeSchedule(max_steps=30, lora_start=0.5)
        for step, batch in enumerate(data.to(device)):
            schedule.apply(model, step)
            (model(batch) - batch).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for on_cpu, on_gpu in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(on_cpu, on_gpu.cpu(), rtol=1e-6, atol=1e-8)
