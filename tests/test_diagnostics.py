"""Mask diagnostics: every column by hand on a 4 x 8 matrix, flips counted naively, broken masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import oracle
import slope
from slope.diagnostics import (
    COLUMNS,
    LayerDiagnostics,
    MaskSnapshot,
    layer_diagnostics,
    masks,
    total,
    violations,
)

# 2:4 along d_in keeps the numbers above 2. Columns 0 and 7 hold four of them each, and keep two in
# the second pruning: 4, 3 and 3, 4 are dropped. 16 of 32 are kept, then 12.
WEIGHT = torch.tensor(
    [
        [8.0, 7, 1, 2, 1, 2, 7, 8],
        [6.0, 5, 1, 2, 6, 1, 2, 5],
        [4.0, 1, 3, 2, 1, 4, 2, 3],
        [3.0, 1, 2, 4, 1, 2, 3, 4],
    ]
)
KEPT_ENERGY = 226 + 122 + 50 + 50  # row by row
PRUNED_ENERGY = 10 + 10 + 10 + 10
BACKWARD_ENERGY = KEPT_ENERGY - 25 - 25

METHODS = {
    "slope": {},
    "interval 3": {"column_mask_interval": 3},
    "exact": {"prune_backward": False},
    "random": {"mask": "random"},
    "transposable": {"mask": "transposable"},
    "along d_out": {"reduction_dim": False},
    "unstructured": {"unstructured_sparsity": 40.0},
    "dynamic": {"method": "dynamic-weight"},
    "sr-ste": {"method": "dynamic-weight", "reduction_dim": False},
    "input": {"method": "static-input"},
    "output": {"method": "dynamic-output-grad"},
    "fst": {"method": "fst"},
    "s-ste": {"method": "s-ste"},
}


def model_of(weight, **settings):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight.clone()
    slope.sparsify(model, slope.SparsityConfig(**settings))
    return model


def measured(model, *args):
    return layer_diagnostics(model, *args)["0"]


def test_slope_by_hand():
    row = measured(model_of(WEIGHT)).row()
    assert tuple(row) == COLUMNS
    assert row == {
        "density": 16 / 32,
        "density_backward": 12 / 32,
        "imposed_sparsity": 4 / 32,
        "lemma": 0.09375,
        "flip_rate": None,
        "column_flip_rate": None,
        "kept_energy": None,
        "kept_energy_backward": pytest.approx(BACKWARD_ENERGY / KEPT_ENERGY, abs=1e-15),
        "adapter_norm": None,
    }


def test_extended_sr_ste_by_hand():
    row = measured(model_of(WEIGHT, method="dynamic-weight"))
    assert (row.density, row.density_backward, row.lemma) == (0.5, 0.375, 0.09375)
    assert row.kept_energy == KEPT_ENERGY / (KEPT_ENERGY + PRUNED_ENERGY)
    assert row.kept_energy_backward == BACKWARD_ENERGY / KEPT_ENERGY


@pytest.mark.parametrize(
    ("settings", "density", "lemma"),
    [
        ({"prune_backward": False}, 0.5, 0.0),
        ({"reduction_dim": False, "prune_backward": False}, 0.5, 0.0),
        ({"unstructured_sparsity": 75.0}, 0.25, None),
        ({"method": "dynamic-weight", "reduction_dim": False}, 0.5, 0.0),
        ({"method": "fst"}, 0.5, 0.0),
        ({"method": "s-ste"}, 0.5, 0.0),
        ({"method": "dynamic-input"}, 1.0, 0.0),
        # Pruned again, though this mask lets nothing be dropped: the lemma knows random ones only.
        ({"mask": "transposable"}, 0.5, 0.09375),
    ],
)
def test_a_backward_that_drops_nothing(settings, density, lemma):
    row = measured(model_of(WEIGHT, **settings))
    assert (row.density, row.density_backward, row.imposed_sparsity) == (density, density, 0.0)
    assert row.lemma == lemma and row.kept_energy_backward == 1.0


def test_the_lemma_is_that_of_the_method_and_not_of_the_weight():
    balanced = torch.tensor([[4.0, 3, 1, 2], [4, 3, 1, 2], [1, 2, 4, 3], [1, 2, 4, 3]])
    for settings in ({}, {"method": "dynamic-weight"}):
        row = measured(model_of(balanced, **settings))
        assert (row.imposed_sparsity, row.lemma) == (0.0, 0.09375)
    row = measured(model_of(WEIGHT.t(), reduction_dim=False))  # along d_out, then along d_in
    assert (row.density, row.density_backward, row.lemma) == (0.5, 0.375, 0.09375)
    resting = model_of(WEIGHT, method="dynamic-weight")
    resting[0].dense = True
    assert measured(resting).lemma == 0.0


def test_energy_of_the_other_methods_by_hand():
    whole = KEPT_ENERGY + PRUNED_ENERGY
    assert measured(model_of(WEIGHT, unstructured_sparsity=87.5)).kept_energy is None
    assert measured(model_of(WEIGHT, reduction_dim=False)).kept_energy is None
    assert measured(model_of(WEIGHT, method="dynamic-output-grad")).kept_energy == 1.0
    assert measured(model_of(WEIGHT, method="s-ste")).kept_energy == KEPT_ENERGY / whole
    fst = model_of(WEIGHT, method="fst")
    kept = float(WEIGHT[fst[0].keep_mask].square().sum())
    assert measured(fst).kept_energy == kept / whole
    fst[0].dense = True
    assert measured(fst).density == measured(fst).kept_energy == 1.0


def test_a_weight_of_zeros_has_no_energy():
    row = measured(model_of(torch.zeros(4, 8), method="dynamic-weight"))
    assert row.kept_energy is None and row.kept_energy_backward is None


@pytest.mark.parametrize("settings", [{}, {"method": "dynamic-weight"}])
def test_adapter_norm_by_hand(settings):
    model = model_of(WEIGHT, adapter_rank=1, adapter_scale=-0.5, **settings)
    assert measured(model).adapter_norm == 0.0  # dormant, `up` is zero
    adapter = model[0].adapter
    adapter.down.data.fill_(1.0)
    adapter.up.data = torch.tensor([[1.0], [0.0], [0.0], [2.0]])
    expected = 0.5 * math.sqrt((1 + 4) * 8) / math.sqrt(KEPT_ENERGY)
    assert measured(model).adapter_norm == pytest.approx(expected, rel=1e-12)


def test_adapter_norm_needs_no_dense_product():
    model = model_of(torch.randn(16, 32), adapter_rank=5)
    model[0].adapter.up.data.normal_()
    delta = model[0].adapter.delta().detach().double()
    dense = delta.norm() / model[0].to_dense().double().norm()
    assert measured(model).adapter_norm == pytest.approx(float(dense), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = model_of(WEIGHT.to(dtype), method="dynamic-weight", adapter_rank=1)
    assert measured(model).kept_energy == KEPT_ENERGY / (KEPT_ENERGY + PRUNED_ENERGY)


# -- flips -----------------------------------------------------------------------------------------


def test_flips_by_hand():
    model = model_of(WEIGHT, method="dynamic-weight")
    before = MaskSnapshot(model)
    assert measured(model, before).flip_rate == 0.0
    model[0].weight.data[0, 2] = 9.0  # takes the place of 7 in row 0; both columns are sparse
    row = measured(model, before)
    assert (row.flip_rate, row.column_flip_rate) == (2 / 32, 2 / 32)


def test_flips_of_a_column_mask_by_hand():
    model = model_of(WEIGHT)
    before = MaskSnapshot(model)
    model[0].values.data[2, 0] = 7.0  # 8, 6, 7, 3: takes the place of 6 in column 0
    row = measured(model, before)
    assert (row.flip_rate, row.column_flip_rate) == (0.0, 2 / 32)
    # Nothing is written: the layer itself chooses in its next forward.
    assert not torch.equal(model[0].column_keep_mask(), masks(model[0])[1])


@pytest.mark.parametrize(("interval", "flips"), [(0, 0.0), (3, 0.0), (1, 2 / 32)])
def test_a_column_mask_flips_when_it_is_refreshed(interval, flips):
    model = model_of(WEIGHT, column_mask_interval=interval)
    before = MaskSnapshot(model)
    model[0].values.data[2, 0] = 7.0
    assert measured(model, before).column_flip_rate == flips
    model[0].refresh_column_mask()
    assert measured(model, before).column_flip_rate == 2 / 32


@pytest.mark.parametrize("name", METHODS)
def test_flips_against_a_naive_count(name):
    model = model_of(torch.randn(12, 20), **METHODS[name])  # 20 bits a row fill no whole bytes
    layer = model[0]
    before, old = MaskSnapshot(model), [mask.tolist() for mask in masks(layer)]
    layer.stored().data.add_(torch.randn_like(layer.stored()))
    if name == "fst":
        layer.keep_mask.copy_(layer.method._search(layer))
    row, new = measured(model, before), [mask.tolist() for mask in masks(layer)]
    for rate, was, now in zip((row.flip_rate, row.column_flip_rate), old, new, strict=True):
        flips = sum(was[o][i] != now[o][i] for o in range(12) for i in range(20))
        assert rate == flips / 240
    if name in ("slope", "dynamic", "sr-ste", "fst", "s-ste"):
        assert row.column_flip_rate > 0


def test_densities_against_the_oracle():
    weight = torch.randn(64, 128)
    row = oracle.row_keep(weight, 2, 4)
    column = oracle.column_keep(weight, row, 2, 4)
    for settings in ({}, {"method": "dynamic-weight"}):
        found = measured(model_of(weight, **settings))
        assert found.density_backward == int(column.sum()) / column.numel()
        assert found.lemma == oracle.imposed_sparsity(2, 4)
        std = oracle.imposed_sparsity_std(2, 4, 64 * 128 // 4)
        assert abs(found.imposed_sparsity - found.lemma) < 4 * std


def test_upcoming_layers_are_measured_instead():
    model = model_of(WEIGHT, method="fst")

    def rest(layer):
        other = model_of(WEIGHT, method="fst")[0]
        other.dense = True
        return other

    row = measured(model, MaskSnapshot(model), rest)
    assert (row.density, row.flip_rate) == (1.0, 0.5)
    assert measured(model).density == 0.5


def test_measuring_draws_no_random_number_and_changes_nothing():
    model = model_of(torch.randn(8, 16), adapter_rank=2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    layer_diagnostics(model, MaskSnapshot(model))
    violations(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# -- totals ----------------------------------------------------------------------------------------


def numbers(numel, density=0.5, lemma=None, kept_energy=None):
    return LayerDiagnostics(numel, density, 0.25, 0.25, lemma, 0.1, None, kept_energy, 1.0, None)


def test_totals_are_weighted_by_the_weights():
    layers = {
        "a": numbers(100, 0.5, lemma=0.1, kept_energy=0.9),
        "b": numbers(300, 0.25, lemma=0.0),
    }
    row = total(layers)
    assert row.numel == 400
    assert row.density == (100 * 0.5 + 300 * 0.25) / 400
    assert row.flip_rate == pytest.approx(0.1)
    assert row.column_flip_rate is None and row.adapter_norm is None
    assert row.kept_energy == 0.9  # of the layers where it is known
    assert row.lemma == pytest.approx(0.025)
    assert total({"b": numbers(300)}).lemma is None


def test_a_dense_model_has_no_layers():
    model = nn.Sequential(nn.Linear(8, 8))
    assert layer_diagnostics(model) == {} and violations(model) == {}


# -- broken constraints ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:2"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_constraints(name, pattern):
    if pattern == "2:8" and name in ("fst", "transposable"):
        pytest.skip("searched exactly for m up to 4")
    model = model_of(torch.randn(16, 32), pattern=pattern, **METHODS[name])
    model.train()(torch.randn(8, 32)).square().mean().backward()
    assert violations(model) == {}


def broken(model):
    (sentences,) = violations(model).values()
    return " | ".join(sentences)


def test_broken_metadata():
    model = model_of(WEIGHT)
    model[0].metadata[2, 0] = 0  # all positions of two groups are 0
    assert "metadata does not describe a 2:4 mask (a group repeats a position" in broken(model)
    model[0].metadata = model[0].metadata.int()
    assert broken(model) == "metadata is torch.int32, not torch.uint8"


def test_a_column_mask_that_keeps_too_much():
    model = model_of(WEIGHT)
    model[0].column_mask.fill_(0x0F)
    assert broken(model) == (
        "the column mask keeps 4 of 4 along d_out in column 0, group 0; 2:4 keeps at most 2 "
        "(broken groups: 2)"
    )
    model[0].prune_backward = False
    assert violations(model) == {}
    model[0].column_mask.fill_(0x07)
    assert "drops kept weights, but the input gradient is to be exact" in broken(model)


def test_a_mask_along_d_out_that_is_broken():
    model = model_of(WEIGHT, reduction_dim=False)
    model[0].keep_mask[:, 3] = True
    assert broken(model) == (
        "the mask keeps 4 of 4 along d_out in column 3, group 0; 2:4 keeps exactly 2 "
        "(broken groups: 1)"
    )


def test_other_masks_that_are_broken():
    unstructured = model_of(WEIGHT, unstructured_sparsity=75.0)
    unstructured[0].keep_mask.fill_(True)
    assert broken(unstructured) == "the mask keeps 32 of 32 weights, but 75 % zeros leave 8"
    fst = model_of(WEIGHT, method="fst")
    fst[0].keep_mask[0] = torch.tensor([True, True, False, False] * 2)
    fst[0].keep_mask[1:] = fst[0].keep_mask[0]
    assert "the transposable mask keeps 4 of 4 along d_out in column 0, group 0" in broken(fst)
    fst[0].dense = True
    assert violations(fst) == {}
    inputs = model_of(WEIGHT, method="static-input")
    assert violations(inputs) == {}  # not chosen yet
    inputs[0].chosen.fill_(True)
    assert "the feature mask keeps 4 of 4 along d_in in row 0, group 0" in broken(inputs)


def test_a_backward_that_keeps_more_than_the_forward():
    model = model_of(WEIGHT, method="dynamic-weight")
    method = model[0].method
    row, column = method.masks(model[0])
    method.masks = lambda layer: (row, ~column)
    text = broken(model)
    assert "the backward's mask keeps weights that the forward's prunes" in text
    assert "the backward's mask keeps 3 of 4 along d_out in column 2, group 0" in text
    method.masks = lambda layer: (~row | row, column)
    assert "the row mask keeps 4 of 4 along d_in in row 0, group 0; 2:4 keeps exactly" in (
        broken(model)
    )
    soft = model_of(WEIGHT, method="s-ste")
    soft[0].method.masks = method.masks
    assert "the mask keeps 4 of 4 along d_in in row 0, group 0; 2:4 keeps at most 2" in (
        broken(soft)
    )
