"""Twenty optimizer steps on compressed values equal twenty steps of dense-masked training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import oracle
import slope

STEPS, MICRO_BATCHES = 20, 2
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov_foreach": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True
    ),
    "adamw_loop": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


class Model(nn.Module):
    """Two linear layers to prune, with a norm and a head that stay dense."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32, dtype=torch.float64)
        self.down = nn.Linear(32, 16, bias=False, dtype=torch.float64)
        self.norm = nn.LayerNorm(16, dtype=torch.float64)
        self.lm_head = nn.Linear(16, 8, dtype=torch.float64)

    def forward(self, x):
        return self.lm_head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def twins(text, interval):
    """The same model twice: sparse by the library, masked by hand."""
    sparse = Model()
    masked = copy.deepcopy(sparse)
    n, m = (int(part) for part in text.split(":"))
    for name in ("up", "down"):
        layer = getattr(masked, name)
        setattr(masked, name, oracle.DenseMaskedLinear(layer.weight, layer.bias, n, m))
    slope.sparsify(sparse, slope.SparsityConfig(pattern=text, column_mask_interval=interval))
    return sparse, masked


def train(model, make_optimizer, before_step):
    """Clipped, accumulated training on fixed data; returns the gradient norms."""
    optimizer = make_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, STEPS)
    data = torch.Generator().manual_seed(11)
    norms = []
    for step in range(STEPS):
        before_step(model, step)
        for _ in range(MICRO_BATCHES):
            x = torch.randn(6, 16, dtype=torch.float64, generator=data)
            y = torch.randint(0, 8, (6,), generator=data)
            (nn.functional.cross_entropy(model(x), y) / MICRO_BATCHES).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return norms, optimizer


def assert_same_model(sparse, masked):
    for name in ("up", "down"):
        layer, naive = getattr(sparse, name), getattr(masked, name)
        torch.testing.assert_close(layer.to_dense(), naive.weight.detach(), rtol=0, atol=1e-12)
        assert not naive.weight.detach()[~naive.row].any(), "the comparison itself must stay masked"
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias, naive.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(sparse.lm_head.weight, masked.lm_head.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", ["kept", "each_step", "every_seventh", "never"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_equal_dense_masked_training(optimizer, columns):
    interval = {"kept": 0, "each_step": 1, "every_seventh": 7, "never": 0}[columns]
    sparse, masked = twins("2:4", interval)
    schedule = slope.SlopeSchedule(STEPS, lora_start=None)
    layers = [masked.up, masked.down]
    if columns == "kept":
        for _, layer in slope.sparse_layers(sparse):
            layer.column_mask.fill_(255)
        for layer in layers:
            layer.keep_all_columns()

    def refresh(model, step):
        if interval and step % interval == 0:
            for layer in layers:
                layer.refresh()

    start = sparse.up.to_dense()
    norms, state = train(sparse, OPTIMIZERS[optimizer], schedule.apply)
    expected, _ = train(masked, OPTIMIZERS[optimizer], refresh)
    assert norms == pytest.approx(expected, rel=1e-9)
    assert any(norm > 0.5 for norm in norms), "clipping must have been at work"
    assert_same_model(sparse, masked)
    assert (sparse.up.to_dense() - start).abs().max() > 0.01, "training must have moved the weights"
    for tensor in state.state[sparse.up.values].values():
        if torch.is_tensor(tensor) and tensor.ndim:
            assert tensor.shape == (32, 8)


@pytest.mark.parametrize("text", ["1:2", "1:4", "4:8", "2:16"])
def test_other_patterns_train_equally(text):
    sparse, masked = twins(text, 1)
    apply = slope.SlopeSchedule(STEPS, lora_start=None).apply

    def refresh(model, step):
        model.up.refresh()
        model.down.refresh()

    train(sparse, OPTIMIZERS["adamw_fused"], apply)
    train(masked, OPTIMIZERS["adamw_fused"], refresh)
    assert_same_model(sparse, masked)


def test_training_through_the_adapters_start_equals_the_hand_written_adapter():
    sparse, masked = Model(), None
    masked = copy.deepcopy(sparse)
    for name in ("up", "down"):
        layer = getattr(masked, name)
        setattr(masked, name, oracle.DenseMaskedLinear(layer.weight, layer.bias, 2, 4))
    slope.sparsify(sparse, slope.SparsityConfig(adapter_rank=4, column_mask_interval=1))
    for name in ("up", "down"):
        layer, naive = getattr(sparse, name), getattr(masked, name)
        naive.down = nn.Parameter(layer.adapter.down.detach().clone())
        naive.up = nn.Parameter(layer.adapter.up.detach().clone())
        naive.scale = 1 / 4
    schedule = slope.SlopeSchedule(STEPS, lora_start=0.7)

    def by_hand(model, step):
        for layer in (model.up, model.down):
            layer.refresh()
            layer.active = step >= 14

    train(sparse, OPTIMIZERS["adamw_fused"], schedule.apply)
    train(masked, OPTIMIZERS["adamw_fused"], by_hand)
    assert_same_model(sparse, masked)
    assert sparse.up.adapter.up.abs().max() > 1e-3
    for name in ("up", "down"):
        layer, naive = getattr(sparse, name), getattr(masked, name)
        torch.testing.assert_close(layer.adapter.up.detach(), naive.up.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(
            layer.adapter.down.detach(), naive.down.detach(), atol=1e-12, rtol=0
        )


def test_optimizer_state_of_a_sparse_layer_is_n_of_m_of_dense():
    for text in ("2:4", "2:8"):
        n, m = (int(part) for part in text.split(":"))
        sparse, _ = twins(text, 1)
        _, optimizer = train(sparse, OPTIMIZERS["adamw_fused"], lambda model, step: None)
        for layer in (sparse.up, sparse.down):
            state = optimizer.state[layer.values]
            numel = sum(t.numel() for t in state.values() if torch.is_tensor(t) and t.ndim)
            assert numel == 2 * layer.in_features * layer.out_features * n // m


def test_training_resumes_exactly_from_saved_state():
    """Model and optimizer state through plain state_dicts, cut in the middle."""
    make = OPTIMIZERS["adamw_fused"]

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            seed = torch.Generator().manual_seed(step)
            x = torch.randn(6, 16, dtype=torch.float64, generator=seed)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, _ = twins("2:4", 1)
    cut = copy.deepcopy(whole)
    optimizer = make(whole.parameters())
    steps(whole, optimizer, 0, 8)
    optimizer = make(cut.parameters())
    steps(cut, optimizer, 0, 3)
    torch.manual_seed(5)
    fresh, _ = twins("2:4", 1)
    fresh.load_state_dict(copy.deepcopy(cut.state_dict()))
    resumed = make(fresh.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(fresh, resumed, 3, 8)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
