"""``slope estimate``: its arithmetic, the paper's, and what it says to wrong words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slope import cli
from slope.estimate import estimate, paper, parse

ROOT = Path(__file__).parents[2]
# Published ratios that no counting of the stated blocks gives: (model, column of the table).
UNEXPLAINED = {
    ("OPT-13B", 0), ("LLaMA-3-8B", 0), ("LLaMA-3-8B", 1), ("LLaMA-3-8B", 2),
    ("Mistral-v0.3-7B", 0), ("Mistral-v0.3-7B", 1), ("Mistral-v0.3-7B", 2),
}  # fmt: skip


def output(capsys, *words):
    assert cli.main(["estimate", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("row", paper.PUBLISHED, ids=lambda row: row.name)
def test_the_papers_memory_ratios(row):
    training = paper.training_ratio(paper.weights_of(row.model, row.blocks_training))
    assert (abs(training - row.training) <= 0.02) is (row.name != "Mistral-v0.3-7B")
    weights = paper.weights_of(row.model, row.blocks_inference)
    for column, (published, ratio) in enumerate(zip(row.inference, paper.RANK_RATIOS, strict=True)):
        close = abs(paper.inference_ratio(weights, ratio) - published) <= 0.02
        assert close is ((row.name, column) not in UNEXPLAINED), (row.name, ratio)


def test_bytes_of_a_sparse_layer_in_training():
    found = estimate(parse(["model=gpt2-small", "precision=bf16", "moments=fp32", "rank=0"]))
    model = found.model
    assert model.values == model.parameters_in_sparse_layers / 2
    dense_rest = model.parameters - model.parameters_in_sparse_layers
    sparse = found.sparse.training
    assert sparse.gradients == 2 * (model.values + dense_rest)
    assert sparse.optimizer == 8 * (model.values + dense_rest)
    # two bits of position and one of column mask per kept value: 3/16 of a byte per dense weight
    assert sparse.masks == model.parameters_in_sparse_layers * 3 / 16


def test_the_state_of_sparse_layers_alone_is_within_its_budget():
    big = estimate(parse(["model=llama3-8b", "rank=0"]))
    model, training = big.model, big.sparse.training
    rest = model.parameters - model.parameters_in_sparse_layers
    state = training.weights + training.masks + training.gradients + training.optimizer - 16 * rest
    assert state / (16 * model.parameters_in_sparse_layers) < 0.62


def test_a_model_that_does_not_fit_is_told_what_does(capsys):
    text = output(capsys, "model=opt-66b")
    assert "DOES NOT FIT" in text and re.search(r"devices=\d+ strategy=fsdp", text)
    found = json.loads(output(capsys, "model=gpt2-small", "--json"))
    assert found["sparse"]["fits"] and found["advice"] == []


def test_more_devices_hold_less_each():
    one = estimate(parse(["model=opt-13b", "batch=1"]))
    many = estimate(parse(["model=opt-13b", "batch=1", "devices=8", "strategy=fsdp"]))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(many.sparse.training, name) == getattr(one.sparse.training, name) / 8
    assert many.sparse.training.masks == one.sparse.training.masks  # held whole by each
    assert many.sparse.training.activations == one.sparse.training.activations


def test_measured_rates_are_used_where_a_shape_was_measured(capsys):
    found = json.loads(output(capsys, "model=llama3-8b", "--json"))
    assert 1.15 < found["speed_up"] < 1.35
    assert found["provenance"]["share_of_products_in_measured_shapes"] > 0.8
    other = output(capsys, "model=llama3-8b", "gpu=a100")
    assert "not measured by us: scaled by peak" in other


def test_a_pattern_without_kernels_is_not_promised_a_speed_up(capsys):
    text = " ".join(output(capsys, "model=gpt2-small", "pattern=2:8").split())
    assert "47 of 47 sparse layers (2:8) have no sparse kernels" in text
    assert "estimated at dense speed" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to estimate; add model=llama3-8b"),
        (["model=lama3-8b"], "model='lama3-8b' is unknown; did you mean model=llama3-8b?"),
        (["model=opt-125m", "gpu=h20"], "did you mean"),
        (["model=opt-125m", "sequence=5"], "unknown key 'sequence'; did you mean"),
        (["opt-125m"], "is not of the form key=value"),
        (["model=opt-125m", "seq=4096"], "seq=4096 is longer than the 2048 positions"),
        (["model=opt-125m", "rank=-1"], "rank=-1 must be 0 (no adapters), a whole number"),
        (["model=opt-125m", "rank=1.5"], "rank=1.5 must be 0"),
        (["model=opt-125m", "batch=0"], "batch=0 must be a whole number of at least 1"),
        (["model=opt-125m", "strategy=tp"], "strategy='tp' is unknown"),
        (["model=opt-125m", "moments=bf16"], "moments=bf16 goes with precision=bf16"),
        (["model=opt-125m", "pattern=4:2"], "pattern 4:2"),
        (["model=opt-125m", "experiment=demo"], "both name a model"),
        (["model=opt-125m", "layers=13"], "layers=13"),
        (["model=opt-125m", "--accounting", "papers"], "did you mean paper?"),
        (["experiment=owt/gpt2s", "--accounting", "paper"], "counts a model"),
    ],
)  # fmt: skip
def test_wrong_words(capsys, words, said):
    assert cli.main(["estimate", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_example_in_the_docs_is_what_is_printed(capsys):
    text = (ROOT / "docs" / "estimate.md").read_text()
    command, shown = re.search(r"\$ slope estimate ([^\n]*)\n(.*?)```", text, re.S).groups()
    printed = output(capsys, *command.split())
    assert [line.rstrip() for line in shown.strip().splitlines()] == [
        line.rstrip() for line in printed.strip().splitlines()
    ]
