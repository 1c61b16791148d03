"""Each example runs on the demo corpus, is short, and does what it says."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch

import slope

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "make_finetune_sets")
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of the trainers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``main`` of an example, in a folder where they all share one token cache."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("examples")
    os.chdir(folder)
    yield lambda name, *args, **options: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](
        *args, **options
    )
    os.chdir(before)


def test_plain_loop(run):
    assert run("plain_loop", max_steps=10) < 512  # the vocabulary: better than guessing
    assert slope.adapters_active(slope.load_pretrained("sparse-model"))


def test_hf_trainer(run):
    trainer = run("hf_trainer", max_steps=10)
    assert slope.adapters_active(trainer.model)
    assert slope.adapters_active(slope.load_pretrained("hf-trainer/sparse"))


def test_lightning_module(run):
    assert slope.adapters_active(run("lightning_module", max_steps=10))


def test_accelerate_loop(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert slope.adapters_active(run("accelerate_loop", max_steps=10))


def test_finetune_sparse_keeps_zeros(run, capsys):
    model = run("finetune_sparse", max_steps=5)
    assert "zeros of 11 layers kept: True" in capsys.readouterr().out
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).float().mean() == 0.5
    model.save_pretrained("theirs")
    again = run("finetune_sparse", "theirs", max_steps=5)
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight == 0, weight == 0)


def test_recover_dense(run):
    dense, pruned, recovered = run("recover_dense", max_steps=45).values()
    assert recovered < pruned
    assert dense > 1


def test_every_example_is_short_and_tested():
    for name in NAMES:
        lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 60, name
        assert any(test.startswith(f"test_{name}") for test in globals()), name
