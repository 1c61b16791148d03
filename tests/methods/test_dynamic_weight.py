"""SR-STE and Extended SR-STE against the explicit formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oracle
import slope

SR_STE = {"exact": {"reduction_dim": False}, "exact by option": {"prune_backward": False},
          "double-pruned": {}}  # fmt: skip


def converted(d_in=16, d_out=24, dtype=torch.float64, **options):
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight", **options))
    return model[0]


@pytest.mark.parametrize("options", list(SR_STE.values()), ids=list(SR_STE))
@pytest.mark.parametrize("text", ["1:2", "2:4", "2:8"])
def test_products_equal_the_formulas_after_every_change_of_the_weight(text, options):
    n, m = map(int, text.split(":"))
    layer = converted(pattern=text, **options)
    for _ in range(2):
        x = torch.randn(7, 16).double().requires_grad_()
        dy = torch.randn(7, 24).double()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        weight = layer.weight.detach().clone()
        expected = oracle.dynamic_weight_products(x.detach(), weight, dy, n, m, not options)
        found = (y - layer.bias, x.grad, layer.weight.grad)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, dy.sum(0))
        assert torch.equal(layer.to_dense(), weight * oracle.row_keep(weight, n, m))
        assert layer.weight.all(), "a dense weight keeps what the forward leaves out"
        with torch.no_grad():
            layer.weight.normal_()


def test_pruned_weights_learn_and_return():
    layer = converted(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.masks()[0]
    for _ in range(5):
        optimizer.zero_grad()
        (layer(torch.randn(8, 4).double()) - 3).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.masks()[0], before)


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.5])
def test_decay_adds_a_share_of_each_pruned_weight_once(decay):
    layer = converted(srste_decay=decay)
    layer(torch.randn(6, 16).double()).sum().backward()
    gradient, weight = layer.weight.grad.clone(), layer.weight.detach()
    layer.method.adjust_gradient(layer)
    pruned = ~oracle.row_keep(weight, 2, 4)
    torch.testing.assert_close(layer.weight.grad, gradient + decay * weight * pruned)
    if decay:
        assert not torch.equal(layer.weight.grad, gradient)


def test_decay_without_a_gradient_does_nothing():
    layer = converted(srste_decay=0.5)
    layer.method.adjust_gradient(layer)
    assert layer.weight.grad is None


def test_mask_is_chosen_in_the_weights_own_precision():
    """Two weights that bf16 cannot tell apart: the larger one is kept under autocast too."""
    layer = converted(4, 4, torch.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 1.0005, 1.001, 0.5]).expand(4, 4))
        layer.bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert y.tolist() == [[6.0] * 4]  # 2 + 4: the second and third


def test_a_weight_that_became_nan_shows_in_the_output_instead_of_an_error():
    layer = converted()
    with torch.no_grad():
        layer.weight[3, 5] = float("nan")
    assert layer(torch.randn(2, 16).double())[:, 3].isnan().all()


def test_sr_ste_and_its_extension_differ_in_the_input_gradient_alone():
    torch.manual_seed(0)
    layer = converted()
    torch.manual_seed(0)
    exact = converted(reduction_dim=False)
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 24).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [each(i) for each, i in zip((layer, exact), inputs, strict=True)]
    for y in outputs:
        y.backward(dy)
    assert torch.equal(*outputs)
    assert torch.equal(layer.weight.grad, exact.weight.grad)
    assert not torch.equal(inputs[0].grad, inputs[1].grad)
