"""A short fuzz campaign; ``scripts/fuzz_campaign.py`` is the long one."""

from __future__ import annotations

import fuzz_targets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = (
    "config parser", "layer rules", "token cache", "checkpoint file", "sharded checkpoint",
    "safetensors importer",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz_targets.Readers(tmp_path_factory.mktemp("fuzz")).targets()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_a_clear_error(targets, name):
    """Each target checks itself what it may raise, run and write."""
    seen = set()

    @settings(max_examples=60)
    @given(st.randoms(use_true_random=False))
    def search(draw):
        seen.add(targets[name](draw))

    search()
    assert "refused" in seen
    assert set(targets) == set(NAMES)
