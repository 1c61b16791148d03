"""Dense to (values, metadata) and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import slope
from slope import compressed, masks

PATTERNS = ["1:2", "2:4", "1:4", "3:4", "2:8", "4:8", "2:16", "8:16", "4:32"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_case(text: str, d_out: int, groups: int, seed: int, dtype=torch.float32):
    pattern = slope.NMPattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, groups * pattern.m, generator=generator).to(dtype)
    keep = masks.random_row_keep_mask(weight.shape, pattern, generator)
    return pattern, weight, keep


@given(
    st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_decompress_undoes_compress(text, d_out, groups, seed, dtype):
    pattern, weight, keep = random_case(text, d_out, groups, seed, dtype)
    packed = compressed.compress(weight, keep, pattern)
    kept = weight.shape[1] * pattern.n // pattern.m
    assert packed.values.shape == (d_out, kept)
    assert packed.values.dtype == dtype
    assert packed.metadata.dtype == torch.uint8
    assert packed.metadata.shape == (d_out, math.ceil(kept * pattern.bits / 8))
    assert torch.equal(packed.values, oracle.kept_values(weight, keep))
    dense = compressed.decompress(packed.values, packed.metadata, pattern, weight.shape[1])
    assert dense.dtype == dtype
    assert torch.equal(dense, weight * keep)
    found = compressed.keep_mask_from_metadata(packed.metadata, pattern, weight.shape[1])
    assert found.dtype == torch.bool
    assert torch.equal(found, keep)


@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_metadata_is_a_little_endian_stream_of_positions(text, d_out, groups, seed):
    pattern, weight, keep = random_case(text, d_out, groups, seed)
    metadata = compressed.compress(weight, keep, pattern).metadata
    for row, bytes_ in zip(keep.tolist(), metadata.tolist(), strict=True):
        positions = [i % pattern.m for i, kept in enumerate(row) if kept]
        assert bytes_ == oracle.bit_stream(positions, pattern.bits)


@given(st.lists(st.lists(st.booleans(), min_size=19, max_size=19), min_size=1, max_size=4))
def test_bits_are_packed_low_bit_first_and_unpack_to_the_same(rows):
    bits = torch.tensor(rows)
    packed = compressed.pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [oracle.bit_stream([int(b) for b in row], 1) for row in rows]
    assert torch.equal(compressed.unpack_bits(packed, bits.shape[-1]).bool(), bits)


def test_a_kept_zero_survives_the_round_trip():
    pattern = slope.NMPattern.parse("2:4")
    weight = torch.tensor([[0.0, 9.0, -0.0, 9.0]])
    keep = torch.tensor([[True, False, True, False]])
    packed = compressed.compress(weight, keep, pattern)
    assert torch.equal(packed.values, torch.zeros(1, 2))
    assert torch.equal(compressed.keep_mask_from_metadata(packed.metadata, pattern, 4), keep)


@pytest.mark.parametrize("text", PATTERNS)
def test_metadata_costs_log2_m_bits_per_kept_value(text):
    pattern, weight, keep = random_case(text, 16, 8, 0)
    packed = compressed.compress(weight, keep, pattern)
    assert packed.metadata.numel() * 8 == packed.values.numel() * pattern.bits


def test_compress_refuses_a_width_that_the_pattern_does_not_divide():
    pattern = slope.NMPattern.parse("2:4")
    with pytest.raises(ValueError, match="10.*4"):
        compressed.compress(torch.randn(2, 10), torch.ones(2, 10, dtype=torch.bool), pattern)


@pytest.mark.parametrize("row", [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
def test_compress_refuses_a_mask_without_exactly_n_per_group(row):
    pattern = slope.NMPattern.parse("2:4")
    keep = torch.tensor([[1, 1, 0, 0] + row], dtype=torch.bool)
    with pytest.raises(ValueError, match="2"):
        compressed.compress(torch.randn(1, 8), keep, pattern)


@pytest.mark.parametrize("in_features", [12, 14, 18, 32])
def test_decompress_refuses_another_width(in_features):
    weight, keep = torch.arange(16.0).view(1, 16), torch.tensor([[True, False] * 8])
    packed = compressed.compress(weight, keep, slope.NMPattern(2, 4))
    with pytest.raises(ValueError, match=f"8 values of a row .* in_features=16, not {in_features}"):
        compressed.decompress(*packed, slope.NMPattern(2, 4), in_features)


def test_compress_does_not_share_memory_with_the_weight():
    pattern, weight, keep = random_case("2:4", 4, 2, 0)
    packed = compressed.compress(weight, keep, pattern)
    before = packed.values.clone()
    weight.zero_()
    assert torch.equal(packed.values, before)


def test_a_mask_of_another_shape_is_refused_though_it_holds_as_many_entries():
    weight, pattern = torch.randn(8, 16), slope.NMPattern(2, 4)
    mask = masks.row_keep_mask(torch.randn(16, 8), pattern)
    with pytest.raises(ValueError, match=r"shape \(16, 8\), but the weight is 8 x 16.*transpose"):
        compressed.compress(weight, mask, pattern)
    with pytest.raises(ValueError, match=r"the mask is \(O, I\): transpose it for a Conv1D"):
        slope.SlopeLinear.from_linear(torch.nn.Linear(16, 8), mask)
