"""Pruned activations against the explicit formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oracle
import slope

TOKENS = [1, 3, 8, 11]  # fewer than a group, ragged, whole


def converted(method, d_in=16, d_out=12, **options):
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    slope.sparsify(model, slope.SparsityConfig(method=method, **options))
    return model[0]


def assert_equals_formulas(layer, x, n, m, keep, along_tokens):
    x = x.detach().clone().requires_grad_()
    dy = torch.randn(len(x), layer.out_features).double()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach()
    expected = oracle.input_products(x.detach(), weight, dy, n, m, keep, along_tokens)
    for a, b in zip((y - layer.bias, x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    assert torch.equal(layer.to_dense(), weight)


@pytest.mark.parametrize("reduction_dim", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("text", ["1:2", "2:4"])
def test_dynamic_input_equals_the_formulas(text, tokens, reduction_dim):
    n, m = map(int, text.split(":"))
    layer = converted("dynamic-input", pattern=text, reduction_dim=reduction_dim)
    for _ in range(2):
        x = torch.randn(tokens, 16).double()
        keep = oracle.row_keep(x, n, m)
        assert_equals_formulas(layer, x, n, m, keep, reduction_dim)


@pytest.mark.parametrize("reduction_dim", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("text", ["1:2", "2:4"])
def test_static_input_keeps_the_features_of_the_first_training_batch(text, tokens, reduction_dim):
    n, m = map(int, text.split(":"))
    layer = converted("static-input", pattern=text, reduction_dim=reduction_dim)
    first = torch.randn(tokens, 16).double() * torch.rand(16).double()
    features = oracle.feature_keep(first, n, m)
    for x in (first, torch.randn(tokens, 16).double() * 9):
        keep = features.expand_as(x)
        assert_equals_formulas(layer, x, n, m, keep, reduction_dim)
    assert torch.equal(layer.feature_keep_mask, features)


def test_static_input_prunes_nothing_in_an_evaluation_before_training():
    layer = converted("static-input").eval()
    x = torch.randn(5, 16).double()
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
    assert not layer.chosen
    layer.train()(x)
    assert layer.chosen
    chosen = layer.feature_keep_mask.clone()
    layer.eval()
    torch.testing.assert_close(layer(x), (x * chosen) @ layer.weight.T + layer.bias)


def test_static_input_mask_survives_a_restart():
    layer = converted("static-input")
    layer(torch.randn(5, 16).double())
    other = converted("static-input")
    other.load_state_dict(layer.state_dict())
    other(torch.randn(5, 16).double() * torch.arange(16))
    assert torch.equal(other.feature_keep_mask, layer.feature_keep_mask)


def test_static_input_ranks_features_over_the_tokens_of_all_ranks(monkeypatch):
    here, elsewhere = torch.randn(2, 5, 16).double()

    def all_reduce(squares):
        squares += elsewhere.square().sum(0)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    layer = converted("static-input")
    layer(here)
    together = torch.cat([here, elsewhere])
    assert torch.equal(layer.feature_keep_mask, oracle.feature_keep(together, 2, 4))
    assert not torch.equal(layer.feature_keep_mask, oracle.feature_keep(here, 2, 4))


@pytest.mark.parametrize("method", ["static-input", "dynamic-input"])
def test_a_nan_in_the_input_is_not_pruned_away(method):
    layer = converted(method)
    x = torch.randn(4, 16).double()
    layer(x)
    x[2, 7] = float("nan")
    assert layer(x)[2].isnan().all()
