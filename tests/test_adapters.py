"""Lazy adapters: dormant from step 0, awake without a jump, and honest about bad ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slope
from slope.adapters import _INITS, Adapter, resolve_rank
from slope.config import ADAPTER_INITS


def small_model(rank=4, **options):
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=rank, **options))
    return model


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_dormant_adapter_gets_no_gradient_no_state_and_does_not_move():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in slope.adapter_parameters(model)]
    for _ in range(3):
        train_step(model, optimizer, torch.randn(5, 16))
    parameters = slope.adapter_parameters(model)
    assert len(parameters) == 4
    assert all(p.requires_grad for p in parameters)
    assert all(p.grad is None for p in parameters)
    assert all(p not in optimizer.state for p in parameters)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not slope.adapters_active(model)


def test_activation_leaves_output_unchanged_then_adapters_learn():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(5, 16)
    train_step(model, optimizer, x)
    dormant = model(x)
    slope.activate_adapters(model)
    assert slope.adapters_active(model)
    assert torch.equal(model(x), dormant)
    train_step(model, optimizer, x)
    for parameter in slope.adapter_parameters(model):
        assert parameter.grad is not None
        assert optimizer.state[parameter]["step"] == 1
    values = model[0].values
    assert optimizer.state[values]["step"] == 2
    assert not torch.equal(model(x), dormant)
    slope.deactivate_adapters(model)
    assert not slope.adapters_active(model)


def test_input_gradient_at_activation_is_unchanged_too():
    model = small_model()
    gradients = []
    for wake in (False, True):
        if wake:
            slope.activate_adapters(model)
        x = torch.ones(2, 16, requires_grad=True)
        model(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_adapter_adds_the_scaled_low_rank_product():
    adapter = Adapter(8, 12, 4, scale=0.7)
    nn.init.normal_(adapter.up)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(adapter(x), 0.7 * (x @ adapter.down.T) @ adapter.up.T)
    assert (adapter.down.shape, adapter.up.shape) == ((4, 8), (12, 4))


def test_scale_defaults_to_one_over_rank_and_up_to_zero():
    adapter = Adapter(512, 256, 64)
    assert adapter.scale == 1 / 64
    assert not adapter.up.any()
    assert adapter.down.std().item() == pytest.approx(1.0, abs=0.05)


def test_adapters_appear_in_the_state_from_the_start():
    names = set(small_model().state_dict())
    assert {"0.adapter.down", "0.adapter.up", "2.adapter.down", "2.adapter.up"} <= names
    assert not slope.adapter_parameters(small_model(rank=0))
    assert not slope.adapters_active(small_model(rank=0))


def test_adapters_do_not_disturb_the_global_random_numbers_nor_the_weights():
    drawn = []
    for rank in (0, 4):
        torch.manual_seed(1)
        model = small_model(rank)
        drawn.append((model[0].to_dense(), torch.rand(3)))
    for first, second in zip(*drawn, strict=True):
        assert torch.equal(first, second)


def test_adapters_depend_on_the_seed_alone_and_differ_between_layers():
    def downs(seed):
        torch.manual_seed(seed + 7)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        slope.sparsify(model, slope.SparsityConfig(adapter_rank=4, seed=seed))
        return [layer.adapter.down for _, layer in slope.sparse_layers(model)]

    first, again = downs(0), downs(0)
    other = downs(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("rank", "d_in", "expected"), [(16, 1024, 16), (0.0156, 1024, 16),
                                                        (0.5, 16, 8), (1, 64, 1)])  # fmt: skip
def test_rank_is_a_number_or_a_share_of_d_in(rank, d_in, expected):
    assert resolve_rank(rank, d_in) == expected


def test_ratio_takes_each_layers_own_width():
    model = small_model(rank=0.25)
    assert [layer.adapter.rank for _, layer in slope.sparse_layers(model)] == [4, 8]


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_rank_that_does_not_fit_is_refused_with_the_range(rank):
    with pytest.raises(ValueError, match=f"{rank}.*1 to 16"):
        Adapter(16, 32, rank)


def test_a_ratio_too_large_is_named_as_it_was_given():
    with pytest.raises(ValueError, match="adapter_rank=0.9999, rank 16, does not fit.*from 1 to 8"):
        slope.sparsify(nn.Sequential(nn.Linear(16, 8)), slope.SparsityConfig(adapter_rank=0.9999))


def test_rank_too_large_names_the_layer_and_changes_nothing():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    fits = r"adapter_rank=12 does not fit layer '1' of 8 x 32; .*1 to 8, for example adapter_rank=8"
    with pytest.raises(ValueError, match=fits):
        slope.sparsify(model, slope.SparsityConfig(adapter_rank=12))
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize("rank", [-1, 1.5, -0.5, float("nan")])
def test_senseless_rank_is_refused_by_the_config(rank):
    with pytest.raises(ValueError, match="adapter_rank"):
        slope.SparsityConfig(adapter_rank=rank)


def test_given_scale_is_used():
    model = small_model(adapter_scale=2.0)
    assert model[0].adapter.scale == 2.0


def test_adapter_follows_dtype_and_autocast():
    model = small_model().bfloat16()
    slope.activate_adapters(model)
    assert model(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------- how down is drawn


def test_every_initialisation_of_the_config_is_one_of_the_adapters_and_back():
    assert tuple(_INITS) == ADAPTER_INITS
    with pytest.raises(ValueError, match="'zeros'.*normal, kaiming, orthogonal"):
        Adapter(16, 16, 4, init="zeros")


@pytest.mark.parametrize("init", ADAPTER_INITS)
def test_initialisation_depends_on_the_layers_own_generator_alone(init):
    def downs(seed):
        model = small_model(adapter_init=init, seed=seed)
        return [layer.adapter.down.detach() for _, layer in slope.sparse_layers(model)]

    first = downs(3)
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(first, downs(3), strict=True))
    assert not torch.equal(first[0], downs(4)[0])
    assert not Adapter(16, 16, 4, init=init).up.any()


def test_kaiming_is_uniform_within_one_over_the_root_of_d_in_as_torch_draws_it():
    down = Adapter(400, 64, 64, init="kaiming").down.detach()
    reference = nn.init.kaiming_uniform_(torch.empty(64, 400), a=5**0.5)
    assert down.abs().max() <= 1 / 20
    assert down.abs().max() > 0.049
    assert reference.abs().max() <= 1 / 20
    assert down.mean().abs() < 1e-3
    assert down.std().item() == pytest.approx(reference.std().item(), rel=0.02)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_orthogonal_rows_are_orthonormal_and_their_signs_are_open(rank):
    adapters = [Adapter(16, 32, rank, init="orthogonal", dtype=torch.float64) for _ in range(20)]
    for adapter in adapters:
        down = adapter.down.detach()
        torch.testing.assert_close(down @ down.T, torch.eye(rank, dtype=torch.float64))
    positive = sum(bool(adapter.down[0, 0] > 0) for adapter in adapters)
    assert 3 <= positive <= 17


@pytest.mark.parametrize(("init", "square"), [("normal", 1), ("kaiming", 1 / 768),
                                              ("orthogonal", 1 / 256)])  # fmt: skip
def test_expected_square_of_a_component_is_as_documented(init, square):
    x = torch.randn(256)
    found = [(Adapter(256, 256, 64, init=init).down @ x).square() for _ in range(30)]
    # 1,920 squares of about Gaussian components: standard error sqrt(2 / 1920) = 3.2 %.
    expected = square * x.square().sum().item()
    assert torch.cat(found).mean().item() == pytest.approx(expected, rel=0.13)
