"""The unbiased estimator: its probabilities, its expectation exactly and by simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slope
from slope.methods.mvue import draw, inclusion_probabilities, mvue_prune

PATTERNS = ["1:2", "2:4", "1:4", "2:8"]


def expectation(x, n):
    """Mean of the estimate over the uniform number, exactly: it is constant between end points."""
    p = inclusion_probabilities(x, n)
    ends = torch.cat((torch.zeros(1, dtype=x.dtype), p.where(p < 1, 0.0).cumsum(0))) % 1
    cuts = torch.cat((ends, torch.tensor([0.0, 1.0], dtype=x.dtype))).unique()
    total = torch.zeros_like(x)
    for low, high in zip(cuts[:-1], cuts[1:], strict=True):
        kept = draw(p, ((low + high) / 2).view(1))
        assert kept.sum() <= n
        total += (high - low) * torch.where(kept, x / p.where(kept, 1.0), 0.0)
    return total


@given(
    st.integers(1, 3),
    st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=4, max_size=4),
)
def test_expectation_is_the_input_exactly(n, numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(expectation(x, n), x, rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(0.001, 10), min_size=4, max_size=4), st.integers(1, 3))
def test_probabilities_sum_to_n_and_follow_the_magnitude(numbers, n):
    x = torch.tensor(numbers, dtype=torch.float64)
    p = inclusion_probabilities(x, n)
    assert p.sum().item() == pytest.approx(n)
    assert ((p > 0) & (p <= 1)).all()
    free = p < 1
    ratio = (p / x)[free]
    if len(ratio):
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
        assert (x[~free] >= x[free].max()).all()


def test_hand_computed_probabilities():
    assert inclusion_probabilities(torch.tensor([1.0, -3.0]), 1).tolist() == [0.25, 0.75]
    # 8 would get 2 x 8 / 12 > 1: it is certain, and the rest share one place.
    p = inclusion_probabilities(torch.tensor([8.0, 2.0, 1.0, 1.0]), 2)
    assert p.tolist() == [1.0, 0.5, 0.25, 0.25]
    assert inclusion_probabilities(torch.tensor([0.0, 5.0, 0.0, 0.0]), 2).tolist() == [0, 1, 0, 0]


def test_variance_is_no_more_than_that_of_any_other_probabilities():
    x = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    best = inclusion_probabilities(x, 2)
    variance = (x * x * (1 / best - 1)).sum()
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        p = torch.rand(4, generator=generator, dtype=torch.float64) + 0.01
        p = p / p.sum() * 2
        if (p <= 1).all():
            assert (x * x * (1 / p - 1)).sum() >= variance - 1e-12


@pytest.mark.parametrize("text", PATTERNS)
def test_mean_of_many_draws_is_within_its_standard_error(text):
    pattern = slope.NMPattern.parse(text)
    x = torch.randn(2 * pattern.m, 3, dtype=torch.float64)
    draws = torch.stack([mvue_prune(x, pattern, 0) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    # 4.5 standard errors: one of 10^5 entries by chance, and there are at most 48.
    assert ((draws.mean(0) - x).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("text", PATTERNS)
def test_groups_hold_at_most_n_and_the_ragged_tail_stays(text, dim):
    pattern = slope.NMPattern.parse(text)
    size = 3 * pattern.m + 1
    x = torch.randn(size, size)
    pruned = mvue_prune(x, pattern, dim)
    assert pruned.shape == x.shape
    along = pruned.movedim(dim, -1)
    head = along[:, : 3 * pattern.m].unflatten(1, (-1, pattern.m))
    assert ((head != 0).sum(-1) <= pattern.n).all()
    torch.testing.assert_close(along[:, -1], x.movedim(dim, -1)[:, -1], rtol=0, atol=0)


def test_zeros_stay_zero_and_short_inputs_are_left_alone():
    assert mvue_prune(torch.zeros(8, 2), slope.NMPattern(2, 4), 0).abs().sum() == 0
    x = torch.randn(3, 5)
    assert torch.equal(mvue_prune(x, slope.NMPattern(2, 4), 0), x)


def test_the_default_generator_repeats_a_draw():
    x = torch.randn(16, 4)
    torch.manual_seed(5)
    first = mvue_prune(x, slope.NMPattern(2, 4), 0)
    torch.manual_seed(5)
    assert torch.equal(mvue_prune(x, slope.NMPattern(2, 4), 0), first)
    assert not torch.equal(mvue_prune(x, slope.NMPattern(2, 4), 0), first)
