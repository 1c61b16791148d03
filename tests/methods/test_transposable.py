"""Transposable masks against a brute force over all masks of a tile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import slope
from slope.masks import column_keep_mask, transposable_keep_mask

COUNTS = {"1:2": 2, "2:4": 90, "1:4": 24, "3:4": 24}


def all_tiles(n, m):
    """Every 0/1 matrix whose rows and columns hold n ones, by trying all of them."""
    found = []
    for bits in itertools.product((0, 1), repeat=m * m):
        rows = [bits[r * m : (r + 1) * m] for r in range(m)]
        if all(sum(row) == n for row in rows) and all(
            sum(row[c] for row in rows) == n for c in range(m)
        ):
            found.append(rows)
    return found


@pytest.mark.parametrize("text", COUNTS)
def test_no_mask_of_a_tile_keeps_more(text):
    pattern = slope.NMPattern.parse(text)
    n, m = pattern.n, pattern.m
    tiles = all_tiles(n, m)
    assert len(tiles) == COUNTS[text]
    weight = torch.randn(3 * m, 2 * m, dtype=torch.float64)
    keep_mask = transposable_keep_mask(weight, pattern)
    for top, left in itertools.product(range(0, 3 * m, m), range(0, 2 * m, m)):
        tile = weight[top : top + m, left : left + m].abs().tolist()
        best = max(
            math.fsum(tile[r][c] for r in range(m) for c in range(m) if mask[r][c])
            for mask in tiles
        )
        kept = (weight.abs() * keep_mask)[top : top + m, left : left + m].sum()
        assert kept.item() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("text", COUNTS)
def test_both_dimensions_hold_n_of_every_m(text):
    pattern = slope.NMPattern.parse(text)
    keep_mask = transposable_keep_mask(torch.randn(24, 40), pattern)
    assert (keep_mask.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all()
    assert (keep_mask.unflatten(0, (-1, pattern.m)).sum(1) == pattern.n).all()


def test_hand_computed_tile():
    weight = torch.tensor(
        [[9.0, 8.0, 1.0, 0.0], [7.0, 9.0, 0.0, 1.0], [0.0, 1.0, 9.0, 6.0], [1.0, 0.0, 5.0, 9.0]]
    )
    keep = transposable_keep_mask(weight, slope.NMPattern(2, 4))
    assert keep.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_second_pruning_drops_nothing():
    weight = torch.randn(32, 64)
    pattern = slope.NMPattern(2, 4)
    keep_mask = transposable_keep_mask(weight, pattern)
    assert torch.equal(column_keep_mask(weight * keep_mask, keep_mask, pattern), keep_mask)


def test_a_group_too_large_and_a_size_that_does_not_divide_are_errors():
    with pytest.raises(ValueError, match="pattern 2:8 has too many tiles to compare; use a"):
        transposable_keep_mask(torch.randn(8, 8), slope.NMPattern(2, 8))
    with pytest.raises(ValueError, match="out_features=6 is not divisible by m=4"):
        transposable_keep_mask(torch.randn(6, 8), slope.NMPattern(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_infinite_weight_is_kept_and_the_rest_is_chosen_as_ever(dtype):
    weight = torch.tensor(
        [[9.0, 8.0, 1.0, 0.0], [7.0, 9.0, 0.0, 1.0], [0.0, 1.0, 9.0, 6.0], [1.0, 0.0, 5.0, 9.0]]
    )
    weight = weight.to(dtype)
    expected = transposable_keep_mask(weight, slope.NMPattern(2, 4))
    weight[0, 0], weight[3, 3] = math.inf, -math.inf
    assert torch.equal(transposable_keep_mask(weight, slope.NMPattern(2, 4)), expected)
    weight[0, 2] = math.inf
    assert transposable_keep_mask(weight, slope.NMPattern(2, 4))[0].tolist() == [True, False] * 2


def test_nan_is_refused():
    weight = torch.randn(4, 4)
    weight[1, 2] = math.nan
    with pytest.raises(ValueError, match="the weight holds NaN"):
        transposable_keep_mask(weight, slope.NMPattern(2, 4))
