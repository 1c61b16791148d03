"""PrunedLinear: what every method has in common, from autocast to state and adapters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import slope
from slope.layers import adapter_layers, pruned_layers
from slope.methods import Method, make_method

OPTIONS = {
    "static-weight along d_out": {"reduction_dim": False},
    "unstructured": {"unstructured_sparsity": 60},
    "sr-ste": {"method": "dynamic-weight", "reduction_dim": False},
    "extended sr-ste": {"method": "dynamic-weight"},
    "static-input": {"method": "static-input"},
    "dynamic-input": {"method": "dynamic-input"},
    "dynamic-input once": {"method": "dynamic-input", "reduction_dim": False},
    "dynamic-output-grad": {"method": "dynamic-output-grad"},
    "dynamic-output-grad once": {"method": "dynamic-output-grad", "reduction_dim": False},
    "fst": {"method": "fst", "mvue": False},
    "s-ste": {"method": "s-ste"},
}
every_method = pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))


def model_of(options, dtype=torch.float64, d_in=16, d_out=8, **more):
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))
    slope.sparsify(model, slope.SparsityConfig(**options, **more))
    return model


def layer_of(options, *args, **more) -> slope.PrunedLinear:
    return model_of(options, *args, **more)[0]


def results(layer, x, dy):
    """Output and all gradients, from a clean start."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


# ---------------------------------------------------------------- the layer


@every_method
def test_a_method_is_a_dense_parameter_under_a_name(options):
    layer = layer_of(options)
    assert type(layer) is slope.PrunedLinear
    assert layer.method.name == options.get("method", "static-weight")
    assert layer.weight.shape == (8, 16)
    assert layer.stored() is layer.weight
    assert layer.weight.is_contiguous()
    assert f"method={layer.method.name}" in repr(layer)
    assert all(buffer.dtype in (torch.bool, torch.uint8, torch.float64)
               for buffer in layer.buffers())  # fmt: skip


@every_method
def test_leading_dimensions_are_tokens(options):
    layer = layer_of(options)
    x, dy = torch.randn(2, 3, 5, 16).double(), torch.randn(2, 3, 5, 8).double()
    results(layer, x, dy)  # the static feature mask is chosen
    many = results(layer, x, dy)
    flat = results(layer, x.view(30, 16), dy.view(30, 8))
    assert many[0].shape == (2, 3, 5, 8)
    assert many[1].shape == x.shape
    for a, b in zip(many, flat, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-12, atol=1e-12)


@every_method
@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 16)], ids=str)
def test_few_or_no_tokens_and_strided_inputs_work(options, shape):
    layer = layer_of(options)
    x = torch.randn(shape).double()
    y, dx, *_ = results(layer, x, torch.randn(*shape[:-1], 8).double())
    assert (y.shape, dx.shape) == ((*shape[:-1], 8), shape)
    strided = torch.randn(16, 6).double().t()
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


@every_method
def test_no_gradient_is_computed_where_none_is_asked_for(options):
    layer = layer_of(options)
    layer(torch.randn(4, 16).double()).sum().backward()
    assert layer.weight.grad is not None
    layer.zero_grad()
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 16).double().requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@every_method
def test_autocast_computes_in_bf16_and_gradients_keep_the_weights_dtype(options):
    layer = layer_of(options, torch.float32, d_in=64, d_out=32)
    x = torch.randn(8, 64).bfloat16().float()
    dy = torch.randn(8, 32).bfloat16()
    layer(x)  # the static feature mask is chosen
    expected = results(layer, x, dy.float())
    layer.zero_grad()
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy)
    found = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert {t.dtype for t in found[1:]} == {torch.float32}
    # bf16 has 8 bits; masks are chosen in the weight's own precision, so they agree.
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).norm() <= 0.02 * b.norm()


@every_method
def test_gradient_checkpointing_changes_nothing(options):
    layer = layer_of(options)
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 8).double()
    layer(x)
    plain = results(layer, x, dy)
    layer.zero_grad()
    x = x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    y.backward(dy)
    found = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@every_method
def test_gradients_accumulate_and_buffers_may_be_written_between(options):
    """DDP writes equal bytes into the buffers before each forward, here before the backward."""
    layer = layer_of(options)
    x, dy = torch.randn(4, 16).double(), torch.randn(4, 8).double()
    results(layer, x, dy)
    once = results(layer, x, dy)[2]
    layer.zero_grad()
    outputs = [layer(x), layer(x)]
    for buffer in layer.buffers():
        buffer.copy_(buffer.clone())
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(layer.weight.grad, 2 * once)


@every_method
def test_state_goes_through_a_file_into_a_model_of_other_weights(options):
    layer = layer_of(options)
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 8).double()
    results(layer, x, dy)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_of(options)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(results(other, x, dy), results(layer, x, dy), strict=True):
        assert torch.equal(a, b)


@every_method
def test_deepcopy_is_independent(options):
    layer = layer_of(options)
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 8).double()
    before = results(layer, x, dy)
    twin = copy.deepcopy(layer)
    assert torch.equal(results(twin, x, dy)[0], before[0])
    with torch.no_grad():
        twin.weight.mul_(-3)
    assert torch.equal(results(layer, x, dy)[0], before[0])


@every_method
def test_conversion_of_shapes_alone_on_the_meta_device(options):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8))
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2, **options))
    real = model_of(options, torch.float32, adapter_rank=2)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in real.state_dict().items()
    }
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(model.eval()(x), real.eval()(x))


@every_method
def test_conv1d_is_converted_transposed_and_given_back(options):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = conv1d(8, 16)  # 16 -> 8
    twin = nn.Linear(16, 8)
    with torch.no_grad():
        twin.weight.copy_(conv.weight.t())
        twin.bias.copy_(conv.bias)
    models = [nn.Sequential(conv), nn.Sequential(twin)]
    x = torch.randn(6, 16)
    outputs = []
    for model in models:
        slope.sparsify(model, slope.SparsityConfig(**options))
        outputs.append(model(x))
    assert torch.equal(*outputs)
    dense = [slope.densify(model)[0] for model in models]
    assert [type(layer).__name__ for layer in dense] == ["Conv1D", "Linear"]
    assert torch.equal(dense[0].weight.t(), dense[1].weight)
    assert torch.equal(dense[0].bias, dense[1].bias)


@every_method
def test_dense_phase_is_an_ordinary_linear_layer(options):
    layer = layer_of(options)
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 8).double()
    layer.dense = True
    y, dx, dw, db = results(layer, x, dy)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for found, expected in ((y, x @ weight.T + bias), (dx, dy @ weight), (dw, dy.T @ x),
                            (db, dy.sum(0))):  # fmt: skip
        torch.testing.assert_close(found, expected)
    assert torch.equal(layer.to_dense(), weight)
    assert all(mask.all() for mask in layer.masks())
    gradient = layer.weight.grad.clone()
    layer.method.adjust_gradient(layer)
    assert torch.equal(layer.weight.grad, gradient)


@every_method
def test_to_dense_is_a_copy_of_the_forwards_weight(options):
    layer = layer_of(options).eval()
    dense = layer.to_dense()
    identity = torch.eye(16, dtype=torch.float64)
    if "input" not in layer.method.name:
        torch.testing.assert_close((layer(identity) - layer.bias).T, dense)
    assert not dense.requires_grad
    before = layer.weight.detach().clone()
    dense.fill_(7.0)
    assert torch.equal(layer.weight.detach(), before)
    forward, backward = layer.masks()
    assert forward.dtype == backward.dtype == torch.bool
    assert not (backward & ~forward).any()
    assert not layer.to_dense()[~forward].any()


@every_method
def test_frozen_layers_stay_frozen_and_modes_are_kept(options):
    model = nn.Sequential(nn.Linear(16, 8, bias=False)).eval().requires_grad_(False)
    slope.sparsify(model, slope.SparsityConfig(**options))
    assert not model[0].weight.requires_grad
    assert model[0].bias is None
    assert not model[0].training


@every_method
def test_training_lowers_the_loss_or_at_least_runs(options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    slope.sparsify(model, slope.SparsityConfig(**options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    x = torch.randn(24, 16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        for _, layer in pruned_layers(model):
            layer.method.adjust_gradient(layer)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------- adapters


@every_method
def test_adapters_sleep_wake_and_learn_beside_every_method(options):
    model = model_of(options, adapter_rank=3)
    layer = model[0]
    x, dy = torch.randn(6, 16).double(), torch.randn(6, 8).double()
    results(layer, x, dy)
    dormant = layer(x)
    assert layer.adapter.down.grad is None
    slope.activate_adapters(model)
    assert slope.adapters_active(model)
    assert torch.equal(layer(x), dormant)
    nn.init.normal_(layer.adapter.up)
    down, up = layer.adapter.down.detach(), layer.adapter.up.detach()
    low = x @ down.T
    torch.testing.assert_close(layer(x), dormant + low @ up.T / 3)
    y, dx, *_ = results(layer, x, dy)
    torch.testing.assert_close(layer.adapter.up.grad, dy.T @ low / 3)
    torch.testing.assert_close(layer.adapter.down.grad, (dy @ up / 3).T @ x)
    slope.deactivate_adapters(model)
    torch.testing.assert_close(dx - results(layer, x, dy)[1], dy @ up @ down / 3)
    assert [name for name, _ in adapter_layers(model)] == ["0"]
    assert len(slope.adapter_parameters(model)) == 2


def test_adapters_are_drawn_alike_for_every_method():
    downs = [model_of(options, adapter_rank=3, seed=5)[0].adapter.down for options in
             [{}, *OPTIONS.values()]]  # fmt: skip
    assert all(torch.equal(downs[0], down) for down in downs)


# ---------------------------------------------------------------- errors


def test_input_of_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match=r"float32 but weights are torch\.float64.*autocast"):
        layer_of({"method": "dynamic-weight"})(torch.randn(2, 16))


def test_pattern_must_divide_unless_the_mask_is_unstructured():
    method = make_method(slope.SparsityConfig(method="dynamic-weight"))
    with pytest.raises(ValueError, match="in_features=18 is not divisible by m=4"):
        slope.PrunedLinear(nn.Linear(18, 8), method)
    free = make_method(slope.SparsityConfig(unstructured_sparsity=50))
    layer = slope.PrunedLinear(nn.Linear(17, 5), free)
    assert layer.keep_mask.sum() == 42


def test_slope_itself_is_no_method_over_a_dense_weight():
    with pytest.raises(AssertionError, match="SlopeLinear"):
        make_method(slope.SparsityConfig())


def test_the_seam_alone_is_abstract_in_its_products_only():
    class Nothing(Method):
        name = "nothing"

    layer = slope.PrunedLinear(nn.Linear(8, 8), Nothing())
    assert all(mask.all() for mask in layer.masks())
    with pytest.raises(NotImplementedError):
        layer(torch.randn(2, 8))


def test_a_bias_that_is_no_parameter_is_refused():
    linear = prune.random_unstructured(nn.Linear(16, 8), "bias", 0.5)
    with pytest.raises(ValueError, match=r"a bias that is no Parameter.*prune\.remove\(layer, 'b"):
        slope.PrunedLinear(linear, make_method(slope.SparsityConfig(method="dynamic-weight")))
