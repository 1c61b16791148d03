"""Which known name a wrong one is taken for."""

from __future__ import annotations

import pytest

from slope.spelling import did_you_mean, nearest

OPTIONS = ["seed", "train.optimizer.lr", "pruner.lora_lr", "pruner.lora_rank", "trainer.max_steps"]
MODELS = ["bert/base", "gpt2/large", "gpt2/small", "opt/125m"]


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("lr", OPTIONS, "train.optimizer.lr"),
        ("lora_rank", OPTIONS, "pruner.lora_rank"),
        ("trainer.max_step", OPTIONS, "trainer.max_steps"),
        ("SEED", OPTIONS, "seed"),
        ("gpt2", MODELS, "gpt2/large"),
        ("gpt2/smal", MODELS, "gpt2/small"),
        ("sequence", ["devices", "seq"], "seq"),
        ("trainer.devices", ["devices", "seq"], "devices"),
        ("foo", OPTIONS, None),
        ("x", ["lr", "exact"], None),
        ("", OPTIONS, None),
        ("seed", [], None),
    ],
)
def test_nearest(word, known, expected):
    assert nearest(word, known) == expected


def test_the_end_of_a_sentence():
    assert did_you_mean("sed", OPTIONS) == "; did you mean 'seed'?"
    assert did_you_mean("sed", OPTIONS, "{}=") == "; did you mean seed=?"
    assert did_you_mean("foo", OPTIONS) == "."
