"""SlopeLinear against the explicit dense formulas, its state, and its operands after any write."""

from __future__ import annotations

import copy
import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracle
import slope
from slope.backends import DenseBackend

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8", "2:16", "3:4"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_close(found, expected, dtype=torch.float64):
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert relative_error(found, expected) <= TOLERANCE[dtype]


def compare(layer, naive, shape, dtype=torch.float64):
    """Output and every gradient of one forward and backward."""
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    x_naive = x.detach().to(naive.weight.dtype).requires_grad_()
    y, y_naive = layer(x), naive(x_naive)
    assert_close(y, y_naive, dtype)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_naive.backward(dy.to(y_naive.dtype))
    assert_close(x.grad, x_naive.grad, dtype)
    assert_close(layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row), dtype)
    if layer.bias is not None:
        assert_close(layer.bias.grad, naive.bias.grad, dtype)
    if naive.active:
        assert_close(layer.adapter.down.grad, naive.down.grad, dtype)
        assert_close(layer.adapter.up.grad, naive.up.grad, dtype)


# ---------------------------------------------------------------- the three products


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 32), (2, 5, 32), (32,), (2, 3, 1, 32)], ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_output_and_gradients_equal_the_dense_formulas(make_pair, text, shape, bias, rank):
    layer, naive = make_pair(text, 32, 16, bias=bias, rank=rank)
    if rank:
        slope.activate_adapters(layer)
        naive.active = True
    compare(layer, naive, shape)


@settings(max_examples=25)
@given(st.sampled_from(PATTERNS), st.integers(1, 2), st.integers(1, 3), st.integers(1, 9))
def test_every_small_size_equals_the_dense_formulas(make_pair, text, out_groups, in_groups, tokens):
    m = slope.NMPattern.parse(text).m
    layer, naive = make_pair(text, in_groups * m, out_groups * m)
    compare(layer, naive, (tokens, in_groups * m))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype_agrees_with_fp64(make_pair, dtype):
    layer, naive = make_pair("2:4", 64, 32, dtype=dtype)
    compare(layer, naive.double(), (24, 64), dtype)


def test_input_gradient_uses_the_double_pruned_weight_not_the_true_gradient(make_pair):
    layer, naive = make_pair("2:4", 32, 16)
    w_rc = naive.weight.detach() * oracle.column_keep(naive.weight.detach(), naive.row, 2, 4)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 16, dtype=torch.float64)
    layer(x).backward(dy)
    assert_close(x.grad, dy @ w_rc)
    assert relative_error(x.grad, dy @ naive.weight.detach()) > 0.05


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("text", ["1:2", "2:4", "2:8"])
def test_gradcheck_when_the_column_mask_keeps_everything(make_pair, text, bias):
    layer, _ = make_pair(text, 8, 8, bias=bias, exact=True)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def product(x, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(product, (x, *parameters))


def test_no_gradient_is_computed_where_none_is_asked_for(make_pair):
    layer, naive = make_pair()
    x = torch.randn(4, 32, dtype=torch.float64)
    layer(x).sum().backward()  # input without gradient: the first layer of a model
    naive(x).sum().backward()
    assert_close(layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row))
    layer.values.requires_grad_(False)
    layer.zero_grad()
    x.requires_grad_()
    layer(x).sum().backward()  # frozen values: only the input's gradient
    assert layer.values.grad is None
    assert x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_gradients_accumulate_over_micro_batches(make_pair):
    layer, naive = make_pair()
    x = torch.randn(6, 32, dtype=torch.float64)
    for part in x.split(2):
        layer(part).square().sum().backward()
    naive(x).square().sum().backward()
    assert_close(layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row))


def test_one_layer_used_twice_in_a_forward(make_pair):
    layer, naive = make_pair("2:4", 16, 16)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    x_naive = x.detach().clone().requires_grad_()
    layer(layer(x).tanh()).square().sum().backward()
    naive(naive(x_naive).tanh()).square().sum().backward()
    assert_close(x.grad, x_naive.grad)
    assert_close(layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row))


def test_empty_and_transposed_inputs(make_pair):
    layer, naive = make_pair()
    empty = layer(torch.empty(0, 32, dtype=torch.float64))
    assert empty.shape == (0, 16)
    x = torch.randn(32, 6, dtype=torch.float64).T
    assert not x.is_contiguous()
    assert_close(layer(x), naive(x))


def test_wrong_input_width_is_an_error(make_pair):
    layer, _ = make_pair()
    with pytest.raises((ValueError, RuntimeError), match="32"):
        layer(torch.randn(3, 28, dtype=torch.float64))


@pytest.mark.parametrize("gradient", ["sum", "expand"])
def test_broadcast_gradients_are_handled(make_pair, gradient):
    """``sum().backward()`` sends a gradient with stride 0."""
    layer, naive = make_pair()
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    for module in (layer, naive):
        y = module(x)
        if gradient == "sum":
            y.sum().backward()
        else:
            y.backward(torch.ones((), dtype=torch.float64).expand_as(y))
    assert_close(layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row))


# ---------------------------------------------------------------- what the layer is made of


def test_parameters_and_buffers_are_as_documented(make_pair):
    layer, naive = make_pair("2:4", 32, 16)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "values": (16, 16), "bias": (16,),
    }  # fmt: skip
    assert isinstance(layer.values, nn.Parameter)
    assert type(layer.values.data) is torch.Tensor
    assert layer.metadata.dtype == layer.column_mask.dtype == torch.uint8
    assert layer.metadata.shape == (16, 4)
    assert layer.column_mask.shape == (16, 2)
    assert set(layer.state_dict()) == {"values", "bias", "metadata", "column_mask"}
    assert (layer.in_features, layer.out_features, str(layer.pattern)) == (32, 16, "2:4")
    assert torch.equal(layer.keep_mask(), naive.row)
    assert torch.equal(layer.to_dense(), naive.weight.detach())
    assert torch.equal(layer.column_keep_mask(), naive.column)
    assert not isinstance(layer, nn.Linear)
    assert not hasattr(layer, "weight"), "code that wants .weight must fail loudly"
    for word in ("32", "16", "2:4"):
        assert word in repr(layer)


def test_fresh_layer_is_initialised_like_nn_linear_and_follows_its_pattern():
    layer = slope.SlopeLinear(64, 32, bias=True, pattern=slope.NMPattern.parse("2:4"))
    dense = layer.to_dense()
    assert (layer.keep_mask().view(32, -1, 4).sum(-1) == 2).all()
    assert (dense[layer.keep_mask()] != 0).all()
    assert dense.abs().max() <= 1 / math.sqrt(64)
    assert layer(torch.randn(2, 64)).shape == (2, 32)


def test_given_keep_mask_is_used():
    pattern = slope.NMPattern.parse("1:2")
    keep = torch.tensor([[True, False], [False, True]])
    layer = slope.SlopeLinear.from_linear(nn.Linear(2, 2), pattern=pattern, keep_mask=keep)
    assert torch.equal(layer.keep_mask(), keep)


def test_width_that_the_pattern_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="30.*4"):
        slope.SlopeLinear(30, 16, bias=True, pattern=slope.NMPattern.parse("2:4"))


def test_refresh_follows_the_present_values(make_pair):
    layer, naive = make_pair()
    with torch.no_grad():
        layer.values.copy_(torch.randn_like(layer.values))
    assert torch.equal(layer.column_keep_mask(), naive.column), "no refresh before it is asked for"
    layer.refresh_column_mask()
    expected = oracle.column_keep(layer.to_dense(), layer.keep_mask(), 2, 4)
    assert torch.equal(layer.column_keep_mask(), expected)
    assert not torch.equal(expected, naive.column)


def test_refresh_reaches_the_next_backward(make_pair):
    layer, naive = make_pair()
    compare(layer, naive, (4, 32))
    with torch.no_grad():
        values = torch.randn_like(layer.values)
        layer.values.copy_(values)
        naive.weight.masked_scatter_(naive.row, values)
    layer.refresh_column_mask()
    naive.refresh()
    layer.zero_grad()
    naive.zero_grad()
    compare(layer, naive, (4, 32))


def test_interval_one_follows_the_values_by_itself_at_the_next_training_forward(make_pair):
    layer, naive = make_pair(interval=1)
    values = torch.randn_like(layer.values)
    layer.values.data.copy_(values)
    with torch.no_grad():
        naive.weight.masked_scatter_(naive.row, values)
    naive.refresh()
    compare(layer, naive, (4, 32))
    assert torch.equal(layer.column_keep_mask(), naive.column)


def test_interval_one_leaves_a_backward_under_way_alone(make_pair):
    """A pending backward reads the operands of its own forward."""
    layer, naive = make_pair(interval=1)
    leaf = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    y = layer(leaf)
    layer.values.data.mul_(torch.rand_like(layer.values))
    layer(torch.randn(4, 32, dtype=torch.float64))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert_close(dx, dy @ (naive.weight.detach() * naive.column))


def test_a_kept_value_that_becomes_zero_stays_trainable(make_pair):
    layer, naive = make_pair()
    with torch.no_grad():
        layer.values[:, ::2] = 0.0
    assert torch.equal(layer.keep_mask(), naive.row)
    layer.refresh_column_mask()
    assert torch.equal(layer.keep_mask(), naive.row)
    layer(torch.randn(9, 32, dtype=torch.float64)).square().sum().backward()
    assert (layer.values.grad[:, ::2] != 0).all()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert (layer.values[:, ::2] != 0).all()


# ---------------------------------------------------------------- state


def test_state_dict_restores_another_layer_through_a_file_without_pickled_objects(make_pair):
    layer, _ = make_pair(rank=2)
    layer.adapter.active = True  # it is trained, so the other one's wakes with its weights
    layer.refresh_column_mask()
    torch.manual_seed(99)
    other, _ = make_pair(rank=2)
    x = torch.randn(3, 32, dtype=torch.float64)
    other(x).sum().backward()  # leaves whatever operands the layer caches
    assert not torch.equal(other.keep_mask(), layer.keep_mask())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    other.zero_grad()
    assert torch.equal(other.keep_mask(), layer.keep_mask())
    assert torch.equal(other.column_keep_mask(), layer.column_keep_mask())
    gradients = []
    for module in (layer, other):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.sum().backward()
        gradients.append((y.detach(), leaf.grad, module.values.grad))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_load_with_assign_uses_the_new_tensors(make_pair):
    layer, _ = make_pair()
    torch.manual_seed(99)
    other, _ = make_pair()
    x = torch.randn(3, 32, dtype=torch.float64)
    other(x).sum().backward()
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert_close(other(x), layer(x))


def test_safetensors_round_trip(make_pair):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, _ = make_pair()
    torch.manual_seed(99)
    other, _ = make_pair()
    other.load_state_dict(safetensors.load(safetensors.save(layer.state_dict())))
    assert torch.equal(other.to_dense(), layer.to_dense())


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_deepcopy_is_equal_and_independent(make_pair, used):
    layer, _ = make_pair(rank=2)
    x = torch.randn(3, 32, dtype=torch.float64)
    if used:
        layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    before = layer(x).detach()
    with torch.no_grad():
        twin.values.mul_(2.0)
        twin.bias.zero_()
    assert_close(twin(x), x @ twin.to_dense().T)
    assert torch.equal(layer(x), before)


def test_whole_layer_survives_pickling(make_pair):
    layer, _ = make_pair(rank=2)
    x = torch.randn(3, 32, dtype=torch.float64)
    layer(x).sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))


def test_state_of_another_pattern_is_refused(make_pair):
    layer, _ = make_pair("2:4")
    other, _ = make_pair("1:4")
    with pytest.raises(RuntimeError, match="values"):
        other.load_state_dict(layer.state_dict())


def test_meta_device_construction_allocates_nothing():
    with torch.device("meta"):
        layer = slope.SlopeLinear(64, 32, bias=True, pattern=slope.NMPattern.parse("2:4"))
    assert layer.values.is_meta
    assert layer.metadata.is_meta
    assert layer.values.shape == (32, 32)


def test_to_dtype_changes_values_and_leaves_the_masks_alone(make_pair):
    layer, naive = make_pair()
    x = torch.randn(4, 32, dtype=torch.float64)
    layer(x).sum().backward()
    layer.zero_grad()
    layer.to(torch.bfloat16)
    assert layer.values.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.metadata.dtype == layer.column_mask.dtype == torch.uint8
    assert torch.equal(layer.keep_mask(), naive.row)
    compare(layer, naive, (8, 32), torch.bfloat16)


# ---------------------------------------------------------------- no stale operand, whatever writes


def _adamw_fused(layer):
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def _adamw_foreach(layer):
    torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=True).step()


def _sgd(layer):
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _data_add(layer):
    layer.values.data.add_(torch.randn_like(layer.values))


def _data_swap(layer):
    layer.values.data = torch.randn_like(layer.values)


def _no_grad_copy(layer):
    with torch.no_grad():
        layer.values.copy_(torch.randn_like(layer.values))


def _foreach(layer):
    with torch.no_grad():
        torch._foreach_add_([layer.values], [torch.randn_like(layer.values)])


def _foreach_data(layer):
    torch._foreach_mul_([layer.values.data], 3.0)


def _load(layer):
    layer.load_state_dict({k: v * 2 if v.is_floating_point() else v.clone()
                           for k, v in layer.state_dict().items()})  # fmt: skip


def _swap_and_back(layer):
    """An EMA evaluation: other values in, one forward, the old ones back."""
    mine = layer.values.detach().clone()
    layer.values.data.copy_(mine * 0.5)
    training = layer.training
    layer.eval()
    x = torch.ones(2, layer.in_features, dtype=layer.values.dtype)
    with torch.no_grad():
        expected = x @ layer.to_dense().T + layer.bias
        assert_close(layer(x), expected)
    layer.train(training)
    layer.values.data.copy_(mine * 1.5)


def _to_float_and_back(layer):
    layer.float()
    layer.values.data.mul_(2.0)
    layer.double()


def _new_mask(layer):
    fresh = slope.SlopeLinear.from_linear(
        nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64), pattern=layer.pattern
    )
    layer.load_state_dict(fresh.state_dict())


def _new_parameter(layer):
    layer.values = nn.Parameter(torch.randn_like(layer.values))


WRITES = [
    _adamw_fused, _adamw_foreach, _sgd, _data_add, _data_swap, _no_grad_copy, _foreach,
    _foreach_data, _load, _swap_and_back, _to_float_and_back, _new_mask, _new_parameter,
]  # fmt: skip


def _forward_backward(layer, x):
    layer(x).square().sum().backward()


def _forward_only(layer, x):
    layer(x)


def _backward_then_eval(layer, x):
    _forward_backward(layer, x)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()


def _eval_only(layer, x):
    layer.eval()
    with torch.no_grad():
        layer(x)


def _inference_mode(layer, x):
    layer.eval()
    with torch.inference_mode():
        layer(x)
    layer.train()


def _forward_backward_forward(layer, x):
    """The second micro-batch is under way when the write comes."""
    _forward_backward(layer, x)
    layer(x)


BEFORE = [_forward_backward, _forward_only, _backward_then_eval, _eval_only, _inference_mode,
          _forward_backward_forward]  # fmt: skip


@pytest.mark.parametrize("after", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("before", BEFORE, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_no_write_leaves_a_stale_operand(make_pair, write, before, after):
    layer, _ = make_pair()
    x = torch.randn(3, 32, dtype=torch.float64)
    before(layer, x)
    if layer.values.grad is None:
        layer.values.grad = torch.randn_like(layer.values)
    write(layer)
    layer.zero_grad()
    layer.train(after != "eval")
    leaf = x.clone().requires_grad_(after != "no_grad")
    with torch.set_grad_enabled(after != "no_grad"):
        y = layer(leaf)
    w_r = layer.to_dense()
    assert torch.equal(w_r[layer.keep_mask()], layer.values.detach().flatten())
    assert_close(y, x @ w_r.T + layer.bias)
    if after != "no_grad":
        dy = torch.randn_like(y)
        y.backward(dy)
        assert_close(leaf.grad, dy @ (w_r * layer.column_keep_mask()))


def test_refresh_between_micro_batches_is_seen_by_the_next_one(make_pair):
    layer, _ = make_pair()
    x = torch.randn(3, 32, dtype=torch.float64)
    layer(x).sum().backward()
    layer.column_mask.fill_(255)
    leaf = x.clone().requires_grad_()
    dy = torch.randn(3, 16, dtype=torch.float64)
    layer(leaf).backward(dy)
    assert_close(leaf.grad, dy @ layer.to_dense())


# ---------------------------------------------------------------- in company


@pytest.mark.parametrize("rank", [0, 2])
def test_autocast_computes_in_bf16_and_returns_full_precision_gradients(make_pair, rank):
    layer, naive = make_pair("2:4", 64, 32, dtype=torch.float32, rank=rank)
    if rank:
        slope.activate_adapters(layer)
        naive.active = True
    x = torch.randn(16, 64, requires_grad=True)
    x_naive = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn(16, 32).bfloat16()
    y.backward(dy)
    naive.double()
    y_naive = naive(x_naive)
    y_naive.backward(dy.double())
    for grad, expected in [
        (x.grad, x_naive.grad),
        (layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row)),
        (layer.bias.grad, naive.bias.grad),
    ]:
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(y, y_naive) < TOLERANCE[torch.bfloat16]


def test_autocast_after_full_precision_does_not_reuse_operands(make_pair):
    layer, _ = make_pair(dtype=torch.float32)
    x = torch.randn(3, 32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(layer(x), full)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_pair, reentrant):
    layer, _ = make_pair("2:4", 32, 32)
    plain = copy.deepcopy(layer)
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    x_plain = x.detach().clone().requires_grad_()
    y = checkpoint(lambda z: layer(layer(z).tanh()), x, use_reentrant=reentrant)
    y.square().sum().backward()
    plain(plain(x_plain).tanh()).square().sum().backward()
    assert torch.equal(x.grad, x_plain.grad)
    assert torch.equal(layer.values.grad, plain.values.grad)


def test_grad_scaler_and_clipping_see_ordinary_gradients(make_pair):
    layer, naive = make_pair(exact=True)
    x = torch.randn(6, 32, dtype=torch.float64)
    for module in (layer, naive):
        module(x).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
    expected = nn.utils.clip_grad_norm_(naive.parameters(), 0.1)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_close(layer.values.grad, oracle.kept_values(naive.weight.grad, naive.row))


def test_code_that_reads_weight_is_told_what_to_do():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    slope.sparsify(encoder)
    encoder.eval()
    x = torch.randn(2, 4, 16)
    with torch.no_grad(), pytest.raises(AttributeError, match="to_dense.*set_fastpath_enabled"):
        encoder(x)
    assert not hasattr(encoder.linear1, "weight")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert encoder(x).shape == x.shape
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# ---------------------------------------------------------------- exact backward


def test_layer_without_the_second_pruning_has_the_true_input_gradient():
    linear = nn.Linear(32, 16, dtype=torch.float64)
    layer = slope.SlopeLinear.from_linear(linear, prune_backward=False)
    naive = oracle.DenseMaskedLinear(linear.weight, linear.bias, 2, 4)
    naive.keep_all_columns()
    compare(layer, naive, (7, 32))
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4"])  # K = 3, 6: bits that fill no whole byte
def test_column_mask_of_an_exact_layer_is_all_ones_and_stays(text):
    layer = slope.SlopeLinear.from_linear(nn.Linear(12, 8), pattern=text, prune_backward=False)
    mask = layer.column_mask.clone()
    assert torch.equal(layer.column_keep_mask(), layer.keep_mask())
    for _ in range(2):
        with torch.no_grad():
            layer.values.normal_()
        layer(torch.randn(2, 12)).sum().backward()
        layer.refresh_column_mask()
        assert torch.equal(layer.column_mask, mask)


def test_frozen_values_move_into_the_operand_of_a_backend_and_stay_the_same():
    class Sharing(DenseBackend):
        """Multiplies by the operand that it is handed."""

        def __init__(self):
            self.made, self.seen = 0, []

        def share_operand(self, weight):
            self.made += 1
            packed = torch.cat([weight.values.detach().flatten(), torch.zeros(8)])
            weight.values.data = packed[: weight.values.numel()].view(weight.values.shape)
            return packed

        def forward(self, x, weight, bias, operands=None, adapter=None):
            self.seen.append(weight.packed)
            return super().forward(x, weight, bias, operands, adapter)

    layer = slope.SlopeLinear(32, 16)
    layer._backend = backend = Sharing()
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = layer(x)
        assert backend.seen == [None] and backend.made == 0  # it may still be trained
        layer.requires_grad_(False)
        before = layer.values.clone()
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected)
        assert backend.made == 1 and torch.equal(layer.values, before)
        assert backend.seen[-1].data_ptr() == layer.values.data_ptr()
        layer.values.mul_(2)  # the operand follows
        assert torch.equal(backend.seen[-1][: before.numel()].view_as(before), 2 * before)
        copied = copy.deepcopy(layer)
        copied(x)
        assert copied._operand.data_ptr() == copied.values.data_ptr() != layer.values.data_ptr()
        layer.metadata.copy_(layer.metadata.clone())  # other places may be kept now
        layer(x)
        assert backend.made == 2


class Marking(DenseBackend):
    """Its outputs are shifted where it was handed an operand."""

    def share_operand(self, weight):
        return weight.values.detach().flatten()

    def forward(self, x, weight, bias, operands=None, adapter=None):
        y = super().forward(x, weight, bias, operands, adapter)
        return y if weight.packed is None else y + 1


def test_a_compiled_graph_takes_the_operand_that_eager_mode_made():
    layer = slope.SlopeLinear(32, 16).requires_grad_(False)
    layer._backend = Marking()
    x, compiled = torch.randn(3, 32), torch.compile(layer, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        torch.testing.assert_close(layer(x), plain + 1)
        torch.testing.assert_close(compiled(x), plain + 1)
        layer.load_state_dict(layer.state_dict())  # other places may be kept now
        torch.testing.assert_close(compiled(x), plain)
        layer(x)
        layer.set_dense(layer.to_dense(), layer.keep_mask())
        torch.testing.assert_close(compiled(x), plain)
        layer(x)
        torch.testing.assert_close(compiled(x), plain + 1)
        assert copy.deepcopy(layer)._operand is None  # its values lie elsewhere
        layer.metadata = layer.metadata.clone()
        torch.testing.assert_close(compiled(x), plain)
        layer(x)
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), plain)


def fused_step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    layer.requires_grad_(False)


def averaged(layer):
    layer.requires_grad_(False)
    layer(torch.randn(4, 64))
    for parameter in layer.parameters():
        parameter.data.mul_(0.5).add_(1.0)


def another_tensor(layer):
    layer.requires_grad_(False)
    for _ in range(5):  # memory of the one before is used again
        layer(torch.randn(4, 64))
        layer.values = nn.Parameter(torch.randn_like(layer.values), requires_grad=False)


@pytest.mark.parametrize("write", [fused_step, averaged, another_tensor])
def test_a_frozen_layer_computes_with_its_values(write):
    layer, x = slope.SlopeLinear(64, 64), torch.randn(4, 64, requires_grad=True)
    write(layer)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.to_dense().t() + layer.bias)
    y.sum().backward()
    fresh = copy.deepcopy(layer)
    fresh.refresh_column_mask()
    w_rc = fresh.to_dense() * fresh.column_keep_mask()
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ w_rc)


def test_other_weights_by_functional_call():
    layer, x = slope.SlopeLinear(64, 64).requires_grad_(False), torch.randn(3, 64)
    for _ in range(5):
        values = torch.randn_like(layer.values)
        y = torch.func.functional_call(layer, {"values": values}, (x,))
        twin = copy.deepcopy(layer)
        twin.values.copy_(values)
        torch.testing.assert_close(y, x @ twin.to_dense().t() + layer.bias)


def test_frozen_values_are_compared_once():
    layer, x = slope.SlopeLinear(64, 64), torch.randn(3, 64)
    layer(x)
    layer.requires_grad_(False)
    layer(x)
    state = layer._cache._state
    assert state.trusted is not None
    layer(x)
    assert layer._cache._state is state


def test_threads_may_serve_one_layer():
    plain = slope.SlopeLinear(64, 64).requires_grad_(False)
    x = torch.randn(3, 64)
    expected = x @ plain.to_dense().t() + plain.bias

    def serve(layer, rounded):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            return [layer(x).float() for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            layer = copy.deepcopy(plain)
            made = [pool.submit(serve, layer, number % 2 == 1) for number in range(4)]
            for y in (y for future in made for y in future.result()):
                torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_of_another_width_are_refused(grad):
    layer = slope.SlopeLinear(64, 64)
    compiled = torch.compile(layer, backend="eager")
    with torch.set_grad_enabled(grad):
        for call in (layer, compiled):
            with pytest.raises(Exception, match="input has 32 features, and the weight takes 64"):
                call(torch.randn(3, 32))


def test_a_forward_on_the_meta_device_gives_the_shape():
    layer = slope.SlopeLinear(64, 32, device="meta")
    assert layer(torch.randn(2, 64, device="meta")).shape == (2, 32)


def test_autocast_leaves_what_it_leaves_of_a_dense_layer():
    layer = slope.SlopeLinear(64, 32).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
        with pytest.raises(RuntimeError, match="input is torch.int64 but values are torch.float64"):
            layer(torch.ones(2, 64, dtype=torch.int64))


@pytest.mark.parametrize("interval", [-3, 1.5, True, "1", None])
def test_an_interval_is_a_number_of_steps(interval):
    with pytest.raises(ValueError, match="column_mask_interval=.* must be a whole number of steps"):
        slope.SlopeLinear(64, 64, column_mask_interval=interval)


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="Conv2d is no linear layer; give an nn.Linear"):
        slope.SlopeLinear.from_linear(nn.Conv2d(4, 4, 2))
    linear = nn.Linear(16, 16)
    bias = linear.bias.detach()
    del linear.bias
    linear.register_buffer("bias", bias)
    with pytest.raises(ValueError, match="a bias that is no Parameter"):
        slope.SlopeLinear.from_linear(linear)


def test_no_operand_is_made_while_a_graph_is_captured(monkeypatch):
    layer = slope.SlopeLinear(32, 16).requires_grad_(False)
    layer._backend, x = Marking(), torch.randn(3, 32)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(slope.linear, "_captured", lambda values: True)
            plain = layer(x)
        torch.testing.assert_close(layer(x), plain + 1)  # the next call makes it


def test_a_copy_of_a_compiled_layer_computes_by_itself():
    layer = slope.SlopeLinear(32, 16)
    layer.compile(backend="eager")
    x = torch.randn(3, 32)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        twin.values.zero_()
        twin.bias.zero_()
        assert not twin(x).any()
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_a_layer_served_in_inference_mode_can_be_trained_again():
    class Sharing(DenseBackend):
        def share_operand(self, weight):
            packed = torch.cat([weight.values.detach().flatten(), torch.zeros(8)])
            weight.values.data = packed[: weight.values.numel()].view(weight.values.shape)
            return packed

    layer = slope.SlopeLinear(32, 16).requires_grad_(False)
    layer._backend = Sharing()
    x = torch.randn(3, 32)
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize("rank", [0, 3])
def test_without_gradients_the_output_is_the_same(make_pair, rank):
    layer, _ = make_pair(rank=rank)
    if rank:
        layer.adapter.active = True
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    trained = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained)
