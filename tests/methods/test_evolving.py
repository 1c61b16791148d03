"""Evolving masks against a naive dictionary of positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import slope
from slope.methods.evolving import Evolution, GradientCollector, swap
from slope.schedule import SlopeSchedule

PATTERN = slope.NMPattern(2, 4)


def layer_of(d_in=16, d_out=8, pattern="2:4", **options):
    linear = nn.Linear(d_in, d_out, dtype=torch.float64)
    return slope.SlopeLinear.from_linear(linear, pattern=pattern, **options)


def trained(layer, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(6, layer.in_features, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


def positions(tensor, keep_mask):
    """{(row, column): number} of a compressed tensor."""
    where = [tuple(place) for place in torch.nonzero(keep_mask).tolist()]
    return dict(zip(where, tensor.flatten().tolist(), strict=True))


def naive_swap(weight, keep, gradient, share, n, m):
    """Which positions leave and which come, by plain loops."""
    rows, columns = len(weight), len(weight[0])
    best = []
    for o in range(rows):
        for start in range(0, columns, m):
            group = range(start, start + m)
            kept = [i for i in group if keep[o][i]]
            pruned = [i for i in group if not keep[o][i]]
            out = min(kept, key=lambda i: (abs(weight[o][i]), i))
            new = min(pruned, key=lambda i: (-abs(gradient[o][i]), i))
            best.append((abs(gradient[o][new]), o, out, new))
    order = sorted(range(len(best)), key=lambda k: (-best[k][0], k))
    chosen = [best[k] for k in order[: round(share * len(best))] if best[k][0] > 0]
    return {(o, out) for _, o, out, _ in chosen}, {(o, new) for _, o, _, new in chosen}


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, torch.optim.SGD])
def test_swap_equals_the_naive_one_in_values_gradient_and_state(text, optimizer_of):
    layer = layer_of(pattern=text)
    options = {"momentum": 0.9} if optimizer_of is torch.optim.SGD else {}
    optimizer = optimizer_of(layer.parameters(), lr=0.01, **options)
    trained(layer, optimizer)
    state = optimizer.state[layer.values]
    names = [k for k, v in state.items() if torch.is_tensor(v) and v.shape == layer.values.shape]
    assert names
    keep = layer.keep_mask()
    before = {
        name: positions(t, keep)
        for name, t in [("values", layer.values), ("grad", layer.values.grad)]
        + [(name, state[name]) for name in names]
    }
    gradient = torch.randn(8, 16, dtype=torch.float64)
    gone, come = naive_swap(
        layer.to_dense().tolist(), keep.tolist(), gradient.tolist(), 0.5, layer.pattern.n,
        layer.pattern.m,
    )  # fmt: skip
    assert swap(layer, gradient, 0.5, optimizer) == len(come) > 0
    now = layer.keep_mask()
    assert (now.unflatten(1, (-1, layer.pattern.m)).sum(2) == layer.pattern.n).all()
    for name, tensor in [("values", layer.values), ("grad", layer.values.grad)] + [
        (name, optimizer.state[layer.values][name]) for name in names
    ]:
        kept = {place: v for place, v in before[name].items() if place not in gone}
        assert positions(tensor, now) == kept | dict.fromkeys(come, 0.0), name
    slope.compressed.check_metadata(layer.metadata, layer.pattern, layer.in_features)


def test_column_mask_and_forward_follow():
    layer = layer_of(column_mask_interval=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(3, 16, dtype=torch.float64)
    layer(x)
    swap(layer, torch.randn(8, 16, dtype=torch.float64), 1.0, optimizer)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias)
    expected = slope.masks.column_keep_mask(layer.to_dense(), layer.keep_mask(), PATTERN)
    assert torch.equal(layer.column_keep_mask(), expected)


def test_an_entry_without_gradient_does_not_come_back():
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.keep_mask()
    assert swap(layer, torch.zeros(8, 16, dtype=torch.float64), 1.0, optimizer) == 0
    assert torch.equal(layer.keep_mask(), before)


def test_collected_gradient_is_the_sum_over_micro_batches():
    layer = layer_of()
    collector = GradientCollector([layer])
    total = torch.zeros(8, 16)
    for _ in range(3):
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        total += (dy.flatten(0, 1).T @ x.flatten(0, 1)).float()
    with torch.no_grad():
        layer(torch.randn(4, 16, dtype=torch.float64))
    collector.close()
    torch.testing.assert_close(collector.gradients[layer], total)
    assert not layer._forward_hooks


def test_one_dimensional_and_named_inputs_are_collected():
    layer = layer_of()
    collector = GradientCollector([layer])
    x, dy = torch.randn(16, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    layer(x).backward(dy)
    layer(x=x).backward(dy)
    collector.close()
    torch.testing.assert_close(collector.gradients[layer], 2 * torch.outer(dy, x).float())


def test_share_decays_along_half_a_cosine_and_ends():
    evolution = Evolution(interval=10, fraction=0.4, stop=0.5)
    shares = {step: evolution.share(step, 100) for step in range(100)}
    assert {step for step, share in shares.items() if share} == {10, 20, 30, 40}
    assert shares[20] == pytest.approx(0.2 * (1 + math.cos(math.pi * 20 / 50)))
    assert shares[10] > shares[20] > shares[30] > shares[40]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "interval=0 must be a whole number of optimizer steps, at least 1"),
        ((2.5,), "interval=2.5 must be a whole number"),
        ((10, 0.0), r"fraction=0.0 is outside \(0, 1\], for example fraction=0.3"),
        ((10, 0.3, 1.5), r"stop=1.5 is outside \(0, 1\], for example stop=0.75"),
    ],
)
def test_bad_settings_are_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        Evolution(*arguments)


def test_a_scheduled_run_swaps_only_when_due_and_repeats_itself():
    def run():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))
        slope.sparsify(model, slope.SparsityConfig())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = SlopeSchedule(12, lora_start=None, evolution=Evolution(4, 0.5, 1.0))
        masks = []
        for step in range(12):
            schedule.apply(model, step)
            model(torch.randn(5, 16)).square().sum().backward()
            schedule.before_optimizer_step(model, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
            masks.append(torch.cat([m.metadata.flatten() for _, m in slope.sparse_layers(model)]))
        return masks

    masks = run()
    changed = [step for step in range(1, 12) if not torch.equal(masks[step], masks[step - 1])]
    assert changed == [4, 8]
    assert all(torch.equal(a, b) for a, b in zip(masks, run(), strict=True))
