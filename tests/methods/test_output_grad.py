"""Pruned output gradients against the explicit formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oracle
import slope


def converted(d_in=12, d_out=16, **options):
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-output-grad", **options))
    return model[0]


@pytest.mark.parametrize("reduction_dim", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 8, 11])
@pytest.mark.parametrize("text", ["1:2", "2:4"])
def test_products_equal_the_formulas(text, tokens, reduction_dim):
    n, m = map(int, text.split(":"))
    layer = converted(pattern=text, reduction_dim=reduction_dim)
    x = torch.randn(tokens, 12).double().requires_grad_()
    dy = torch.randn(tokens, 16).double()
    y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach()
    expected = oracle.output_grad_products(x.detach(), weight, dy, n, m, reduction_dim)
    for a, b in zip((y - layer.bias, x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))  # the bias sees the whole gradient
    assert torch.equal(layer.to_dense(), weight)


def test_forward_is_dense():
    layer = converted()
    x = torch.randn(5, 12).double()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert all(mask.all() for mask in layer.masks())


def test_pruned_gradient_is_biased_where_small_entries_agree():
    """Why it trails: entries that are never the largest of their group give no gradient at all."""
    layer = converted(4, 4)
    dy = torch.tensor([[1.0, 1.0, 0.1, 0.1]]).double().repeat(8, 1)
    layer(torch.ones(8, 4).double()).backward(dy)
    x = torch.ones(1, 4).double().requires_grad_()
    layer(x).backward(dy[:1])
    weight = layer.weight.detach()
    torch.testing.assert_close(x.grad[0], weight[0] + weight[1])
