"""The one autograd function, called by itself."""

from __future__ import annotations

import pytest
import torch

import oracle
import slope
from slope.backends import DenseBackend, Operands, get_backend
from slope.compressed import compress, pack_bits
from slope.functional import slope_linear


def operands_of(text="2:4", d_in=16, d_out=16, dtype=torch.float64):
    """Compressed weight, packed column mask, and the dense W^R and W^{R,C}."""
    pattern = slope.NMPattern.parse(text)
    weight = torch.randn(d_out, d_in, dtype=dtype)
    row = oracle.row_keep(weight, pattern.n, pattern.m)
    column = oracle.column_keep(weight, row, pattern.n, pattern.m)
    values, metadata = compress(weight, row, pattern)
    survives = oracle.kept_values(column, row)
    return pattern, values, metadata, pack_bits(survives), weight * row, weight * column


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "2:8", "4:8", "2:16"])
def test_three_products_equal_the_formulas(text, prepared):
    pattern, values, metadata, column_mask, w_r, w_rc = operands_of(text)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    ready = Operands(w_r, w_rc) if prepared else None
    y = slope_linear(x, values, bias, metadata, column_mask, pattern, DenseBackend(), ready)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(y, x @ w_r.T + bias)
    torch.testing.assert_close(x.grad, dy @ w_rc)
    torch.testing.assert_close(bias.grad, dy.sum(0))
    expected = oracle.kept_values(dy.T @ x.detach(), oracle.row_keep(w_r, pattern.n, pattern.m))
    torch.testing.assert_close(values.grad, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_full_precision_values_meet_low_precision_inputs(low):
    pattern, values, metadata, column_mask, w_r, w_rc = operands_of(dtype=torch.float32)
    values.requires_grad_()
    x = torch.randn(5, 16).to(low).requires_grad_()
    y = slope_linear(x, values, None, metadata, column_mask, pattern, DenseBackend())
    dy = torch.randn(5, 16).to(low)
    y.backward(dy)
    assert (y.dtype, x.grad.dtype, values.grad.dtype) == (low, low, torch.float32)
    torch.testing.assert_close(y.float(), x.float() @ w_r.T, rtol=0.05, atol=0.05)
    torch.testing.assert_close(x.grad.float(), dy.float() @ w_rc, rtol=0.05, atol=0.05)


def test_only_the_wanted_gradients_are_computed():
    class Counting(DenseBackend):
        calls: list[str] = []

        def input_gradient(self, dy, weight, operands=None):
            self.calls.append("input")
            return super().input_gradient(dy, weight, operands)

        def values_gradient(self, dy, x, weight):
            self.calls.append("values")
            return super().values_gradient(dy, x, weight)

    pattern, values, metadata, column_mask, *_ = operands_of()
    x = torch.randn(3, 16, dtype=torch.float64)
    for leaf, expected in ((x, ["input"]), (values, ["values"])):
        Counting.calls.clear()
        leaf.requires_grad_()
        slope_linear(x, values, None, metadata, column_mask, pattern, Counting()).sum().backward()
        leaf.requires_grad_(False)
        assert Counting.calls == expected


@pytest.mark.parametrize("prepared", [False, True])
def test_second_derivatives_are_refused_rather_than_wrong(prepared):
    """The input gradient is no derivative of the output, so nothing may differentiate it again."""
    pattern, values, metadata, column_mask, w_r, w_rc = operands_of()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    ready = Operands(w_r, w_rc) if prepared else None
    y = slope_linear(x, values, None, metadata, column_mask, pattern, DenseBackend(), ready)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia"):
        dx.square().sum().backward()


def test_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="cutlass.*auto.*dense"):
        get_backend("cutlass")
    with pytest.raises(ValueError, match="cutlass.*auto.*dense"):
        slope.SparsityConfig(backend="cutlass")


def test_reference_backend_serves_everything():
    backend = get_backend("dense")
    for text in ("2:4", "2:16"):
        pattern = slope.NMPattern.parse(text)
        assert backend.why_not(pattern, torch.float64, torch.device("cpu")) is None
