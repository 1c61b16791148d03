"""slope.SparsityConfig: each setting of a wrong type is named, with its value and what to type."""

from __future__ import annotations

import math

import pytest
from torch import nn

import slope

REFUSED = [
    *(({"adapter_rank": value}, f"adapter_rank={value!r} must be a number.*adapter_rank=16")
      for value in ("4", None, True)),
    ({"column_mask_interval": "1"}, "column_mask_interval='1' must be a number, .*=100"),
    ({"column_mask_interval": True}, "column_mask_interval=True must be a number"),
    ({"unstructured_sparsity": "50"}, "unstructured_sparsity='50' must be a number or None, .*=60"),
    ({"srste_decay": "x", "method": "fst"}, "srste_decay='x' must be a number"),
    ({"adapter_scale": "x"}, "adapter_scale='x' must be a number or None, .*=0.0625"),
    *(({"adapter_scale": value}, f"adapter_scale={value} must be a finite number other than 0")
      for value in (0, 0.0, math.nan, math.inf)),
    ({"seed": "x"}, "seed='x' must be a number"),
    ({"seed": 1.5}, "seed=1.5 must be a whole number"),
    ({"seed": math.nan}, "seed=nan must be a whole number"),
    ({"reduction_dim": "False"}, "reduction_dim='False' must be True or False"),
    ({"prune_backward": "no"}, "prune_backward='no' must be True or False"),
    ({"mask_rescale": 1}, "mask_rescale=1 must be True or False"),
    ({"mvue": None}, "mvue=None must be True or False"),
    ({"skip": None}, r"skip=None must be a list, for example skip=\['lm_head'\]"),
    ({"skip": "*.mlp"}, r"skip='\*\.mlp' must be a list, for example skip=\['\*\.mlp'\]"),
    ({"skip": [3]}, "skip holds 3, which is no text"),
    ({"rules": ["ab"]}, r"rule 'ab' must be a pair \(name pattern"),
    ({"rules": [3]}, "rule 3 must be a pair"),
    ({"rules": "ab"}, r"rules='ab' must be a list, for example rules=\[\('\*\.mlp\.\*', '2:4'\)\]"),
    ({"rules": None}, "rules=None must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_a_value_of_a_wrong_type_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        slope.SparsityConfig(**options)


def test_numbers_of_other_kinds_and_other_collections_are_taken():
    slope.SparsityConfig(seed=-3, column_mask_interval=2.0, adapter_scale=-0.5, skip={"a"})
    slope.SparsityConfig(rules=[("*", slope.NMPattern(2, 4))], unstructured_sparsity=None)


@pytest.mark.parametrize(
    ("config", "typed"),
    [
        ("2:4", "SparsityConfig(pattern='2:4')"),
        (slope.NMPattern(1, 4), "SparsityConfig(pattern='1:4')"),
        ({"pattern": "2:4", "adapter_rank": 4}, "SparsityConfig(pattern='2:4', adapter_rank=4)"),
        ({}, "SparsityConfig()"),
        (4, "SparsityConfig(pattern='2:4')"),
    ],
)
def test_sparsify_says_how_to_write_what_is_no_config(config, typed):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError) as caught:
        slope.sparsify(model, config)
    assert str(caught.value) == f"config={config!r} must be a SparsityConfig; write {typed}."
