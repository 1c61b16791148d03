"""SlopeSchedule: a pure function of the optimizer step."""

from __future__ import annotations

import warnings
from fractions import Fraction
from math import ceil

import pytest
import torch
from torch import nn

import slope


def model_of(interval=1, rank=2):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    slope.sparsify(model, slope.SparsityConfig(column_mask_interval=interval, adapter_rank=rank))
    return model


@pytest.mark.parametrize("max_steps", [1, 7, 100, 1000, 400_000])
@pytest.mark.parametrize("percent", [1, 7, 29, 50, 57, 58, 90, 99, 100])
def test_start_step_is_the_exact_ceiling_despite_rounding(max_steps, percent):
    schedule = slope.SlopeSchedule(max_steps, lora_start=percent / 100)
    assert schedule.start_step == ceil(Fraction(percent, 100) * max_steps)


def test_adapters_are_active_exactly_from_the_start_step():
    schedule, model = slope.SlopeSchedule(20, lora_start=0.75), model_of()
    seen = []
    for step in range(20):
        schedule.apply(model, step)
        seen.append(slope.adapters_active(model))
    assert seen == [False] * 15 + [True] * 5


def test_any_step_can_be_first_so_resume_needs_no_state():
    schedule = slope.SlopeSchedule(20, lora_start=0.75)
    for step, expected in ((14, False), (15, True), (19, True), (3, False)):
        model = model_of()
        slope.activate_adapters(model)  # whatever state it was left in
        schedule.apply(model, step)
        schedule.apply(model, step)
        assert slope.adapters_active(model) is expected


def test_lora_start_one_never_wakes_and_none_leaves_adapters_alone():
    model = model_of()
    slope.SlopeSchedule(10, lora_start=1.0).apply(model, 9)
    assert not slope.adapters_active(model)
    slope.activate_adapters(model)
    slope.SlopeSchedule(10, lora_start=None).apply(model, 0)
    assert slope.adapters_active(model)


@pytest.mark.parametrize("start", [0, 0.0, -0.1, 1.01, 99, float("nan")])
def test_lora_start_outside_its_range_is_refused(start):
    with pytest.raises(ValueError, match=r"lora_start=.*\(0, 1\].*0\.99"):
        slope.SlopeSchedule(100, lora_start=start)


@pytest.mark.parametrize("steps", [0, -5, 1.5, float("inf"), float("nan"), "10", None, True])
def test_max_steps_that_is_no_whole_number_of_at_least_one_is_refused(steps):
    with pytest.raises(ValueError, match=f"max_steps={steps!r} must be the whole number.*=1000"):
        slope.SlopeSchedule(steps)


@pytest.mark.parametrize(
    ("interval", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (100, [])]
)
def test_column_masks_change_at_multiples_of_the_interval(interval, expected):
    schedule, model = slope.SlopeSchedule(8, lora_start=None), model_of(interval, rank=0)
    changed = []
    for step in range(8):
        schedule.apply(model, step)
        before = model[0].column_mask.clone()
        model(torch.randn(2, 16)).sum().backward()
        if step == 0:
            previous = before
        if not torch.equal(model[0].column_mask, previous):
            changed.append(step)
        previous = model[0].column_mask.clone()
        model[0].values.data.copy_(torch.randn_like(model[0].values))
    assert changed == expected


def test_column_mask_does_not_change_between_micro_batches():
    schedule, model = slope.SlopeSchedule(8, lora_start=None), model_of(1, rank=0)
    model[0].values.data.normal_()
    schedule.apply(model, 1)
    masks = []
    for _ in range(3):
        model(torch.randn(2, 16)).sum().backward()
        masks.append(model[0].column_mask.clone())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("interval", [-1, 0.5])
def test_interval_that_is_no_whole_number_of_steps_is_refused(interval):
    with pytest.raises(ValueError, match=f"column_mask_interval={interval}"):
        slope.SparsityConfig(column_mask_interval=interval)


def test_model_without_sparse_layers_is_left_alone():
    model = nn.Linear(4, 4)
    slope.SlopeSchedule(10).apply(model, 9)
    assert not slope.adapters_active(model)


def test_adapters_that_are_not_lazy_are_active_from_step_0():
    schedule, model = slope.SlopeSchedule(20, lora_start=0.75, lora_lazy=False), model_of()
    assert schedule.start_step == 0
    schedule.apply(model, 0)
    assert slope.adapters_active(model)


def test_layers_of_a_method_rest_in_the_dense_last_phase():
    model = nn.Sequential(nn.Linear(16, 16))
    slope.sparsify(model, slope.SparsityConfig(method="fst"))
    schedule = slope.SlopeSchedule(12, lora_start=None, dense_start=5 / 6)
    seen = []
    for step in range(12):
        schedule.apply(model, step)
        seen.append(model[0].dense)
    assert seen == [False] * 10 + [True] * 2
    schedule.apply(model, 3)
    assert not model[0].dense


@pytest.mark.parametrize("start", [0.0, -0.5, 1.01])
def test_dense_start_outside_the_run_is_an_error(start):
    with pytest.raises(ValueError, match=r"dense_start=.* is outside \(0, 1\]"):
        slope.SlopeSchedule(10, dense_start=start)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_decay_is_added_once_per_optimizer_step_however_many_micro_batches(micro_batches):
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight", srste_decay=0.25))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = slope.SlopeSchedule(10, lora_start=None)
    schedule.apply(model, 0)
    for _ in range(micro_batches):
        (model(torch.randn(4, 8)).sum() / micro_batches).backward()
    layer = model[0]
    plain = layer.weight.grad.clone()
    pruned = ~slope.masks.row_keep_mask(layer.weight, layer.pattern)
    schedule.before_optimizer_step(model, optimizer, 0)
    torch.testing.assert_close(layer.weight.grad, plain + 0.25 * layer.weight.detach() * pruned)


def test_the_lightning_callback_decays_before_clipping():
    pl = pytest.importorskip("pytorch_lightning")
    from slope.integrations.lightning import SlopeCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)
            slope.sparsify(self, slope.SparsityConfig(method="dynamic-weight", srste_decay=1e6))
            self.norms = []

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def configure_gradient_clipping(self, optimizer, **_):
            self.norms.append(self.layer.weight.grad.norm().item())

    module = Module()
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", callbacks=[SlopeCallback(2, lora_start=None)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    with torch.no_grad():
        pruned = ~slope.masks.row_keep_mask(module.layer.weight, module.layer.pattern)
        expected = 1e6 * (module.layer.weight * pruned).norm().item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: no workers, LeafSpec
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 8), batch_size=1))
    assert module.norms == pytest.approx([expected, expected], rel=1e-3)
