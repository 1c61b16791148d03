"""Two phases by the training program: hand-over, resume, errors."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import Runs, kill

import slope
from slope.data import prepare
from slope.finetune import settings
from slope.finetune.features import load_word_pieces
from slope.finetune.model import load_encoder
from slope.models import build_model
from slope.training import checkpoint, initial
from slope.training.masked import MaskedLanguageModule

SECOND = "bert.embeddings.position_embeddings.weight"


def kill_in_micro_batch(number):
    """Die before the ``number``-th forward of this process's training."""

    def before():
        step, seen = MaskedLanguageModule.training_step, [0]

        def training_step(self, batch, batch_idx):
            seen[0] += 1
            if seen[0] == number:
                kill()
            return step(self, batch, batch_idx)

        MaskedLanguageModule.training_step = training_step

    return before


def copied(finished, runs):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)


def handed_over(runs, init_from, *overrides):
    """The model with which a phase 2 begins."""
    cfg = runs.config(*runs.second, f"init_from={init_from}", *overrides)
    data = prepare(cfg.datamodule, progress=False)
    model = build_model(cfg.model, data.vocab_size, 32)
    initial.load_into(model, initial.read(cfg.init_from))
    return model


def test_both_phases_train_and_sum_up(finished):
    first, second = finished.summaries
    rows = finished.rows("second")
    assert (first["steps"], second["steps"]) == (8, 8)
    assert first["tokens"] == 8 * 8 * 16 and second["tokens"] == 8 * 8 * 32
    assert (first["adapters_started_at_step"], second["adapters_started_at_step"]) == (None, 7)
    assert second["unigram_val_loss"] < 4.9 and "bigram_val_loss" not in second
    assert 0 <= second["val_next_sentence_accuracy"] <= 1
    assert second["val_next_sentence_accuracy"] == float(rows[-1]["val/next_sentence_accuracy"])
    assert float(rows[-1]["train/loss"]) < 6  # the hidden tokens' alone
    assert not (finished.root / "logs" / "second" / "sample.txt").exists()
    log = (finished.root / "logs" / "second" / "run.log").read_text()
    assert "bert-demo/last.ckpt (step 8 of 8)" in log
    # Optimizer and schedule of phase 2 are new.
    assert [float(row["lr"]) for row in rows][0] == pytest.approx(1e-3)
    steps = {
        group["step"] for group in finished.last("second")["optimizer_states"][0]["param_groups"]
    }
    assert steps == {8}


def test_a_finished_run_that_is_resumed_sums_up_what_it_had(runs, finished):
    copied(finished, runs)
    name = "val_next_sentence_accuracy"
    assert runs.phase1("resume=True")[name] == finished.summaries[0][name]
    path = runs.checkpoints("bert-demo") / "last.ckpt"
    content = checkpoint.load(path)
    del content["slope"]["state"]["validated"]  # as an earlier version saved it
    checkpoint.save(content, path)
    summary = runs.phase1("resume=True")
    assert name not in summary and summary["val_loss"] == finished.summaries[0]["val_loss"]


def test_a_sparse_phase_1_keeps_its_masks_and_a_longer_table_of_positions(finished):
    before = finished.last("bert-demo")["state_dict"]
    model = handed_over(finished, finished.checkpoints("bert-demo"))
    fresh = build_model(finished.config(*finished.second).model, 128, 32)
    table = model.state_dict()[SECOND]
    assert torch.equal(table[:16], before[f"model.{SECOND}"])
    assert table.shape == fresh.state_dict()[SECOND].shape and table[16:].any(dim=1).all()
    initial.pruner.apply(finished.config(*finished.second).pruner, model)
    layers = dict(slope.sparse_layers(model))
    assert len(layers) == 9
    for name, layer in layers.items():
        assert torch.equal(layer.metadata, before[f"model.{name}.metadata"])
        assert torch.equal(layer.values, before[f"model.{name}.values"])
    # and phase 2 did not move them
    after = finished.last("second")["state_dict"]
    for name in layers:
        assert torch.equal(after[f"model.{name}.metadata"], before[f"model.{name}.metadata"])
        assert not torch.equal(after[f"model.{name}.values"], before[f"model.{name}.values"])


def test_a_dense_phase_1_gets_its_masks_by_magnitude(runs):
    runs.phase1("pruner=none", "name=dense", "trainer.max_steps=2")
    dense = runs.last("dense")["state_dict"]
    runs.phase2(
        "name=second", f"init_from={runs.checkpoints('dense')}", "trainer.max_steps=1",
        'pruner.sparsity_increment="1"', "pruner.lora_lazy=False",
    )  # fmt: skip
    after = runs.last("second")["state_dict"]
    cfg = runs.config(*runs.second, 'pruner.sparsity_increment="1"')
    model = handed_over(runs, runs.checkpoints("dense"))
    initial.pruner.apply(cfg.pruner, model)
    for name, layer in slope.sparse_layers(model):
        kept = layer.to_dense() != 0
        weight = dense[f"model.{name}.weight"].unflatten(1, (-1, layer.pattern.m))
        order = weight.abs().argsort(dim=-1, descending=True)[..., : layer.pattern.n]
        expected = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, order, True)
        assert torch.equal(kept, expected.flatten(1)), name
        assert str(layer.pattern) == ("2:8" if ".layer.1." in name else "2:4")
        assert torch.equal(after[f"model.{name}.metadata"], layer.metadata), name
    assert {"2:4", "2:8"} == {str(layer.pattern) for _, layer in slope.sparse_layers(model)}
    assert runs.rows("second")[-1]["adapters_active"] == "1"


def test_wanda_prunes_a_dense_bert_by_its_inputs(runs):
    runs.phase1("pruner=none", "name=dense", "trainer.max_steps=1")
    start = ("trainer.max_steps=1", f"init_from={runs.checkpoints('dense')}")
    runs.phase2("name=wanda", "pruner.mask=wanda", "pruner.calibration_batches=2", *start)
    runs.phase2("name=magnitude", *start)
    wanda, magnitude = (runs.last(name)["state_dict"] for name in ("wanda", "magnitude"))
    assert any(
        not torch.equal(wanda[name], magnitude[name]) for name in wanda if name.endswith("metadata")
    )


def test_what_may_not_be_meant_of_a_phase_1_is_said(runs, finished):
    start = f"init_from={finished.checkpoints('bert-demo')}"
    runs.phase2("name=dense", "pruner=none", start, "trainer.max_steps=1")
    said = (runs.root / "logs/dense/run.log").read_text()
    assert "bert-demo/last.ckpt is sparse (" in said
    assert "its zeros become weights. Type pruner=slope to keep them, unless that is m" in said
    assert "was not finished" not in said
    first = sorted(finished.checkpoints("bert-demo").glob("step_*.ckpt"))[0]
    runs.phase2("name=early", f"init_from={first}", "trainer.max_steps=1")
    said = (runs.root / "logs/early/run.log").read_text()
    assert f"the run of {first} was not finished; unless that is meant, finish it first" in said
    assert "its zeros" not in said


def test_a_tokenizer_that_cannot_serve_is_found_before_the_corpus_is_read(
    runs, finished, monkeypatch
):
    monkeypatch.setattr("slope.data.prepare", None)
    start = f"init_from={finished.checkpoints('bert-demo')}"
    with pytest.raises(ValueError, match=r"the tokenizer has no token \[PAD\]"):
        runs.phase2("name=wrong", start, "datamodule.tokenizer=gpt2")
    weights = initial.Weights(Path("one.ckpt"), {"slope": {"signature": {"vocabulary": 2048}}})
    initial.check_entries(weights, 2048)
    with pytest.raises(
        ValueError, match="one.ckpt was trained with 2,048 tokens, and .* has at most 1,024; type"
    ):
        initial.check_entries(weights, 1024)


@pytest.mark.parametrize("number", [1, 7, 15])
def test_a_killed_phase_2_ends_as_the_unbroken_one(runs, finished, number):
    """Also where phase 1 is gone, or has gone on: the checkpoint of phase 2 is all it needs."""
    copied(finished, runs)
    shutil.move(runs.checkpoints("second"), runs.checkpoints("whole"))
    shutil.move(runs.root / "logs" / "second", runs.root / "logs" / "whole")
    options = (*runs.second, "name=second")
    assert runs.fork(*options, before=kill_in_micro_batch(number)) == -signal.SIGKILL
    if number > 4:
        shutil.rmtree(runs.checkpoints("bert-demo"))
    assert runs.fork(*options, "resume=True") == 0
    runs.assert_same("whole", "second")
    columns = [row["val/next_sentence_accuracy"] for row in runs.rows("second")]
    assert columns == [row["val/next_sentence_accuracy"] for row in runs.rows("whole")]


def test_both_phases_killed_end_as_the_unbroken_ones(runs, finished):
    first, second = runs.first, (*runs.second, "name=second")
    assert runs.fork(*first, before=kill_in_micro_batch(9)) == -signal.SIGKILL
    assert runs.fork(*first, "resume=True", "datamodule.batch_size=4") == 0
    assert runs.fork(*second, before=kill_in_micro_batch(6)) == -signal.SIGKILL
    assert runs.fork(*second, "resume=True") == 0
    for name in ("bert-demo", "second"):
        theirs = runs.checkpoints(f"whole-{name}")
        shutil.copytree(finished.checkpoints(name), theirs)
        shutil.copytree(finished.root / "logs" / name, runs.root / "logs" / f"whole-{name}")
        runs.assert_same(f"whole-{name}", name)


def test_the_fine_tuner_reads_the_checkpoint(finished, tmp_path):
    chosen = settings(
        ["task=glue/sst2", f"init_from={finished.checkpoints('second')}", "max_length=32"]
    )
    encoder = load_encoder(chosen, load_word_pieces(None, chosen.init_from))
    assert encoder.pooler is not None
    known = load_word_pieces(None, chosen.init_from).backend.get_vocab()
    tokens = sorted(known, key=known.get)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*tokens[:5], *reversed(tokens[5:])]))
    with pytest.raises(
        ValueError, match=r"vocab\.txt' does not fit the .* its entry \d+ and was \d"
    ):
        load_encoder(chosen, load_word_pieces(str(path), chosen.init_from))
    assert len(list(slope.sparse_layers(encoder))) == 9


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (["init_from=nowhere/bert-phase1"], FileNotFoundError,
         "init_from=nowhere/bert-phase1 does not exist; give a checkpoint"),
        (["datamodule.max_length=64"], ValueError,
         r"max_length=64 is longer than the 32 positions .*max_position_embeddings=64"),
        (["model.config.max_position_embeddings=8", "datamodule.max_length=8"], ValueError,
         r"position_embeddings.weight is \(16, 32\) in it and \(8, 32\) here"),
        (["model.config.hidden_size=64"], ValueError, "does not fit this model"),
        (["datamodule.tokenizer=bpe:300"], ValueError, r"has no token \[PAD\]"),
        (["datamodule.masking.max_predictions=40"], ValueError, "between 1 and the 29 tokens"),
        (["trainer.precision=16-mixed"], ValueError,
         "trainer.precision=16-mixed needs a GPU.*type trainer.precision=32-true, or bf16-mixed"),
        (["trainer.precision=16"], ValueError, "trainer.precision=16 needs a GPU"),
        (["trainer.precision=fp16"], ValueError,
         "trainer.precision=fp16 is unknown; use auto, 32-true, bf16-mixed, 16-mixed, bf16-true"),
    ],
)  # fmt: skip
def test_a_phase_2_that_cannot_begin_says_why(runs, finished, overrides, error, text):
    copied(finished, runs)
    with pytest.raises(error, match=text):
        runs.phase2("name=wrong", *overrides)
    assert not runs.checkpoints("wrong").exists()


def test_a_vocabulary_that_does_not_fit_is_named(runs, finished, tmp_path):
    copied(finished, runs)
    data = prepare(runs.config(*runs.second).datamodule, progress=False)
    known = data.tokenizer.get_vocab()
    tokens = sorted(known, key=known.get)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*tokens, "more"]))
    wrong = f"with {len(tokens)} tokens, and the tokenizer of this run has {len(tokens) + 1}; type"
    with pytest.raises(ValueError, match=f"bert-demo/last.ckpt was trained {wrong} datamodule.tok"):
        runs.phase2("name=wrong", f"datamodule.tokenizer={path}")
    path.write_text("\n".join([*tokens[:5], *reversed(tokens[5:])]))
    with pytest.raises(ValueError, match=f"with another tokenizer of {len(tokens)} tokens; type"):
        runs.phase2("name=wrong", f"datamodule.tokenizer={path}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert-demo", "experiment=bert/demo pruner=slope"),
        ("bert-phase1/last.ckpt", "experiment=bert/phase1 pruner=slope"),
        ("bert-phase1-dense", "experiment=bert/phase1 name=bert-phase1-dense pruner=none"),
        ("bert-demo2-7", "experiment=bert/demo2 name=bert-demo2-7 pruner=slope"),
        ("mine", "experiment=<its configuration> name=mine"),
    ],
)
def test_phase_2_without_phase_1_says_what_to_type(runs, name, words):
    overrides = [] if name == "bert-demo" else [f"init_from={runs.root}/checkpoints/{name}"]
    with pytest.raises(
        FileNotFoundError,
        match=f"checkpoints/{name} does not exist.*, 'slope train {words}', or type "
        "init_from=checkpoints/<the name of one that is done>",
    ):
        runs.phase2(*overrides)


def test_a_gpt_is_no_phase_1(runs, bert_corpus):
    Runs(runs.root, bert_corpus).run("name=gpt", "trainer.max_steps=1")
    with pytest.raises(ValueError, match="does not fit this model"):
        runs.phase2(f"init_from={runs.checkpoints('gpt')}")


def test_another_masking_on_resume_is_said(runs, finished, caplog):
    copied(finished, runs)
    runs.phase1("resume=True", "trainer.max_steps=9", "datamodule.masking.whole_word=True")
    assert "datamodule.masking is {" in caplog.text and "other settings" in caplog.text
    assert json.loads((runs.root / "logs/bert-demo/summary.json").read_text())["steps"] == 9
