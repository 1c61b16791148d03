"""NMPattern: what is accepted, what it derives, and how it refuses nonsense."""

from __future__ import annotations

import copy

import pytest

import slope

VALID = [(n, m) for m in (2, 4, 8, 16, 32) for n in (1, m // 2, m - 1) if 0 < n < m]


@pytest.mark.parametrize(("n", "m"), VALID)
def test_parse_reads_n_of_m_and_prints_it_back(n, m):
    pattern = slope.NMPattern.parse(f"{n}:{m}")
    assert (pattern.n, pattern.m) == (n, m)
    assert str(pattern) == f"{n}:{m}"
    assert pattern.density == n / m
    assert 2**pattern.bits == m
    assert isinstance(pattern.bits, int)


def test_equal_patterns_are_equal_and_hashable():
    first, second = slope.NMPattern.parse("2:4"), slope.NMPattern(2, 4)
    assert first == second
    assert len({first, second}) == 1
    assert copy.deepcopy(first) == first
    assert first != slope.NMPattern.parse("1:2")


def test_pattern_cannot_be_changed():
    with pytest.raises((AttributeError, TypeError)):
        slope.NMPattern.parse("2:4").n = 1


@pytest.mark.parametrize(
    "text", ["", "abc", ":", "2:", ":4", "2:4:8", "2/4", "2.0:4", "-1:4", "2:-4", "two:four", "２:"]
)
def test_text_that_is_no_pattern_is_refused_with_the_value_and_an_example(text):
    with pytest.raises(ValueError, match="n:m.*2:4") as caught:
        slope.NMPattern.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["2:3", "3:6", "2:64", "1:1", "4:0"])
def test_group_that_is_no_power_of_two_up_to_32_is_refused(text):
    with pytest.raises(ValueError, match=f"{text}.*power of two.*32.*2:4"):
        slope.NMPattern.parse(text)


@pytest.mark.parametrize("text", ["0:4", "2:2", "9:8"])
def test_keeping_none_or_all_is_refused(text):
    with pytest.raises(ValueError, match=f"{text}.*at least 1 and less than m"):
        slope.NMPattern.parse(text)


def test_swapped_numbers_are_refused_with_the_right_order():
    with pytest.raises(ValueError, match=r"4:2.*[Dd]id you mean 2:4"):
        slope.NMPattern.parse("4:2")


def test_spaces_do_not_matter_and_a_pattern_is_taken_as_it_is():
    pattern = slope.NMPattern(2, 4)
    assert slope.NMPattern.parse(" 2 : 4 ") == pattern
    assert slope.NMPattern.parse(pattern) is pattern


@pytest.mark.parametrize(("n", "m"), [(4, 2), (2, 3), (0, 2), (2, 64)])
def test_constructor_refuses_what_parse_refuses(n, m):
    with pytest.raises(ValueError, match=f"{n}:{m}"):
        slope.NMPattern(n, m)
