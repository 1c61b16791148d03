"""Who is kept: row masks, column masks, random masks and Lemma 2.1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import slope
from slope import masks

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8", "2:16"]
# Few distinct magnitudes, both signs and zeros: most groups hold ties.
ENTRIES = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])


@st.composite
def weights(draw):
    """A pattern and a small weight matrix full of ties that it divides."""
    pattern = slope.NMPattern.parse(draw(st.sampled_from([*PATTERNS, "3:4", "7:8"])))
    d_out = pattern.m * draw(st.integers(1, 2))
    d_in = pattern.m * draw(st.integers(1, 3))
    flat = draw(st.lists(ENTRIES, min_size=d_out * d_in, max_size=d_out * d_in))
    return pattern, torch.tensor(flat, dtype=torch.float64).view(d_out, d_in)


def column_counts(keep: torch.Tensor, m: int) -> torch.Tensor:
    return keep.view(keep.shape[0] // m, m, keep.shape[1]).sum(1)


@given(weights())
def test_row_mask_keeps_the_n_largest_of_every_group_and_ties_go_to_the_lower_index(case):
    pattern, weight = case
    keep = masks.row_keep_mask(weight, pattern)
    assert keep.dtype == torch.bool
    assert (keep.view(weight.shape[0], -1, pattern.m).sum(-1) == pattern.n).all()
    assert torch.equal(keep, oracle.row_keep(weight, pattern.n, pattern.m))


@given(weights())
def test_column_mask_keeps_at_most_n_of_every_column_group_and_only_kept_entries(case):
    pattern, weight = case
    row = oracle.row_keep(weight, pattern.n, pattern.m)
    keep = masks.column_keep_mask(weight * row, row, pattern)
    assert keep.dtype == torch.bool
    assert (column_counts(keep, pattern.m) <= pattern.n).all()
    assert not (keep & ~row).any()
    # Nothing is dropped without need: a group keeps all that it can.
    possible = column_counts(row, pattern.m).clamp(max=pattern.n)
    assert torch.equal(column_counts(keep, pattern.m), possible)
    assert torch.equal(keep, oracle.column_keep(weight, row, pattern.n, pattern.m))


def test_a_kept_zero_outranks_a_pruned_entry_in_the_column_mask():
    pattern = slope.NMPattern.parse("1:2")
    row = torch.tensor([[True, False], [False, True]])
    weight = torch.tensor([[0.0, 5.0], [7.0, 0.0]])  # what is kept is 0.0, what is pruned is not
    assert torch.equal(masks.column_keep_mask(weight, row, pattern), row)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", PATTERNS)
def test_masks_equal_the_naive_ones_in_every_dtype(text, dtype):
    pattern = slope.NMPattern.parse(text)
    weight = torch.randn(32, 48 if pattern.m < 32 else 64).to(dtype)  # bf16 rounds: many ties
    row = masks.row_keep_mask(weight, pattern)
    assert torch.equal(row, oracle.row_keep(weight, pattern.n, pattern.m))
    column = masks.column_keep_mask(weight * row, row, pattern)
    assert torch.equal(column, oracle.column_keep(weight, row, pattern.n, pattern.m))


def test_masks_do_not_change_the_weight_and_carry_no_gradient():
    pattern = slope.NMPattern.parse("2:4")
    weight = torch.randn(8, 8, requires_grad=True)
    before = weight.detach().clone()
    row = masks.row_keep_mask(weight, pattern)
    column = masks.column_keep_mask(weight * row, row, pattern)
    assert torch.equal(weight.detach(), before)
    assert not row.requires_grad
    assert not column.requires_grad


@pytest.mark.parametrize("text", PATTERNS)
def test_lemma_2_1_formula(text):
    pattern = slope.NMPattern.parse(text)
    assert masks.imposed_sparsity(pattern) == pytest.approx(
        oracle.imposed_sparsity(pattern.n, pattern.m), abs=1e-15
    )


def test_lemma_2_1_known_values():
    known = {"1:2": 0.125, "2:4": 0.09375, "2:8": 0.05840}  # 2:8 by the paper's own formula
    for text, share in known.items():
        assert masks.imposed_sparsity(slope.NMPattern.parse(text)) == pytest.approx(share, abs=5e-6)


@pytest.mark.parametrize("kind", ["magnitude", "random"])
@pytest.mark.parametrize("text", PATTERNS)
def test_lemma_2_1_holds_on_a_large_random_matrix(text, kind):
    pattern = slope.NMPattern.parse(text)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(512, 512, generator=generator)
    if kind == "magnitude":
        row = masks.row_keep_mask(weight, pattern)
    else:
        row = masks.random_row_keep_mask(weight.shape, pattern, generator)
    column = masks.column_keep_mask(weight * row, row, pattern)
    measured = (row.double().mean() - column.double().mean()).item()
    # Column groups of one row group are weakly (negatively) correlated: five standard errors.
    error = oracle.imposed_sparsity_std(pattern.n, pattern.m, weight.numel() // pattern.m)
    assert abs(measured - oracle.imposed_sparsity(pattern.n, pattern.m)) < 5 * error


@pytest.mark.parametrize("text", PATTERNS)
def test_random_mask_keeps_n_of_every_group_and_every_position_equally_often(text):
    pattern = slope.NMPattern.parse(text)
    keep = masks.random_row_keep_mask((256, 512), pattern, torch.Generator().manual_seed(3))
    assert keep.dtype == torch.bool
    groups = keep.view(-1, pattern.m)
    assert (groups.sum(-1) == pattern.n).all()
    error = math.sqrt(pattern.density * (1 - pattern.density) / len(groups))
    assert ((groups.double().mean(0) - pattern.density).abs() < 5 * error).all()


def test_random_mask_draws_every_subset_equally_often():
    pattern = slope.NMPattern.parse("2:4")
    keep = masks.random_row_keep_mask((300, 400), pattern, torch.Generator().manual_seed(5))
    codes = (keep.view(-1, 4).long() * torch.tensor([1, 2, 4, 8])).sum(-1)
    counts = torch.bincount(codes, minlength=16)
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    expected = keep.numel() / 4 / 6
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.5  # 99.9 % point of chi-square with five degrees of freedom


def test_random_mask_depends_only_on_its_generator():
    pattern = slope.NMPattern.parse("2:4")
    first = masks.random_row_keep_mask((16, 32), pattern, torch.Generator().manual_seed(1))
    torch.rand(5)
    state = torch.get_rng_state()
    second = masks.random_row_keep_mask((16, 32), pattern, torch.Generator().manual_seed(1))
    other = masks.random_row_keep_mask((16, 32), pattern, torch.Generator().manual_seed(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state()), "the global generator must stay untouched"


def test_row_mask_refuses_a_width_that_the_pattern_does_not_divide():
    with pytest.raises(ValueError, match="10.*4"):
        masks.row_keep_mask(torch.randn(4, 10), slope.NMPattern.parse("2:4"))


@pytest.mark.parametrize("shape", [(8, 16), (4, 8, 16)])
def test_a_negative_dimension_counts_from_the_end(shape):
    scores, pattern = torch.randn(shape), slope.NMPattern(2, 4)
    for dim in range(-len(shape), 0):
        found = masks.top_n(scores, pattern, dim)
        assert torch.equal(found, masks.top_n(scores, pattern, dim + len(shape)))
        assert (found.movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("dim", [0, -2])
def test_scores_that_the_pattern_does_not_divide_are_named(dim):
    with pytest.raises(ValueError, match=r"scores\.shape\[0\]=6 is not divisible by m=4"):
        masks.top_n(torch.randn(6, 8), slope.NMPattern(2, 4), dim)


@given(weights(), st.data())
def test_nan_counts_as_zero_in_the_column_mask_so_that_no_group_keeps_too_many(case, data):
    pattern, weight = case
    row = oracle.row_keep(weight, pattern.n, pattern.m)
    flags = st.lists(st.booleans(), min_size=weight.numel(), max_size=weight.numel())
    broken = torch.tensor(data.draw(flags)).view_as(weight)
    keep = masks.column_keep_mask(weight.masked_fill(broken, math.nan) * row, row, pattern)
    assert torch.equal(keep, masks.column_keep_mask(weight.masked_fill(broken, 0.0), row, pattern))
    assert (column_counts(keep, pattern.m) <= pattern.n).all()
    columns = row.nonzero()[:, 1].view(len(row), -1)
    values = weight.masked_fill(broken, math.nan).gather(1, columns)
    survives = masks.survivors(values, columns, weight.shape[1], pattern)
    assert torch.equal(survives, keep.gather(1, columns))


def test_an_infinite_weight_survives_the_column_mask():
    weight, row = torch.tensor([[math.inf], [1.0], [2.0], [-3e38]]), torch.ones(4, 1).bool()
    keep = masks.column_keep_mask(weight, row, slope.NMPattern(2, 4))
    assert keep.flatten().tolist() == [True, False, False, True]
