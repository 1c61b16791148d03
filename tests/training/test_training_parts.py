"""The parts of training: rates, groups, metrics, checkpoint files, generators, the callback."""

from __future__ import annotations

import csv
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional

import slope
from slope.integrations.lightning import SlopeCallback
from slope.training import checkpoint, rng
from slope.training.metrics import COLUMNS, MetricsFile
from slope.training.optim import (
    LearningRates,
    build_optimizer,
    extend_optimizer_state,
    parameter_groups,
    state_bytes,
)


def test_learning_rates_are_linear():
    rates = LearningRates(peak=1.0, warmup_steps=4, max_steps=24, lora_peak=0.5, lora_start_step=20)
    assert [rates.model(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rates.model(4) == 1.0
    assert rates.model(14) == 0.5
    assert rates.model(24) == 0.0
    assert [rates.adapters(step) for step in (0, 19, 20, 22, 24)] == [0, 0, 0.5, 0.25, 0]


def test_learning_rates_with_a_floor_and_a_cosine():
    rates = LearningRates(peak=1.0, warmup_steps=0, max_steps=10, minimum=0.1, shape="cosine")
    assert rates.model(0) == 1.0
    assert rates.model(5) == pytest.approx(0.55)
    assert rates.model(10) == pytest.approx(0.1)
    assert rates.model(99) == pytest.approx(0.1)
    assert rates.adapters(5) == 0.0


def adapter_rates(shape, **more):
    settings = {"warmup_steps": 4, "lora_peak": 0.5, "lora_start_step": 14} | more
    rates = LearningRates(peak=1.0, max_steps=24, lora_shape=shape, **settings)
    return [round(rates.adapters(step), 6) for step in (0, 1, 13, 14, 19, 24)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0, 0, 0, 0.5, 0.25, 0]),
        ("cosine", [0, 0, 0, 0.5, 0.25, 0]),
        ("constant", [0, 0, 0, 0.5, 0.5, 0.5]),
        ("model", [0, 0, 0, 0.25, 0.125, 0]),  # half of the model's own rate
    ],
)
def test_schedules_of_lazy_adapters(shape, expected):
    assert adapter_rates(shape) == expected


def test_a_cosine_is_no_line():
    rates = LearningRates(
        peak=1.0, warmup_steps=0, max_steps=8, lora_peak=1.0, lora_start_step=4, lora_shape="cosine"
    )
    expected = [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert [rates.adapters(step) for step in (4, 5, 6, 7)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.125, 0.25, 0.275, 0.25, 0.125, 0]),
        ("constant", [0.125, 0.25, 0.5, 0.5, 0.5, 0.5]),
        ("model", [0.125, 0.25, 0.275, 0.25, 0.125, 0]),
    ],
)
def test_adapters_from_step_0_warm_up_with_the_model(shape, expected):
    assert adapter_rates(shape, lora_start_step=0) == expected


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x):
        return self.second(functional.relu(self.first(self.norm(self.embedding(x)))))


@pytest.fixture
def tiny():
    model = Tiny()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2, skip=("first",)))
    return model


def test_parameter_groups(tiny):
    groups = {group["name"]: group for group in parameter_groups(tiny, 0.1)}
    assert groups["decay"]["names"] == ["first.weight", "second.values"]
    assert set(groups["no_decay"]["names"]) == {
        "embedding.weight", "norm.weight", "norm.bias", "first.bias", "second.bias"
    }  # fmt: skip
    assert groups["adapters"]["names"] == ["second.adapter.down", "second.adapter.up"]
    assert [groups[n]["weight_decay"] for n in ("decay", "no_decay", "adapters")] == [0.1, 0, 0]


def test_dense_weights_of_a_method_are_decayed():
    model = Tiny()
    config = slope.SparsityConfig(method="dynamic-weight", adapter_rank=2, skip=("first",))
    slope.sparsify(model, config)
    groups = {group["name"]: group["names"] for group in parameter_groups(model, 0.1)}
    assert groups["decay"] == ["first.weight", "second.weight"]
    assert groups["adapters"] == ["second.adapter.down", "second.adapter.up"]


def test_state_bytes_are_those_of_the_values(tiny):
    optimizer = build_optimizer(
        parameter_groups(tiny, 0.1), "adamw", 1e-3, (0.9, 0.999), 1e-8, True
    )
    assert state_bytes(optimizer) == 0
    tiny(torch.arange(8)).sum().backward()
    optimizer.step()
    sleeping = sum(p.numel() for p in slope.adapter_parameters(tiny))
    everything = sum(p.numel() for p in tiny.parameters())
    assert state_bytes(optimizer) == 2 * 4 * (everything - sleeping)


def test_unknown_optimizer(tiny):
    with pytest.raises(ValueError, match="optimizer 'sgd' is unknown; use optimizer=adamw or"):
        build_optimizer(parameter_groups(tiny, 0.1), "sgd", 1e-3, (0.9, 0.999), 1e-8, True)


def test_an_optimizer_state_gets_a_group_for_late_adapters(tiny):
    groups = parameter_groups(tiny, 0.1)
    old = build_optimizer(groups[:2], "adamw", 1e-3, (0.9, 0.999), 1e-8, False)
    tiny(torch.arange(8)).sum().backward()
    old.step()
    new = build_optimizer(groups, "adamw", 1e-3, (0.9, 0.999), 1e-8, False)
    new.load_state_dict(extend_optimizer_state(old.state_dict(), groups))
    assert [group["name"] for group in new.param_groups] == ["decay", "no_decay", "adapters"]
    assert new.param_groups[2]["weight_decay"] == 0.0
    assert not any(parameter in new.state for parameter in slope.adapter_parameters(tiny))


# -- metrics.csv -----------------------------------------------------------------------------------


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_drop_what_a_dead_process_wrote_too_much(tmp_path):
    path = tmp_path / "logs" / "metrics.csv"
    with MetricsFile(path) as metrics:
        for step in range(1, 6):
            metrics.append({"step": step, "train/loss": 1 / 3})
    with open(path, "a") as file:
        file.write("6,12,0.")  # torn
    with MetricsFile(path, step=3) as metrics:
        metrics.append({"step": 4, "val/loss": float("inf")})
        assert [row["step"] for row in read(path)] == ["1", "2", "3", "4"]  # flushed
    rows = read(path)
    assert float(rows[0]["train/loss"]) == 1 / 3 and rows[0]["val/loss"] == ""
    assert rows[3]["val/loss"] == "inf"
    assert list(tmp_path.joinpath("logs").iterdir()) == [path]


@pytest.mark.parametrize("content", ["", ",".join(COLUMNS[:5])])
def test_metrics_with_a_torn_header(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with MetricsFile(path, step=3) as metrics:
        metrics.append({"step": 4})
    assert [row["step"] for row in read(path)] == ["4"]


def test_metrics_of_something_else(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a metrics file of slope .* another name="):
        MetricsFile(path, step=3)
    assert path.read_text() == "a,b\n1,2\n"


# -- checkpoint files ------------------------------------------------------------------------------


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path):
    path, other = tmp_path / "last.ckpt", tmp_path / "step_3.ckpt"
    checkpoint.save({"x": torch.arange(5), "n": 3}, path, (other,))
    assert other.read_bytes() == path.read_bytes()
    for content in (checkpoint.load(path), torch.load(other, weights_only=True)):
        assert content["n"] == 3 and content["x"].tolist() == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step_3.ckpt"]


def test_a_checkpoint_never_unpickles_objects(tmp_path):
    checkpoint.save({"x": Tiny()}, tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="no usable checkpoint in .* objects beside tensors"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 200, -1, -41])
def test_a_cut_checkpoint_is_seen(tmp_path, size):
    path = tmp_path / "last.ckpt"
    checkpoint.save({"x": torch.arange(500)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(checkpoint.CorruptCheckpointError, match="too short|half-written|damaged"):
        checkpoint.load(path)


def test_order_in_which_checkpoints_are_tried(tmp_path):
    for name in ("step_9", "progress_step_10", "last", "step_12", "other"):
        (tmp_path / f"{name}.ckpt").touch()
    names = [path.stem for path in checkpoint.saved(tmp_path)]
    assert names == ["last", "step_12", "progress_step_10", "step_9"]


def test_a_file_system_that_refuses(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        RuntimeError, match="cannot write checkpoint .*; nothing written before was"
    ):
        checkpoint.save({}, tmp_path / "file" / "last.ckpt")


# -- generators ------------------------------------------------------------------------------------


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1)


def test_generators_come_back(tmp_path):
    rng.seed_all(3)
    draw()
    checkpoint.save(rng.capture(), tmp_path / "rng.ckpt")
    first = draw()
    with rng.untouched():
        torch.rand(5)
    second = draw()
    rng.restore(checkpoint.load(tmp_path / "rng.ckpt"))
    assert draw() == first
    assert draw() == second


# -- the callback in somebody else's trainer -----------------------------------------------------


class Theirs(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.active = []

    def training_step(self, batch, batch_idx):
        self.active.append(slope.adapters_active(self.model))
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("max_steps", [None, 4])
def test_lightning_callback(tiny, tmp_path, max_steps):
    module = Theirs(tiny)
    trainer = pl.Trainer(
        max_steps=4, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        accelerator="cpu", callbacks=[SlopeCallback(max_steps, lora_start=0.5)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(8).repeat(8), batch_size=8))
    assert module.active == [False] * 4 + [True] * 4


def test_lightning_callback_refuses_a_bad_start():
    with pytest.raises(ValueError, match=r"lora_start=0 is outside \(0, 1\]"):
        SlopeCallback(lora_start=0)
