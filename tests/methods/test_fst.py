"""FST and S-STE in the seam: their products, decays, masks and phases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slope
from slope.masks import transposable_keep_mask
from slope.methods import PrunedLinear
from slope.methods.fst import FST
from slope.methods.s_ste import SoftThreshold, soft_threshold

PATTERN = slope.NMPattern(2, 4)


def layer_of(method, d_in=16, d_out=8):
    return PrunedLinear(nn.Linear(d_in, d_out, dtype=torch.float64), method, PATTERN)


def run(layer, tokens=8):
    x = torch.randn(tokens, layer.in_features, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    return x, y, dy


def test_fst_products_use_one_transposable_mask_and_every_weight_learns():
    layer = layer_of(FST(mvue=False))
    x, y, dy = run(layer)
    masked = layer.weight * transposable_keep_mask(layer.weight, PATTERN)
    torch.testing.assert_close(y, x @ masked.T + layer.bias)
    torch.testing.assert_close(x.grad, dy @ masked)
    torch.testing.assert_close(layer.weight.grad, dy.T @ x)


def test_fst_weight_gradient_is_unbiased_and_the_input_gradient_untouched():
    layer = layer_of(FST())
    x = torch.randn(8, 16, dtype=torch.float64)
    dy = torch.randn(8, 8, dtype=torch.float64)
    gradients = []
    for _ in range(2000):
        layer.weight.grad = None
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        gradients.append(layer.weight.grad)
    draws = torch.stack(gradients)
    error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - dy.T @ x).abs() <= 4.5 * error + 1e-12).all()
    assert draws.std(0).max() > 0
    torch.testing.assert_close(leaf.grad, dy @ (layer.weight * layer.keep_mask))


def test_fst_mask_is_searched_every_interval_and_rests_in_the_dense_phase():
    layer = layer_of(FST(interval=3))
    first = layer.keep_mask.clone()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    for step in (0, 1, 2):
        layer.method.begin_step(layer, step)
        assert torch.equal(layer.keep_mask, first)
    layer.method.begin_step(layer, 3)
    assert torch.equal(layer.keep_mask, transposable_keep_mask(layer.weight, PATTERN))
    second = layer.keep_mask.clone()
    layer.dense = True
    with torch.no_grad():
        layer.weight.neg_().add_(1)
    layer.method.begin_step(layer, 6)
    assert torch.equal(layer.keep_mask, second)
    x, y, dy = run(layer)
    torch.testing.assert_close(y, x @ layer.weight.T + layer.bias)


def test_masked_decay_reaches_pruned_weights_alone_and_not_the_dense_phase():
    layer = layer_of(FST(srste_decay=0.5, mvue=False))
    run(layer)
    before = layer.weight.grad.clone()
    layer.method.adjust_gradient(layer)
    expected = before + 0.5 * layer.weight.detach() * ~layer.keep_mask
    torch.testing.assert_close(layer.weight.grad, expected)
    layer.dense = True
    layer.method.adjust_gradient(layer)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_soft_threshold_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, -0.5, 0.0, 0.25, 1.0]])
    # Thresholds 2 and 0.25: the third largest magnitude of each group.
    assert soft_threshold(weight, PATTERN).tolist() == [[2.0, -1.0, 0, 0, -0.25, 0, 0, 0.75]]


def test_soft_threshold_is_continuous_where_two_weights_change_places():
    base = torch.tensor([1.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    previous = None
    for value in torch.linspace(0.0, 1.2, 2401, dtype=torch.float64):
        group = torch.cat((base[:3], value.view(1)))
        now = soft_threshold(group, PATTERN)
        assert (now != 0).sum() <= 2
        if previous is not None:
            assert (now - previous).abs().max() <= 0.0005 + 1e-12  # the step of the sweep
        previous = now


def test_s_ste_scale_is_least_squares_of_the_initial_weight_and_frozen():
    layer = layer_of(SoftThreshold())
    weight = layer.weight.detach()
    soft = soft_threshold(weight, PATTERN)
    scales = torch.linspace(0, 5, 5001, dtype=torch.float64)
    errors = torch.stack([((weight - s * soft) ** 2).sum() for s in scales])
    assert layer.scale.item() == pytest.approx(scales[errors.argmin()].item(), abs=1e-3)
    before = layer.scale.clone()
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.1)
    x, y, dy = run(layer)
    assert torch.equal(layer.scale, before)
    pruned = before * soft_threshold(layer.weight.detach(), PATTERN)
    torch.testing.assert_close(y, x @ pruned.T + layer.bias)
    torch.testing.assert_close(x.grad, dy @ pruned)
    torch.testing.assert_close(layer.weight.grad, dy.T @ x)


def test_s_ste_of_equal_magnitudes_has_a_finite_scale():
    linear = nn.Linear(8, 4)
    nn.init.constant_(linear.weight, 0.5)
    layer = PrunedLinear(linear, SoftThreshold(), PATTERN)
    assert layer.scale.item() == 1.0
    assert torch.isfinite(layer(torch.randn(2, 8))).all()
