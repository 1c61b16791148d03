"""Whole fine-tunings of a tiny BERT: what stays, what is written, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil

import pytest
import torch
import transformers
from tiny_bert import (
    VOCABULARY,
    VOCABULARY_SIZE,
    chosen,
    sparse_model,
    tiny_model,
    write_squad,
    write_sst2,
    write_vocabulary,
)

import slope
from slope.export import save_dense
from slope.finetune import finetune, settings
from slope.finetune.features import load_word_pieces
from slope.finetune.model import load_encoder, with_head
from slope.layers import adapter_layers
from slope.linear import SlopeLinear
from slope.models import build_model
from slope.training import checkpoint
from slope.training import pruner as pruning

SST2 = ("task=glue/sst2", "lr=3e-3", "epochs=4", "batch_size=8", "seeds=[0,1]")
SQUAD = ("task=squad", "lr=2e-3", "epochs=6", "batch_size=8", "gradient_clip_val=5", "seeds=[0]")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A sparse checkpoint with its vocabulary, and both task sets; do not write into them."""
    folder = tmp_path_factory.mktemp("place")
    slope.save_pretrained(sparse_model(), folder / "sparse")
    write_vocabulary(folder / "sparse")
    write_sst2(folder / "SST-2")
    write_squad(folder / "squad")
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """The settings and the summary of a fine-tuning over two seeds, models saved."""
    options = chosen(*SST2, *common(place), "name=finished", "save=true")
    return options, finetune(options)


def common(place, init_from="sparse", data="SST-2"):
    return (
        f"init_from={place / init_from}", f"data={place / data}", f"root={place}",
        f"tokenizer={place / 'sparse' / 'vocab.txt'}",
    )  # fmt: skip


SIZES = {
    "bert": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": VOCABULARY_SIZE,
    },
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": None},
}  # fmt: skip


def pretrain(folder, vocabulary=VOCABULARY_SIZE, family="bert", awake=False, **pruner):
    """A model as the training program builds it, and the checkpoint of its run."""
    torch.manual_seed(0)
    model = build_model({"family": family, "config": SIZES[family]}, VOCABULARY_SIZE, 64)
    section = dict(pruning.defaults())
    section |= {"pruned_matrix": "static-weight", "mask_seed": 0, **pruner}
    pruning.apply(section, model)
    if awake:
        wake(model)
    signature = {"model.family": family, "vocabulary": vocabulary, "datamodule.max_length": 64}
    signature |= {"trainer.max_steps": 100}
    signature |= {f"model.config.{key}": value for key, value in SIZES[family].items()}
    signature |= {f"pruner.{key}": value for key, value in section.items()}
    content = {
        "global_step": 100,
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "slope": {"signature": signature},
    }
    checkpoint.save(content, folder / "last.ckpt")
    return model


def wake(model):
    """Adapters active, and trained."""
    slope.activate_adapters(model)
    with torch.no_grad():
        for adapter in slope.layers.adapters(model):
            adapter.up.normal_(std=0.02)


def test_fine_tuning_learns_the_small_task(finished):
    _, summary = finished
    assert summary["metrics"]["accuracy"]["mean"] > 90
    assert summary["layers"].startswith("sparsified 10 of 14 linear layers (2:4)")


def test_zeros_stay_and_values_are_trained(finished, place):
    before = slope.load_pretrained(place / "sparse").bert
    after = slope.load_pretrained(finished[0].directory / "seed0" / "model")
    assert type(after).__name__ == "BertForSequenceClassification"
    layers = dict(slope.sparse_layers(before))
    assert layers
    for name, layer in slope.sparse_layers(after.bert):
        assert torch.equal(layer.keep_mask(), layers[name].keep_mask())
        assert not torch.equal(layer.values, layers[name].values)


def test_seeds_differ_and_reproduce(finished, place):
    again = chosen(*SST2, *common(place), "name=again", "seeds=[1]")
    finetune(again)

    def losses(options, seed):
        return (options.directory / f"seed{seed}" / "losses.csv").read_text()

    assert losses(again, 1) == losses(finished[0], 1)
    assert losses(finished[0], 0) != losses(finished[0], 1)


def test_the_folder_holds_a_table_of_mean_and_spread(finished):
    options, summary = finished
    folder = options.directory
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"]
    values = [float(row["accuracy"]) for row in rows]
    entry = json.loads((folder / "summary.json").read_text())["metrics"]["accuracy"]
    assert entry["mean"] == pytest.approx(sum(values) / 2)
    assert entry["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    last = (folder / "results.md").read_text().splitlines()[-1]
    assert last.startswith(f"| mean | {entry['mean']:.2f} ± {entry['std']:.2f} |")
    assert (folder / "seed0" / "dev.tsv").read_text().startswith("index\tprediction\n0\t")
    assert entry == summary["metrics"]["accuracy"]


def test_a_finished_seed_is_not_repeated(finished, monkeypatch):
    options, summary = finished
    from slope.finetune import loop

    monkeypatch.setattr(loop, "train", None)
    assert finetune(options) == summary
    # The table is of all that the folder holds.
    assert finetune(dataclasses.replace(options, seeds=[1])) == summary


def test_a_folder_of_other_settings_is_left_alone(finished, place):
    before = {path: path.read_bytes() for path in finished[0].directory.glob("*.*")}
    with pytest.raises(
        ValueError, match=r"finished' is of other settings: lr is 0\.003 in it and "
    ):
        finetune(chosen(*SST2, *common(place), "name=finished", "save=true", "lr=1e-3"))
    assert {path: path.read_bytes() for path in finished[0].directory.glob("*.*")} == before


def test_a_folder_of_something_else_is_left_alone(place):
    folder = place / "logs" / "foreign"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else; type name=<another>"):
        finetune(chosen(*SST2, *common(place), "name=foreign"))


def test_dense_fine_tuning_fills_the_zeros(place):
    options = chosen(
        *SST2, *common(place), "name=dense", "dense=true", "save=true", "epochs=1", "seeds=[0]"
    )
    summary = finetune(options)
    assert summary["layers"].startswith("sparsified 0 of 14")
    folder = options.directory / "seed0" / "model"
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    name, layer = next(slope.sparse_layers(slope.load_pretrained(place / "sparse").bert))
    weight = model.bert.get_submodule(name).weight
    assert (layer.to_dense() == 0).any()
    assert (weight[~layer.keep_mask()] != 0).all()


def test_squad_is_learned_from_a_run_s_checkpoint(place, tmp_path):
    pretrain(tmp_path)
    summary = finetune(chosen(*SQUAD, *common(place, data="squad"), f"init_from={tmp_path}"))
    assert summary["metrics"]["f1"]["mean"] > 90
    assert summary["metrics"]["f1"]["std"] is None
    answers = place / "logs" / "finetune-squad" / "seed0" / "predictions.json"
    assert len(json.loads(answers.read_text())) == 24


def encoder_of(place, init_from, *overrides):
    options = chosen("task=glue/sst2", f"init_from={init_from}", *overrides)
    return load_encoder(options, load_word_pieces(str(place / "sparse" / "vocab.txt"), "x"))


def test_a_run_s_checkpoint_keeps_masks_values_and_awake_adapters(place, tmp_path):
    model = pretrain(tmp_path, awake=True, add_lora=True, lora_rank=4)
    encoder = encoder_of(place, tmp_path)
    assert slope.adapters_active(encoder)
    ids = torch.tensor([[2, 5, 6, 3]])
    expected = model.eval().base_model(ids).last_hidden_state
    torch.testing.assert_close(encoder.eval()(ids).last_hidden_state, expected)
    dense = encoder_of(place, tmp_path, "dense=true")
    assert not list(slope.sparse_layers(dense))
    torch.testing.assert_close(dense.eval()(ids).last_hidden_state, expected)


def test_masks_of_a_method_that_moves_them_are_fixed(place, tmp_path):
    pretrain(tmp_path, pruned_matrix="dynamic-weight")
    layers = dict(slope.sparse_layers(encoder_of(place, tmp_path)))
    assert all(type(layer) is SlopeLinear for layer in layers.values())
    assert len(layers) > 8


def test_unstructured_masks_stay(place, tmp_path):
    pretrain(tmp_path, unstructured_masking=True)
    encoder = encoder_of(place, tmp_path)
    kinds = {layer.kind for layer in slope.sparsity_report(encoder).sparse}
    assert kinds == {"60%"}


def test_a_dense_checkpoint_of_transformers_is_fine_tuned_too(place, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "dense")
    encoder = encoder_of(place, tmp_path / "dense")
    assert torch.equal(encoder.pooler.dense.weight, model.bert.pooler.dense.weight)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A sparse BERT, and the folder of its export for transformers with adapters; read only.

    A layer of the head that is dropped has an adapter too.
    """
    model = tiny_model()
    skip = ["cls.predictions.decoder", "cls.seq_relationship"]
    slope.sparsify(model, slope.SparsityConfig(skip=skip, adapter_rank=4, adapter_scale=0.3))
    wake(model)
    folder = save_dense(model, tmp_path_factory.mktemp("exported") / "hf")
    write_vocabulary(folder)
    return model.eval(), folder


def test_an_export_for_transformers_is_read_with_its_adapters(place, exported):
    model, folder = exported
    encoder = encoder_of(place, folder)
    before, after = (dict(adapter_layers(part)) for part in (model.bert, encoder))
    assert len(before) == 10 and before.keys() == after.keys()
    for name, layer in after.items():
        theirs = before[name].adapter
        assert layer.adapter.active and layer.adapter.scale == theirs.scale == 0.3
        assert torch.equal(layer.adapter.down, theirs.down)
        assert torch.equal(layer.adapter.up, theirs.up)
        assert torch.equal(layer.to_dense(), before[name].to_dense())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    ids = torch.tensor([[2, 5, 6, 3]])
    expected = model.bert(ids)
    head = with_head(encoder, "BertForSequenceClassification", 2).eval()
    dense = encoder_of(place, folder, "dense=true").eval()
    assert not dict(adapter_layers(dense))
    for found in (encoder.eval()(ids), head.bert(ids), dense(ids)):
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    plain = transformers.BertModel.from_pretrained(folder).eval()
    assert not torch.allclose(plain(ids).last_hidden_state, expected.last_hidden_state, atol=1e-4)


def test_what_was_fine_tuned_with_adapters_beside_dense_weights_is_saved_dense(place, exported):
    folder = exported[1]
    words = (*common(place), f"init_from={folder}", "name=adapted", "save=true", "seeds=[0]")
    options = chosen(*SST2, *words)
    summary = finetune(options)
    assert summary["metrics"]["accuracy"]["mean"] > 90
    assert summary["layers"].startswith("sparsified 0 of 14")
    saved, result = options.directory / "seed0" / "model", options.directory / "seed0" / "dev.tsv"
    kind = transformers.BertForSequenceClassification
    model, info = kind.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pieces = load_word_pieces(None, str(saved))
    told = [line.split("\t")[1] for line in result.read_text().splitlines()[1:]]
    sentences = (place / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    for line, label in zip(sentences, told, strict=True):
        ids = torch.tensor([pieces.backend.encode(line.split("\t")[0]).ids])
        assert model.eval()(ids).logits.argmax().item() == int(label)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_export_that_has_lost_half_of_its_adapters_is_refused(place, exported, tmp_path, name):
    shutil.copytree(exported[1], tmp_path / "hf")
    (tmp_path / "hf" / "adapter" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}' is missing; the folder is incomplete"):
        encoder_of(place, tmp_path / "hf")


def test_a_checkpoint_without_pooler_gets_a_new_one(place):
    encoder = encoder_of(place, place / "sparse")
    encoder.pooler = None
    assert with_head(encoder, "BertForSequenceClassification", 2).bert.pooler is not None
    assert with_head(encoder, "BertForQuestionAnswering", 2).bert.pooler is None


def test_a_model_of_another_family_is_refused(place, tmp_path):
    pretrain(tmp_path, family="gpt2")
    with pytest.raises(ValueError, match="is a gpt2 model, and only BERT can be fine-tuned"):
        encoder_of(place, tmp_path)


def test_a_vocabulary_of_another_size_is_refused(place, tmp_path):
    pretrain(tmp_path, vocabulary=VOCABULARY_SIZE - 1)
    with pytest.raises(ValueError, match=r"has 36 entries and the checkpoint .* trained with 35"):
        encoder_of(place, tmp_path)
    (tmp_path / "more.txt").write_text("\n".join([*VOCABULARY, "extra"]))
    pieces = load_word_pieces(str(tmp_path / "more.txt"), "x")
    with pytest.raises(ValueError, match=r"more\.txt' has 37 entries .* trained with 36; type"):
        load_encoder(chosen("task=glue/sst2", f"init_from={place / 'sparse'}"), pieces)


def test_a_vocabulary_of_the_same_size_and_other_numbers_is_refused(place, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join([*VOCABULARY[:-2], *VOCABULARY[:-3:-1]]))
    pieces = load_word_pieces(str(tmp_path / "other.txt"), "x")
    with pytest.raises(
        ValueError, match=r"other\.txt' does not fit .*sparse: '##ly' is its entry 34 and was 35"
    ):
        load_encoder(chosen("task=glue/sst2", f"init_from={place / 'sparse'}"), pieces)


def test_a_start_that_is_not_there_is_named_before_its_tokenizer(place, tmp_path):
    start = tmp_path / "checkpoints" / "bert"
    with pytest.raises(FileNotFoundError, match=rf"init_from={start} does not exist; give a chec"):
        finetune(chosen(*SST2, *common(place), f"init_from={start}", "name=nothing"))


@pytest.mark.parametrize("seeds", ["[0]", "[0,1]"])
def test_seeds_of_another_checkpoint_are_not_mixed(place, tmp_path, seeds):
    shutil.copytree(place / "sparse", tmp_path / "mine")
    words = (
        "task=glue/sst2", "epochs=0.1", "batch_size=8", f"data={place / 'SST-2'}",
        f"root={tmp_path}", f"init_from={tmp_path / 'mine'}",
    )  # fmt: skip
    first = finetune(chosen(*words, "seeds=[0]"))
    shutil.rmtree(tmp_path / "mine")
    tiny_model().save_pretrained(tmp_path / "mine")
    write_vocabulary(tmp_path / "mine")
    with pytest.raises(ValueError, match="has seeds of another init_from: what init_from=.*/mine"):
        finetune(chosen(*words, f"seeds={seeds}"))
    shutil.rmtree(tmp_path / "mine")
    again = finetune(chosen(*words, "seeds=[0]"))  # what was done can be read for ever
    assert again["metrics"] == first["metrics"]


def test_seeds_of_other_data_are_not_mixed(place, tmp_path, caplog):
    caplog.set_level("INFO")
    write_sst2(tmp_path / "set", train=16, dev=8)
    words = (
        "task=glue/sst2", "epochs=1", "batch_size=8", f"data={tmp_path / 'set'}",
        f"root={tmp_path}", f"init_from={place / 'sparse'}",
    )  # fmt: skip
    finetune(chosen(*words, "seeds=[0]"))
    shutil.rmtree(tmp_path / "set")
    write_sst2(tmp_path / "set", train=24, dev=8)
    with pytest.raises(ValueError, match="has seeds of another data: what data=.*type name=<anot"):
        finetune(chosen(*words, "seeds=[0,1]"))
    assert "done before: seed 0." in caplog.text


def test_a_length_beyond_the_positions_is_refused(place):
    with pytest.raises(ValueError, match=r"max_length=65 is longer than the checkpoint's 64 pos"):
        encoder_of(place, place / "sparse", "max_length=65")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("precision=16-mixed", ValueError, "precision=16-mixed needs a GPU.*type precision=32"),
        ("accelerator=cuda", RuntimeError, "accelerator=cuda, but torch .* finds no GPU; check nv"),
    ],
)
def test_what_a_cpu_has_not_is_refused_before_the_data(override, error, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=message):
        finetune(chosen("task=squad", "init_from=nowhere", "data=nowhere", override))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "a"], r"has no token \[SEP\], so it is none of BERT's kind"),
        (["[PAD]", "a", "a"], "line 3: 'a' is there twice"),
        (["[PAD]", "", "a"], "line 2: empty"),
        (["[PAD]", "\udcff"], "line 2: not UTF-8 text .* convert it with iconv"),
    ],
)
def test_a_wrong_vocabulary_is_named_with_its_line(tokens, message, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_word_pieces(str(path), "x")
    assert re.search(message, str(caught.value))


def test_a_tokenizer_is_looked_for_beside_the_checkpoint(place, tmp_path):
    assert load_word_pieces(None, str(place / "sparse")).size == VOCABULARY_SIZE
    assert load_word_pieces(None, str(place / "sparse" / "slope.json")).size == VOCABULARY_SIZE
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or vocab.txt lies beside"):
        load_word_pieces(None, str(tmp_path))
    with pytest.raises(ValueError, match="unknown tokenizer 'bert-typo'.* type tokenizer="):
        load_word_pieces("bert-typo", "x")
    with pytest.raises(
        ValueError, match="tokenizer=wordpiece:512 is one to train on a corpus, and"
    ):
        load_word_pieces("wordpiece:512", "x")


def test_a_loss_that_is_not_finite_stops_the_run(place):
    with pytest.raises(RuntimeError, match=r"the loss is nan at step \d+ of .* set a smaller lr"):
        finetune(chosen(*SST2, *common(place), "lr=1e30", "name=diverges"))


def test_the_published_numbers_are_the_defaults():
    needed = ("init_from=x",)
    cola = settings(["task=glue/cola", *needed])
    assert (cola.lr, cola.batch_size, cola.max_length, cola.epochs) == (2.4e-6, 4, 128, 5)
    assert settings(["task=glue/rte", *needed]).epochs == 3
    found = settings(["task=squad", *needed])
    assert (found.lr, found.batch_size, found.max_length, found.epochs) == (3e-5, 24, 384, 2)
    assert (found.doc_stride, found.warmup_ratio) == (128, 0.1)
    assert settings(["task=squad", *needed, "lr=1e-4", "seeds=[3,4]"]).seeds == [3, 4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=x"], r"task must be given; add for example task=glue/sst2"),
        (["task=squad"], "init_from must be given"),
        (["task=glue/sst", "init_from=x"], "did you mean task=glue/sst2"),
        (["task=squad", "init_from=x", "learning_rate=1"], "unknown key. Keys: task, .* lr, "),
        (["task=squad", "init_from=x", "epoch=1"], r"unknown key; did you mean epochs=\?"),
        (["task=squad", "init_from=x", "dense"], "'dense' is not of the form key=value"),
        (
            ["task=squad", "init_from=x", "lr=fast"],
            "lr=fast must be a number, for example lr=3e",
        ),
        (["task=squad", "init_from=x", "lr="], "lr= must be a number, for example"),
        (
            ["task=squad", "init_from=x", "seeds=3"],
            r"seeds=3 must be a list of whole numbers, for example seeds=\[0,1,2\]",
        ),
        (
            ["task=squad", "init_from=x", "seeds=[a]"],
            r"seeds=\[a\] must be a list of whole",
        ),
        (["task=squad", "init_from=x", "dense=maybe"], "dense=maybe must be True or False, for"),
        (["task=squad", "init_from=x", "batch_size=1.5"], "batch_size=1.5 must be a whole number"),
        (
            ["task=squad", "init_from=x", "name=../away"],
            "name='../away' must be a folder insid",
        ),
        (["task=squad", "init_from=x", "name=/away"], "name='/away' must be a folder inside logs"),
        (["task=squad", "init_from=x", "lr=0"], "lr=0.0 must be above 0"),
        (["task=squad", "init_from=x", "batch_size=0"], "batch_size=0 must be at least 1"),
        (["task=squad", "init_from=x", "warmup_ratio=2"], "must be at most 1"),
        (["task=squad", "init_from=x", "precision=8"], "precision='8' must be one of 32-true"),
        (["task=squad", "init_from=x", "epochs=inf"], "epochs=inf must be above 0, and finite"),
        (
            ["task=squad", "init_from=x", "accelerator=tpu"],
            "accelerator='tpu' must be one of auto,",
        ),
        (["task=squad", "init_from=x", "seeds=[1,1]"], r"seeds=\[1, 1\] must be different"),
        (["task=squad", "init_from=x", "seeds=[]"], r"seeds=\[\] must be different"),
        (["task=squad", "init_from=x", "max_length=64"], "leaves no room for a context"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        settings(overrides)


def test_the_command_prints_the_table(finished, capsys):
    from slope import cli

    options, _ = finished
    words = [
        f"{key}={value}"
        for key, value in vars(options).items()
        if key not in ("seeds", "tokenizer")
    ]
    code = cli.main(["finetune", *words, "seeds=[0,1]", f"tokenizer={options.tokenizer}"])
    output = capsys.readouterr().out
    assert code == 0
    assert "| mean |" in output
    command = ["finetune", *words, "seeds=[0,1]", f"tokenizer={options.tokenizer}", "--json"]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert said.err.startswith("slope: finetune task=glue/sst2") and "| mean |" in said.err
    summary = json.loads(said.out)
    assert summary.pop("directory") == str(options.directory)
    assert summary == json.loads((options.directory / "summary.json").read_text())
    with open(options.directory / "results.csv", newline="") as file:
        values = [float(row["accuracy"]) for row in csv.DictReader(file)]
    assert summary["metrics"]["accuracy"]["values"] == values
    assert cli.main(["finetune", "task=glue/sst2"]) == 2
    assert "init_from must be given" in capsys.readouterr().err
