"""Shared settings: one seed per test, reproducible property tests, pairs of layers to compare."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import oracle
import slope

# A script of the kernels' tests, which imports Triton.
collect_ignore = [] if find_spec("triton") else ["backends/interpreted_kernels.py"]

settings.register_profile(
    "slope",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("slope")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def make_pair(
    text="2:4",
    d_in=32,
    d_out=16,
    *,
    bias=True,
    rank=0,
    dtype=torch.float64,
    exact=False,
    interval=0,
):
    """A SlopeLinear and the naive layer of the same numbers; ``exact``: every column kept."""
    pattern = slope.NMPattern.parse(text)
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    layer = slope.SlopeLinear.from_linear(linear, pattern=pattern, column_mask_interval=interval)
    naive = oracle.DenseMaskedLinear(linear.weight, linear.bias, pattern.n, pattern.m)
    if rank:
        layer.add_adapter(rank)
        with torch.no_grad():
            layer.adapter.up.normal_()  # a zero would hide half of the adapter's gradients
        naive.down = nn.Parameter(layer.adapter.down.detach().clone())
        naive.up = nn.Parameter(layer.adapter.up.detach().clone())
        naive.scale = layer.adapter.scale
    if exact:
        layer.column_mask.fill_(255)
        naive.keep_all_columns()
    return layer, naive


@pytest.fixture(name="make_pair", scope="session")
def _make_pair():
    return make_pair
