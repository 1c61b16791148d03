"""LAMB on compressed values, and the rates of BERT's two phases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import oracle
import slope
from slope.configs import compose
from slope.training.optim import LearningRates, build_optimizer, parameter_groups

STEPS = 20


class Model(nn.Module):
    """An embedding, two layers to prune, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 12)
        self.double()
        with torch.no_grad():
            self.up.weight.mul_(30)  # a norm above 10

    def forward(self, x):
        x = self.embedding(x)
        return self.lm_head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def twins():
    """The same model twice: sparse by the library, masked by hand."""
    sparse = Model()
    masked = copy.deepcopy(sparse)
    for name in ("up", "down"):
        layer = getattr(masked, name)
        setattr(masked, name, oracle.DenseMaskedLinear(layer.weight, layer.bias, 2, 4))
    slope.sparsify(sparse, slope.SparsityConfig(column_mask_interval=0))
    return sparse, masked


def lamb(model, weight_decay=0.01):
    groups = parameter_groups(model, weight_decay, decay_embeddings=True)
    return build_optimizer(groups, "lamb", 0.02, (0.9, 0.999), 1e-6, False)


def train(model, steps=STEPS):
    """Fixed data; the optimizer, and the trust ratios of every step by parameter."""
    optimizer = lamb(model)
    data = torch.Generator().manual_seed(11)
    ratios = []
    for _ in range(steps):
        x, y = (torch.randint(0, 12, (8,), generator=data) for _ in range(2))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ratios.append(
            {
                name: float(optimizer.state[parameter]["trust_ratio"])
                for name, parameter in model.named_parameters()
            }
        )
    return optimizer, ratios


def test_the_trust_ratio_of_values_is_that_of_the_dense_masked_weight():
    sparse, masked = twins()
    start = sparse.up.to_dense()
    _, ratios = train(sparse)
    _, expected = train(masked)
    for step in range(STEPS):
        for name in ("up", "down"):
            ours, theirs = ratios[step][f"{name}.values"], expected[step][f"{name}.weight"]
            assert ours == pytest.approx(theirs, rel=1e-9)
    for name in ("up", "down"):
        layer, naive = getattr(sparse, name), getattr(masked, name)
        torch.testing.assert_close(layer.to_dense(), naive.weight.detach(), rtol=1e-10, atol=0)
        assert not naive.weight.detach()[~naive.row].any(), "the comparison must stay masked"
    assert (sparse.up.to_dense() - start).abs().max() > 0.01, "training must have moved the weights"
    assert abs(ratios[0]["up.values"] / ratios[0]["down.values"] - 1) > 1


def test_the_step_is_the_papers():
    """One step by hand: the ratio of whole norms, none for biases, decay inside the update."""
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = lamb(model)
    nn.functional.cross_entropy(model(torch.arange(8)), torch.arange(8)).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient, weight = parameter.grad, before[name]
        update = 0.1 * gradient / ((0.001 * gradient**2).sqrt() + 1e-6)
        if parameter.ndim > 1:
            update += 0.01 * weight
            update *= weight.norm() / (update.norm() + 1e-6)
        torch.testing.assert_close(parameter.detach(), weight - 0.02 * update, msg=name)
    assert before["up.weight"].norm() > 10


def test_embeddings_decay_for_lamb_alone():
    model = Model()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
    groups = {g["name"]: g for g in parameter_groups(model, 0.01, decay_embeddings=True)}
    assert groups["decay"]["names"] == [
        "embedding.weight", "up.values", "down.values", "lm_head.weight"
    ]  # fmt: skip
    assert groups["decay"]["weight_decay"] == 0.01
    assert groups["no_decay"]["names"] == ["up.bias", "norm.weight", "norm.bias", "lm_head.bias"]
    assert (groups["no_decay"]["weight_decay"], groups["adapters"]["weight_decay"]) == (0, 0)
    usual = {g["name"]: g["names"] for g in parameter_groups(model, 0.01)}
    assert "embedding.weight" in usual["no_decay"]
    assert [group["adam"] for group in lamb(model).param_groups] == [False, True, True]


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="use optimizer=adamw or adamw-zero, or lamb for"):
        build_optimizer([], "sgd", 0.1, (0.9, 0.999), 1e-6, False)


@pytest.mark.parametrize(
    ("phase", "steps", "warmup", "peak", "batch", "length", "predictions"),
    [("phase1", 7038, 2001, 6e-3, 65536, 128, 20), ("phase2", 1563, 200, 4e-3, 32768, 512, 80)],
)
def test_phases_are_the_published_ones(phase, steps, warmup, peak, batch, length, predictions):
    cfg = compose([f"experiment=bert/{phase}", "pruner=slope", "pruner.lora_rank=64"])
    assert cfg.trainer.max_steps == steps
    assert round(cfg.train.scheduler.warmup_ratio * steps) == warmup
    assert (cfg.train.optimizer.name, cfg.train.optimizer.lr) == ("lamb", peak)
    assert (cfg.train.optimizer.weight_decay, cfg.train.scheduler.degree) == (0.01, 0.5)
    assert (cfg.train.global_batch_size, cfg.datamodule.max_length) == (batch, length)
    assert cfg.datamodule.masking == {
        "fraction": 0.15, "max_predictions": predictions, "whole_word": False
    }  # fmt: skip
    assert cfg.pruner.add_lora is (phase == "phase2")
    rates = LearningRates(
        peak, warmup, steps, shape="polynomial", degree=cfg.train.scheduler.degree
    )
    assert rates.model(0) == pytest.approx(peak / warmup)
    assert rates.model(warmup - 1) == pytest.approx(peak)
    for step in (warmup, steps // 2, steps - 1):
        assert rates.model(step) == pytest.approx(peak * math.sqrt(1 - step / steps))
    assert rates.model(steps) == 0
    if phase == "phase2":
        start = slope.SlopeSchedule(steps, cfg.pruner.lora_start).start_step
        assert 7038 + start == 8438
