"""Static masks over a dense weight, and what the static options mean for SLoPe itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import oracle
import slope


def products(layer, x, dy):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach() - layer.bias.detach(), x.grad, layer.weight.grad, layer.bias.grad


def converted(d_in=16, d_out=24, **options):
    """The converted layer (fp64) and the weight it was made of."""
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    weight = model[0].weight.detach().clone()
    slope.sparsify(model, slope.SparsityConfig(**options))
    return model[0], weight


def along_out(weight, n, m):
    return oracle.row_keep(weight.T, n, m).T


def assert_equal_products(layer, x, dy, expected):
    *found, db = products(layer, x, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(db, dy.sum(0))


@pytest.mark.parametrize("prune_backward", [True, False])
@pytest.mark.parametrize("text", ["1:2", "2:4", "2:8", "3:4"])
def test_mask_along_d_out_equals_the_formulas(text, prune_backward):
    n, m = map(int, text.split(":"))
    layer, weight = converted(pattern=text, reduction_dim=False, prune_backward=prune_backward)
    keep = along_out(weight, n, m)
    # Backward: the kept weights again along d_in, the same pruning with the roles exchanged.
    second = oracle.column_keep((weight * keep).T, keep.T, n, m).T if prune_backward else keep
    x, dy = torch.randn(7, 16).double(), torch.randn(7, 24).double()
    assert_equal_products(layer, x, dy, oracle.static_products(x, weight, dy, keep, second))
    assert torch.equal(layer.to_dense(), weight * keep)
    forward, backward = layer.masks()
    assert torch.equal(forward, keep)
    assert torch.equal(backward, second)


def test_backward_follows_the_weights_while_the_mask_stays():
    layer, weight = converted(reduction_dim=False)
    keep = along_out(weight, 2, 4)
    changed = torch.randn_like(weight)
    with torch.no_grad():
        layer.weight.copy_(changed)  # also where the mask prunes: it must not matter
    second = oracle.column_keep((changed * keep).T, keep.T, 2, 4).T
    x, dy = torch.randn(5, 16).double(), torch.randn(5, 24).double()
    assert_equal_products(layer, x, dy, oracle.static_products(x, changed, dy, keep, second))


@pytest.mark.parametrize("percent", [50, 60, 90, 33.3])
def test_unstructured_mask_keeps_the_largest_of_the_matrix(percent):
    layer, weight = converted(unstructured_sparsity=percent)
    keep = oracle.largest_of_all(weight, percent)
    assert keep.sum() == math.floor((100 - percent) * weight.numel() / 100)
    x, dy = torch.randn(7, 16).double(), torch.randn(7, 24).double()
    assert_equal_products(layer, x, dy, oracle.static_products(x, weight, dy, keep, keep))
    assert all(torch.equal(mask, keep) for mask in layer.masks())


def test_unstructured_share_is_exact_where_rounding_would_lose_one():
    layer, _ = converted(d_in=5, d_out=2, unstructured_sparsity=90)
    assert layer.keep_mask.sum() == 1  # (1 - 0.9) * 10 = 0.9999999999999998


def test_unstructured_ties_are_broken_by_position():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.ones_(model[0].weight)
    slope.sparsify(model, slope.SparsityConfig(unstructured_sparsity=75))
    assert torch.equal(model[0].keep_mask.flatten(), torch.arange(16) < 4)


@pytest.mark.parametrize(
    "options", [{"reduction_dim": False}, {"unstructured_sparsity": 50}], ids=str
)
def test_pruned_weights_stay_zero_under_any_optimizer(options):
    layer, _ = converted(**options)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    keep = layer.keep_mask.clone()
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(6, 16).double()).square().sum().backward()
        assert not layer.weight.grad[~keep].any()
        optimizer.step()
    assert not layer.weight[~keep].any()
    assert layer.weight[keep].all()
    assert torch.equal(layer.keep_mask, keep)


# ---------------------------------------------------------------- masks of the static method


@pytest.mark.parametrize("reduction_dim", [True, False])
def test_random_mask_is_n_of_m_along_the_forwards_dimension(reduction_dim):
    layer, weight = converted(mask="random", seed=4, reduction_dim=reduction_dim)
    keep = layer.keep_mask() if reduction_dim else layer.keep_mask
    groups = keep if reduction_dim else keep.T
    assert (groups.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert not torch.equal(keep, oracle.row_keep(weight, 2, 4))
    assert torch.equal(layer.to_dense(), weight * keep)


@pytest.mark.parametrize("reduction_dim", [True, False])
def test_rescaled_random_mask_keeps_the_output_variance(reduction_dim):
    options = {"mask": "random", "reduction_dim": reduction_dim, "pattern": "1:4"}
    plain, weight = converted(256, 256, **options)
    rescaled, _ = converted(256, 256, mask_rescale=True, **options)
    keep = rescaled.keep_mask() if reduction_dim else rescaled.keep_mask
    assert torch.equal(keep, plain.keep_mask() if reduction_dim else plain.keep_mask)
    ratio = rescaled.to_dense().square().sum() / weight.square().sum()
    assert ratio.item() == pytest.approx(1, abs=0.03)
    assert plain.to_dense().square().sum() / weight.square().sum() < 0.3
    again = nn.Sequential(nn.Linear(16, 8, dtype=torch.float64))
    weight = again[0].weight.detach().clone()
    slope.sparsify(again, slope.SparsityConfig(mask_rescale=True, **options))
    mask = again[0].keep_mask() if reduction_dim else again[0].keep_mask
    torch.testing.assert_close(again[0].to_dense(), weight * mask * 2)


def test_transposable_mask_makes_the_second_pruning_drop_nothing():
    layer, weight = converted(mask="transposable")
    keep = layer.keep_mask()
    for groups in (keep, keep.T):
        assert (groups.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.equal(layer.column_keep_mask(), keep)
    x = torch.randn(5, 16).double().requires_grad_()
    dy = torch.randn(5, 24).double()
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ (weight * keep))


# ---------------------------------------------------------------- the published relations


@pytest.mark.parametrize("method", ["slope", "extended sr-ste"])
@pytest.mark.parametrize("text", ["1:2", "2:4", "2:8", "4:8", "1:4"])
def test_imposed_sparsity_is_lemma_2_1s(text, method):
    n, m = map(int, text.split(":"))
    options = {} if method == "slope" else {"method": "dynamic-weight"}
    model = nn.Sequential(nn.Linear(512, 512))
    slope.sparsify(model, slope.SparsityConfig(pattern=text, **options))
    layer = model[0]
    masks = (layer.keep_mask(), layer.column_keep_mask()) if method == "slope" else layer.masks()
    row, column = (mask.double().mean().item() for mask in masks)
    assert row == n / m
    error = oracle.imposed_sparsity_std(n, m, 512 * 512 // m)
    assert abs(row - column - oracle.imposed_sparsity(n, m)) < 4 * error


@pytest.mark.parametrize("options", [{}, {"method": "dynamic-weight"}, {"reduction_dim": False}],
                         ids=["slope", "extended sr-ste", "along d_out"])  # fmt: skip
def test_2_4_keeps_81_25_percent_of_the_kept_weights_in_the_input_gradient(options):
    model = nn.Sequential(nn.Linear(512, 512))
    slope.sparsify(model, slope.SparsityConfig(**options))
    layer = model[0]
    masks = layer.masks() if options else (layer.keep_mask(), layer.column_keep_mask())
    kept, survive = (mask.sum().item() for mask in masks)
    assert kept == 512 * 512 // 2
    # Standard error over the groups of four along the second dimension, in each of which the
    # number of kept weights is binomial; as a share of the kept half.
    error = oracle.imposed_sparsity_std(2, 4, 512 * 512 // 4) / 0.5
    assert abs(survive / kept - 0.8125) < 4 * error


def test_exact_backward_reads_the_forwards_weight_and_is_never_refreshed():
    layer, weight = converted(prune_backward=False)
    keep = oracle.row_keep(weight, 2, 4)
    for step in range(3):
        x = torch.randn(5, 16).double().requires_grad_()
        dy = torch.randn(5, 24).double()
        layer(x).backward(dy)
        torch.testing.assert_close(x.grad, dy @ layer.to_dense())
        assert torch.equal(layer.column_keep_mask(), keep)
        with torch.no_grad():
            layer.values.normal_()
        if step:
            layer.refresh_column_mask()
