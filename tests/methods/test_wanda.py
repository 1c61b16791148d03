"""Wanda's norms against explicit sums, and the model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slope
from slope.methods.wanda import wanda_scores


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.dropout(torch.relu(self.first(x))))


@pytest.fixture
def model():
    return TwoLayers()


def batches():
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(-1, 1, 8)
    return [{"x": torch.randn(5, 3, 8, generator=generator) * scale} for _ in range(3)]


def layers(model):
    return {name: getattr(model, name) for name in ("first", "second")}


def test_norms_equal_explicit_sums(model):
    found = wanda_scores(model, layers(model), batches())
    x = torch.cat([batch["x"].view(-1, 8) for batch in batches()])
    hidden = torch.relu(model.first(x)).detach()
    torch.testing.assert_close(found["first"], x.norm(dim=0))
    torch.testing.assert_close(found["second"], hidden.norm(dim=0))


def test_model_and_generator_come_back_as_they_were(model):
    model.second.eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    wanda_scores(model, layers(model), batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_masks_differ_from_magnitude_where_features_differ_in_scale(model):
    x = torch.cat([batch["x"].view(-1, 8) for batch in batches()])
    scores = model.first.weight.detach().abs() * x.norm(dim=0)
    expected = slope.masks.row_keep_mask(scores, slope.NMPattern(2, 4))
    magnitude = slope.masks.row_keep_mask(model.first.weight, slope.NMPattern(2, 4))
    config = slope.SparsityConfig(mask="wanda", rules=[("*", "2:4")])
    slope.sparsify(model, config, calibration=batches())
    assert torch.equal(model.first.keep_mask(), expected)
    assert not torch.equal(expected, magnitude)


def test_no_batch_and_a_layer_that_is_not_called_are_errors(model):
    with pytest.raises(ValueError, match="calibration has no batches; pass at least one"):
        wanda_scores(model, layers(model), [])
    with pytest.raises(ValueError, match="layer 'other' was not called with the calibration"):
        wanda_scores(model, {"other": nn.Linear(8, 8)}, batches())


@pytest.mark.parametrize(
    ("calibration", "kind"), [([torch.ones(2, 8)], "Tensor"), ({"x": 1}, "str")]
)
def test_a_batch_that_is_no_mapping_is_refused(model, calibration, kind):
    with pytest.raises(ValueError, match=f"a batch is a {kind}; each must be a mapping.*input_ids"):
        slope.sparsify(model, slope.SparsityConfig(mask="wanda"), calibration)
    assert type(model.first) is nn.Linear
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_one_dimensional_and_named_inputs_are_measured():
    layer, x = nn.Linear(8, 8), torch.randn(8)
    found = wanda_scores(layer, {"": layer}, [{"input": x}])
    torch.testing.assert_close(found[""], x.abs())
