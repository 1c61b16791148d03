"""What is pruned in a BERT for pretraining, and what its objective is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from slope.bench import models as bench_models
from slope.configs import compose
from slope.models import build_model, structure
from slope.training import pruner
from slope.training.masked import MaskedLanguageModule
from slope.training.optim import LearningRates

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
QKV = ("query", "key", "value")


def build():
    torch.manual_seed(0)
    return build_model({"family": "bert", "config": CONFIG}, 50, 16)


def sparsify(*options):
    model = build()
    return pruner.apply(compose(["pruner=slope", *options]).pruner, model), structure(model)


def kinds(report):
    return {layer.name: layer.kind for layer in report.layers}


def attention(block):
    names = [*(f"self.{name}" for name in QKV), "output.dense"]
    return {f"bert.encoder.layer.{block}.attention.{name}" for name in names}


def mlp(block):
    return {f"bert.encoder.layer.{block}.{name}.dense" for name in ("intermediate", "output")}


def test_some_layers_are_dense_whatever_the_options_and_say_why():
    report, _ = sparsify()
    dense = {layer.name: layer.reason for layer in report.layers if layer.kind == "dense"}
    assert set(dense) == {
        *(f"bert.encoder.layer.0.attention.self.{name}" for name in QKV), "bert.pooler.dense",
        "cls.predictions.transform.dense", "cls.predictions.decoder", "cls.seq_relationship",
    }  # fmt: skip
    assert all(dense.values())
    assert "tied to bert.embeddings.word_embeddings.weight" in dense["cls.predictions.decoder"]
    assert "first linear layer" in dense["bert.encoder.layer.0.attention.self.query"]


@pytest.mark.parametrize(
    ("option", "dense"),
    [
        ("skip_attention", attention(0) | attention(1) | attention(2)),
        ("skip_first_block", attention(0) | mlp(0)),
        ("skip_last_block", attention(2) | mlp(2)),
    ],
)
def test_skip_options_mean_what_they_mean_elsewhere(option, dense):
    report, _ = sparsify(f"pruner.{option}=True")
    inside = {name: kind for name, kind in kinds(report).items() if ".layer." in name}
    first = {name for name in attention(0) if "self" in name}
    assert {name for name, kind in inside.items() if kind == "dense"} == dense | first


def test_rules_and_increments():
    report, parts = sparsify(
        'pruner.sparsity_increment="0,1,-1"', "pruner.rules=[['*.2.output.dense',dense]]"
    )
    found = kinds(report)
    assert found[f"{parts.blocks[0]}.attention.output.dense"] == "2:8"
    assert found[f"{parts.blocks[1]}.attention.output.dense"] == "2:4"
    assert found[f"{parts.blocks[2]}.output.dense"] == "dense"


def test_a_rule_may_prune_pooler_and_transform_but_no_head():
    report, _ = sparsify("pruner.rules=[['bert.pooler.*','2:8'],['cls.*','2:4']]")
    found = kinds(report)
    assert found["bert.pooler.dense"] == "2:8"
    assert found["cls.predictions.transform.dense"] == "2:4"
    assert found["cls.predictions.decoder"] == found["cls.seq_relationship"] == "dense"


def test_the_increments_of_bert_large_are_in_halves():
    def halves(text):
        cfg = compose(
            ["experiment=bert/phase2", "pruner=slope", f"pruner.sparsity_increment={text}"]
        )
        with torch.device("meta"):
            model = build_model(cfg.model, 30522, 512)
            found = kinds(pruner.apply(cfg.pruner, model, choose_masks=False))
        blocks = structure(model).blocks
        return [
            {kind for name, kind in found.items() if any(name.startswith(f"{b}.") for b in half)}
            for half in (blocks[1:12], blocks[12:])
        ]

    assert halves("12") == [{"2:4"}, {"2:8"}]
    assert halves('"0,12,-1"') == [{"2:8"}, {"2:4"}]


def batch():
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 50, (4, 16), generator=draw)
    present = torch.ones_like(ids)
    present[1, 11:] = ids[1, 11:] = 0
    positions = torch.tensor([[3, 7, 1], [2, 9, 0], [12, 0, 0], [5, 6, 7]])
    labels = torch.tensor([[8, 9, 10], [11, 12, -100], [13, -100, -100], [14, 15, 16]])
    kinds = (torch.arange(16) > 6).long().expand_as(ids) * present
    return {
        "input_ids": ids, "token_type_ids": kinds, "attention_mask": present,
        "positions": positions, "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }  # fmt: skip


def module(model):
    return MaskedLanguageModule(model, LearningRates(1e-3, 0, 1), {}, False)


def test_the_objective_is_that_of_transformers_at_the_hidden_places():
    model = build().double()
    given = batch()
    everywhere = torch.full_like(given["input_ids"], -100)
    for row, (places, labels) in enumerate(zip(given["positions"], given["labels"], strict=True)):
        known = labels != -100
        everywhere[row, places[known]] = labels[known]
    reference = copy.deepcopy(model)
    expected = reference(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"],
        token_type_ids=given["token_type_ids"], labels=everywhere,
        next_sentence_label=given["next_sentence_label"],
    )  # fmt: skip
    expected.loss.backward()
    ours = module(model)
    loss = ours.training_step(given, 0)
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    for (name, parameter), other in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    order = expected.seq_relationship_logits
    tokens = expected.loss - functional.cross_entropy(order, given["next_sentence_label"])
    torch.testing.assert_close(ours.loss(given), tokens)
    torch.testing.assert_close(ours.losses, [tokens.detach()])
    (measured, predicted), (right, rows) = ours.evaluate(given)
    torch.testing.assert_close(measured, tokens)
    assert (int(predicted), rows) == (9, 4)
    assert right == (order.argmax(-1) == given["next_sentence_label"]).double().mean()


def test_the_benchmarks_of_causal_models_refuse_it():
    with pytest.raises(ValueError, match="--models bert-large: causal models .* slope estimate mo"):
        bench_models.overrides("bert-large")


def test_a_batch_without_hidden_tokens_has_no_loss_but_a_number():
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    assert module(build()).loss(given) == 0


def test_the_vocabulary_is_multiplied_at_hidden_places_only():
    model = build()
    shapes = []
    model.cls.predictions.decoder.register_forward_hook(
        lambda layer, inputs, output: shapes.append(tuple(output.shape))
    )
    module(model).training_step(batch(), 0)
    assert shapes == [(4, 3, 56)]
    assert model.config._attn_implementation == "sdpa"
