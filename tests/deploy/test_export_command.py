"""``slope export``: any checkpoint in, any format out, and dense ones made sparse on the way."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from export_runs import (
    IDS,
    LAYER,
    Bomb,
    assert_equal_states,
    error_of,
    export,
    logits,
    published,
)
from safetensors.torch import load_file, save_file

import slope
from slope import cli
from slope.deploy import open_source, prune, prune_by_zeros
from slope.deploy.source import cast
from slope.export import save_dense, save_peft
from slope.layers import adapter_layers
from slope.methods import wanda
from slope.methods.wanda import wanda_scores

# --- a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["mine", "checkpoints/mine", "checkpoints/mine/last.ckpt"])
def test_a_run_is_opened_as_it_was(make_run, tokenizer, given):
    model = make_run()
    source = open_source(given)
    assert_equal_states(source.model, model)
    assert torch.equal(logits(source.model), logits(model))
    assert source.model.lm_head.weight is source.model.transformer.wte.weight
    assert source.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert source.tokenizer.eos_token == tokenizer.eos_token
    assert source.model.config.eos_token_id == tokenizer.eos_token_id


def test_a_run_of_another_family_has_its_computed_buffers(make_run):
    model = make_run("other", family="llama")
    opened = open_source("other").model
    assert not any(buffer.is_meta for buffer in opened.buffers())
    assert torch.equal(logits(opened), logits(model))


def test_all_formats_of_a_run(make_run, here, capsys):
    model = make_run()
    for kind in ("slope", "hf", "peft"):
        assert export("mine", "--format", kind, "--output", kind) == 0
    out = capsys.readouterr().out
    assert "sparsified" not in out and "parameters" not in out
    assert "7 of 9 linear layers are 2:4\nwritten: " in out
    assert "7 of 9 linear layers are 2:4, written dense with their zeros\n" in out
    assert f"the adapters of 7 linear layers\nwritten: {here / 'peft'} (0.0 MB)" in out
    assert "the adapters are in hf/adapter, for peft\n" in out
    assert_equal_states(slope.load_pretrained("slope"), model)
    again = open_source("slope")
    assert_equal_states(again.model, model)
    assert again.tokenizer.eos_token_id == model.config.eos_token_id
    assert (here / "hf/tokenizer.json").is_file() and (here / "hf/adapter/README.md").is_file()
    assert export("mine", "--format", "hf", "--fold", "--output", "folded") == 0
    line = "written dense, adapters added into the weights of 7 of 9 linear layers\n"
    assert line in capsys.readouterr().out


def test_bf16_without_stale_column_masks_and_json(make_run, capsys):
    make_run()
    arguments = ("mine", "--format", "slope", "--dtype", "bfloat16", "--output", "out", "--json")
    assert export(*arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sparse_layers"] == 7 and facts["format"] == "slope" and facts["tokenizer"]
    tensors = load_file("out/model.safetensors")
    assert not [name for name in tensors if name.endswith(".column_mask")]
    assert tensors[f"{LAYER}.compressed"].dtype == torch.bfloat16
    stored = tensors[f"{LAYER}.compressed"].nbytes + tensors[f"{LAYER}.bitmask"].nbytes
    assert stored == 0.5625 * 2 * 128 * 32


def test_methods_without_compressed_layers(make_run, capsys):
    model = make_run("srste", "pruner=extended-sr-ste", "pruner.add_lora=False")
    assert export("srste", "--format", "slope", "--output", "out") == 0
    slope.compress_weights(model)
    assert_equal_states(slope.load_pretrained("out"), model)
    model = make_run("sste", "pruner=s-ste", "pruner.add_lora=False")
    assert export("sste", "--format", "slope", "--dtype", "bfloat16", "--output", "rounded") == 0
    slope.compress_weights(model)  # what is pruned is chosen before anything is rounded
    rounded = slope.load_pretrained("rounded")
    for (_, one), (_, other) in zip(
        slope.sparse_layers(model), slope.sparse_layers(rounded), strict=True
    ):
        assert torch.equal(one.values.bfloat16(), other.values)
        assert torch.equal(one.metadata, other.metadata)
    make_run("dense", "pruner=none")
    line = error_of(capsys, "dense", "--format", "slope", "--output", "none")
    assert "is dense, so there is nothing to compress; type --sparsify magnitude" in line
    assert export("dense", "--sparsify", "magnitude", "--format", "slope", "--output", "now") == 0


# --- a dense export with its adapters -----------------------------------------------------------


def assert_equal_adapters(one, other):
    pairs = zip(slope.sparse_layers(one), slope.sparse_layers(other), strict=True)
    for (name, mine), (other_name, theirs) in pairs:
        assert name == other_name and mine.adapter.active
        assert (mine.adapter.rank, mine.adapter.scale) == (
            theirs.adapter.rank,
            theirs.adapter.scale,
        )
        assert torch.equal(mine.adapter.down, theirs.adapter.down)
        assert torch.equal(mine.adapter.up, theirs.adapter.up)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"adapter_rank": 0.1}, {"adapter_scale": 0.3}])
def test_a_dense_export_comes_back_with_its_adapters(here, make_model, family, dtype, options):
    model = make_model(family, **options)
    cast(model, dtype)
    save_dense(model, here / "hf")
    opened = open_source("hf").model
    assert torch.equal(logits(opened), logits(model)) and not opened.training
    save_dense(opened, here / "again")
    save_peft(opened, here / "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors", "slope_scales.json"):
        content = (here / "hf" / "adapter" / name).read_bytes()
        assert (here / "again" / "adapter" / name).read_bytes() == content
        assert (here / "peft" / name).read_bytes() == content
    assert export("hf", "--sparsify", "zeros", "--format", "slope", "--output", "back") == 0
    back = slope.load_pretrained("back")
    assert_equal_states(back, model)
    assert_equal_adapters(back, model)
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize(("rank", "scale"), [(3, None), (3, 0.05), (7, 0.47)])
def test_the_scale_of_an_adapter_comes_back_to_the_last_bit(here, make_model, rank, scale):
    save_dense(make_model(adapter_rank=rank, adapter_scale=scale), here / "hf")

    def scales():
        return {layer.adapter.scale for _, layer in adapter_layers(open_source("hf").model)}

    wanted = 1 / rank if scale is None else scale
    path = here / "hf" / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert scales() == {wanted}
    assert (config["lora_alpha"] / config["r"] == wanted) == (scale is None)
    (path.parent / "slope_scales.json").rename(here / "away")
    assert scales() == {config["lora_alpha"] / rank}
    (here / "away").rename(path.parent / "slope_scales.json")
    path.write_text(json.dumps(config | {"lora_alpha": 2.0 * rank}))
    assert scales() == {2.0}


def test_adapters_stay_whatever_chooses_the_masks(here, make_model, tokenizer):
    model = make_model()
    save_dense(model, here / "hf", tokenizer)
    (here / "text.txt").write_text("the king of the city and the river is a war " * 60)
    ways = {"magnitude": (), "wanda": ("--calibration", "text.txt")}
    for way, more in ways.items():
        to = ("--format", "slope", "--output", way)
        assert export("hf", "--sparsify", way, *more, *to) == 0
        assert_equal_adapters(slope.load_pretrained(way), model)


def test_wanda_measures_with_the_adapters(here, make_model, tokenizer, monkeypatch):
    model = make_model()
    save_dense(model, here / "hf", tokenizer)
    seen = []
    original = wanda.wanda_scores

    def kept(measured, layers, batches):
        seen.append(logits(measured))
        return original(measured, layers, batches)

    monkeypatch.setattr(wanda, "wanda_scores", kept)
    prune(open_source("hf").model, "wanda", calibration=IDS)
    assert torch.allclose(seen[0], logits(model), atol=1e-5)


def test_the_adapter_of_a_layer_that_stays_dense_is_added_into_it(here, make_model):
    model = make_model()
    save_dense(model, here / "hf")
    source = open_source("hf").model
    with torch.no_grad():
        dict(adapter_layers(source))[LAYER].weight.normal_()
    wanted = logits(source)
    prune_by_zeros(source)
    assert LAYER not in dict(adapter_layers(source)) and len([*adapter_layers(source)]) == 6
    assert type(source.get_submodule(LAYER)).__name__ == "Conv1D"
    assert torch.allclose(logits(source), wanted, atol=1e-5)
    slope.save_pretrained(source, "back")
    assert torch.equal(logits(slope.load_pretrained("back")), logits(source))


def test_a_dense_export_that_cannot_be_pruned_is_as_before(here, make_model):
    save_dense(make_model(), here / "hf")
    model = open_source("hf").model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError):
        prune(model, "wanda", calibration=torch.full((1, 4), 999))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_report_calls_a_layer_with_an_adapter_dense(here, make_model):
    save_dense(make_model(), here / "hf")
    report = slope.sparsity_report(open_source("hf").model)
    assert not report.sparse and sum(layer.rank > 0 for layer in report.layers) == 7


def test_eval_and_generate_say_of_a_dense_export_what_they_say_of_the_run(make_run, here, capsys):
    make_run()
    assert export("mine", "--format", "hf", "--output", "hf") == 0
    greedy = ("--prompt", "the king", "--temperature", "0", "--json")
    texts = []
    for arguments in (("mine",), ("hf",), ("hf", "--fold")):
        capsys.readouterr()
        assert cli.main(["generate", *arguments, *greedy]) == 0
        texts.append(json.loads(capsys.readouterr().out)["results"])
    assert texts[0] == texts[1] == texts[2]
    (here / "held.txt").write_text("the king of the city and the river is a war " * 60)
    assert cli.main(["eval", "mine", "hf", "--data", "held.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    values = [{r["metric"]: r["value"] for r in found if r["model"] == m} for m in ("mine", "hf")]
    assert values[0] == values[1] and values[0]


# --- a dense checkpoint -------------------------------------------------------------------------


@pytest.fixture
def dense(here, make_model, tokenizer):
    model = make_model(dense=True)
    save_dense(model, here / "dense", tokenizer)
    return model


def test_dense_with_zeros_comes_back_as_it_was(make_run):
    model = make_run("mine", "pruner.add_lora=False")
    assert export("mine", "--format", "hf", "--output", "hf") == 0
    assert export("hf", "--sparsify", "zeros", "--format", "slope", "--output", "back") == 0
    assert_equal_states(slope.load_pretrained("back"), model)


def test_magnitude(dense, make_model):
    options = ("--sparsify", "magnitude", "--pattern", "2:8", "--format", "slope")
    assert export("dense", *options, "--output", "out") == 0
    slope.sparsify(dense, slope.SparsityConfig(pattern="2:8"))
    assert_equal_states(slope.load_pretrained("out"), dense)


def test_wanda(dense, here, tokenizer):
    (here / "text.txt").write_text("the king of the city and the river is a war " * 60)
    options = ("--sparsify", "wanda", "--calibration", "text.txt", "--format", "slope")
    assert export("dense", *options, "--output", "out") == 0
    ids = tokenizer((here / "text.txt").read_text(), verbose=False)["input_ids"]
    batch = {"input_ids": torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)}
    linear = dense.get_submodule(LAYER)
    norms = wanda_scores(dense, {LAYER: linear}, [batch])[LAYER]
    layer = dict(slope.sparse_layers(slope.load_pretrained("out")))[LAYER]
    scores = linear.weight.detach().t().abs() * norms
    chosen = torch.where(layer.keep_mask(), scores, 0).sum()
    best = scores.unflatten(1, (-1, 4)).topk(2).values.sum()
    assert chosen == pytest.approx(float(best), rel=1e-6)


def test_what_cannot_be_made_sparse(dense, make_run, here, capsys):
    to = ("--format", "slope", "--output", "out")
    assert "no linear layer holds the zeros of 2:4" in error_of(
        capsys, "dense", "--sparsify", "zeros", *to
    )
    line = error_of(capsys, "dense", "--sparsify", "wanda", *to, code=2)
    assert "wanda needs --calibration" in line
    line = error_of(capsys, "dense", "--sparsify", "zeros", "--calibration", "x", *to, code=2)
    assert "only wanda reads text" in line
    make_run()
    assert "sparse already" in error_of(capsys, "mine", "--sparsify", "magnitude", *to)
    with torch.no_grad():
        weight = dense.get_submodule(LAYER).weight
        weight[torch.rand(weight.shape) < 0.5] = 0
    save_dense(dense, "dense", force=True)
    line = error_of(capsys, "dense", "--sparsify", "zeros", *to)
    assert f"layer '{LAYER}' is" in line and "non-zeros of 4" in line and "magnitude" in line
    assert not (here / "out").exists()


def test_the_target_and_the_calibration_are_seen_before_anything_is_loaded(here, capsys):
    # There is no checkpoint: whoever looks for it first says so.
    wanda = ("nothing", "--format", "slope", "--sparsify", "wanda", "--calibration")
    assert "no text file 'none.txt'" in error_of(capsys, *wanda, "none.txt", "--output", "out")
    (here / "empty.txt").write_text(" \n")
    line = error_of(capsys, *wanda, "empty.txt", "--output", "out")
    assert "'empty.txt' holds no text to calibrate with" in line
    (here / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    line = error_of(capsys, *wanda, "latin.txt", "--output", "out")
    assert "'latin.txt' is no text in UTF-8 (invalid continuation byte); convert it with" in line
    (here / "thesis").mkdir()
    (here / "thesis" / "text.txt").write_text("years of work")
    for kind in ("slope", "hf", "peft"):
        to = ("--format", kind, "--output", "thesis")
        assert "thesis' is not empty; choose another" in error_of(capsys, "nothing", *to)
        line = error_of(capsys, "nothing", *to, "--force")
        assert "so it is no earlier export and is not replaced" in line
        to = ("--format", kind, "--output", "latin.txt")
        assert "latin.txt' is a file; choose" in error_of(capsys, "nothing", *to)
        for output in ("latin.txt/x", "latin.txt/x/y"):
            line = error_of(capsys, "nothing", "--format", kind, "--output", output)
            assert f"latin.txt', a part of --output {output}, is a file; type another" in line


@pytest.mark.parametrize(("words", "said"), [(4000, "128 x 32"), (60, " x 32"), (3, "1 x ")])
def test_how_much_wanda_was_calibrated_on_is_said(dense, here, capsys, tokenizer, words, said):
    text = "king " * words
    (here / "text.txt").write_text(text)
    options = ("--sparsify", "wanda", "--calibration", "text.txt", "--format", "slope", "--json")
    assert export("dense", *options, "--output", "out") == 0
    captured = capsys.readouterr()
    tokens = len(tokenizer(text, verbose=False)["input_ids"])
    length = min(tokens, 32)
    count = {"sequences": min(128, tokens // length), "tokens": length}
    assert json.loads(captured.out)["calibration"] == count
    assert said in captured.err and f"{count['sequences']} x {length} tokens" in captured.err
    assert ("128 sequences are usual" in captured.err) == (count["sequences"] < 128)


def test_a_text_of_one_token_is_an_error(dense, here, capsys):
    (here / "text.txt").write_text("k")
    options = ("--sparsify", "wanda", "--calibration", "text.txt", "--format", "slope")
    line = error_of(capsys, "dense", *options, "--output", "out")
    assert "the text for --calibration is one token long; give more of it" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine"], "required: --format, --output"),
        (["mine", "--format", "onnx", "--output", "x"], "invalid choice: 'onnx'"),
        (["mine", "--format", "slope", "--output", "x", "--fold"], "--fold goes with --format hf"),
        (
            ["mine", "--format", "hf", "--output", "x", "--calibration", "t"],
            "goes with --sparsify wanda",
        ),
        (["mine", "--format", "hf", "--output", "x", "--pattern", "1:4"], "goes with --sparsify"),
        (
            ["mine", "--format", "hf", "--output", "x", "--sparsify", "zeros", "--pattern", "4:2"],
            "Did you mean 2:4?",
        ),
    ],
)
def test_wrong_command_lines(make_run, capsys, arguments, message):
    make_run()
    assert message in error_of(capsys, *arguments, code=2)


# --- damaged and foreign folders ----------------------------------------------------------------


def test_damaged_folders_of_transformers(dense, here, capsys):
    to = ("--format", "hf", "--output", "out")
    path = here / "dense" / "model.safetensors"
    tensors, content = load_file(path), path.read_bytes()
    path.write_bytes(content[:-10])
    line = error_of(capsys, "dense", *to)
    assert "'dense/model.safetensors' is truncated or no safetensors file" in line
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "'dense' is incomplete: it has no transformer.ln_f.weight" in error_of(
        capsys, "dense", *to
    )
    path.unlink()
    torch.save(dense.state_dict(), here / "dense" / "pytorch_model.bin")
    line = error_of(capsys, "dense", *to)
    assert "pickled weights (*.bin) are not read" in line
    assert not (here / "out").exists()


def test_what_is_no_checkpoint(here, capsys):
    to = ("--format", "hf", "--output", "out")
    assert "no checkpoint nothing; give the name of a run" in error_of(capsys, "nothing", *to)
    (here / "thesis").mkdir()
    (here / "thesis" / "text.txt").write_text("years of work")
    assert "'thesis' holds no checkpoint: neither last.ckpt or" in error_of(capsys, "thesis", *to)
    assert "text.txt' is damaged or no checkpoint" in error_of(capsys, "thesis/text.txt", *to)


def test_tokenizers_that_do_not_match(make_run, dense, here, capsys, tokenizer):
    from slope.data.tokenizer import EOS, LoadedTokenizer, train_bpe

    make_run()
    to = ("--format", "slope", "--output", "out")
    large = train_bpe([" ".join(f"word{i} other{i * 7}" for i in range(400))], 400)
    large.save(str(here / "large.json"))
    for given in ("mine", "dense"):
        line = error_of(capsys, given, "--tokenizer", "large.json", *to)
        assert "the tokenizer has 400 entries, but the model of" in line
    assert export("mine", *to) == 0
    LoadedTokenizer(train_bpe(["aa bb cc"], 260), EOS).to_transformers(8).save_pretrained("out")
    line = error_of(capsys, "out", "--format", "hf", "--output", "again")
    assert f"was made for {len(tokenizer)}; type --tokenizer" in line
    (here / "bad.json").write_text("{")
    line = error_of(capsys, "dense", "--tokenizer", "bad.json", "--format", "hf", "--output", "x")
    assert "'bad.json' is no tokenizer that can be read" in line
    line = error_of(capsys, "dense", "--tokenizer", "none", "--format", "hf", "--output", "x")
    assert "no tokenizer 'none'" in line


@pytest.fixture
def swapped(here, tokenizer):
    """A tokenizer of the same entries, of which two have each other's id."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    entries = content["model"]["vocab"]
    entries["k"], entries["w"] = entries["w"], entries["k"]
    (here / "swapped.json").write_text(json.dumps(content))
    return min(entries["k"], entries["w"])


@pytest.mark.parametrize("kind", ["run", "slope", "hf"])
def test_a_tokenizer_of_other_ids_is_refused(make_run, swapped, capsys, kind):
    make_run()
    given = "mine" if kind == "run" else kind
    if kind != "run":
        assert export("mine", "--format", kind, "--output", kind) == 0
    to = ("--format", "hf", "--output", "out")
    line = error_of(capsys, given, "--tokenizer", "swapped.json", *to)
    assert f"is its entry {swapped} and was " in line and "when the model was trained" in line
    assert line.endswith("type --tokenizer <the one that it was trained with>, or leave it away: "
                         "it comes with the model.")  # fmt: skip


def test_a_tokenizer_that_was_exchanged_in_an_export_is_refused(make_run, here, swapped, capsys):
    make_run()
    assert export("mine", "--format", "slope", "--output", "ours") == 0
    own = (here / "ours" / "tokenizer.json").read_text()
    (here / "own.json").write_text(own)
    (here / "ours" / "tokenizer.json").write_text((here / "swapped.json").read_text())
    to = ("--format", "hf", "--output")
    line = error_of(capsys, "ours", *to, "out")
    assert "it has as many entries, " in line and "but other ones than when the model" in line
    assert line.endswith("type --tokenizer <the one that it was trained with>.")
    assert export("ours", "--tokenizer", "own.json", *to, "out") == 0
    description = json.loads((here / "ours" / "slope.json").read_text())
    del description["vocabulary_sha256"]  # as written before it was there
    (here / "ours" / "slope.json").write_text(json.dumps(description))
    assert open_source("ours").tokenizer.get_vocab() != open_source("mine").tokenizer.get_vocab()


def test_a_foreign_folder_takes_any_tokenizer_that_fits(here, make_model, tokenizer, swapped):
    model = make_model(dense=True)
    model.save_pretrained("theirs")
    tokenizer.save_pretrained("theirs")
    found = open_source("theirs", tokenizer="swapped.json").tokenizer
    assert found.get_vocab() != tokenizer.get_vocab()


def test_a_changed_export_is_refused(make_run, capsys):
    make_run()
    assert export("mine", "--format", "slope", "--output", "out") == 0
    tensors = load_file("out/model.safetensors")
    tensors[f"{LAYER}.compressed"][0, 0] += 1
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    line = error_of(capsys, "out", "--format", "hf", "--output", "hf")
    assert "is not the file that was exported" in line


# --- the published code --------------------------------------------------------------------------


@pytest.fixture
def theirs(here, make_model):
    """A GPT-2 as the published recipes configure it, 2:4 but for the first QKV, and its file."""
    model = make_model(dense=True)
    config = copy.deepcopy(model.config)
    config.scale_attn_by_inverse_layer_idx = True
    model = type(model)(config)
    slope.sparsify(model)
    slope.densify(model)
    content, folded = published(model.eval())
    torch.save(content, here / "step_7.ckpt")
    return content, model, folded


def test_a_published_checkpoint(theirs, here, tokenizer):
    _, model, folded = theirs
    tokenizer.save_pretrained("tokenizer")
    options = ("--heads", "4", "--tokenizer", "tokenizer")
    assert export("step_7.ckpt", *options, "--format", "slope", "--output", "out") == 0
    loaded = slope.load_pretrained("out")
    layers = dict(slope.sparse_layers(loaded))
    assert len(layers) == 7 and "transformer.h.0.attn.c_attn" not in layers
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight.detach().t()
        assert torch.equal(layer.to_dense(), weight)
        assert torch.equal(layer.keep_mask(), weight != 0)
        assert layer.pattern == slope.NMPattern(2, 4)
        assert (layer.adapter is not None) == name.endswith("c_fc")
    assert torch.allclose(logits(loaded), logits(folded), atol=1e-5)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    # The same from the folder that large models are saved as.
    (here / "large").mkdir()
    (here / "step_7.ckpt").rename(here / "large" / "model_states.pt")
    assert_equal_states(open_source("large", heads=4).model, loaded)


def test_nothing_of_a_published_file_is_run(theirs, here, capsys):
    content, *_ = theirs
    to = ("--heads", "4", "--format", "slope", "--output", "out")
    torch.save(content | {"callbacks": Bomb()}, here / "step_7.ckpt")
    assert export("step_7.ckpt", *to) == 0
    assert not (here / "exploded").exists()


def test_a_published_file_that_does_not_fit(theirs, here, capsys):
    content, *_ = theirs
    to = ("--format", "slope", "--output", "out")
    fc1, fc2 = (f"model.transformer.layers.1.mlp.fc{n}" for n in (1, 2))

    def error(change, *more):
        state = dict(content["state_dict"])
        change(state)
        torch.save({"state_dict": state}, "step_7.ckpt")
        return error_of(capsys, "step_7.ckpt", *more, *to)

    heads = ("--heads", "4")
    line = error(lambda state: None)
    assert "is 32 wide and does not hold its number of attention heads" in line
    crowded = content["state_dict"][f"{fc2}.weight"].clone()
    crowded[5, 8:12] = 1
    line = error(lambda state: state.update({f"{fc2}.weight": crowded}), *heads)
    assert "h.1.mlp.c_proj' is" in line and "row 5, group 2 holds 4 non-zeros of 4" in line
    line = error(lambda state: state.update({f"{fc1}.lora_right": torch.ones(2, 128)}), *heads)
    assert "lora_left (32, 3) and lora_right (2, 128), which do not fit" in line
    line = error(lambda state: state.pop(f"{fc1}.bias"), *heads)
    assert "h.1.mlp.c_fc.bias is absent in it" in line
    line = error(lambda state: state.update({"model.bert.x": torch.ones(2)}), *heads)
    assert "is no GPT-2 of the published code" in line and "model.bert.x" in line
    torch.save({"other": 1}, "step_7.ckpt")
    assert "it has no 'state_dict'" in error_of(capsys, "step_7.ckpt", *to)
    data = (here / "step_7.ckpt").read_bytes()
    (here / "step_7.ckpt").write_bytes(data[: len(data) // 2])
    assert "'step_7.ckpt' is damaged or no checkpoint" in error_of(capsys, "step_7.ckpt", *to)


def test_one_of_ours_that_was_cut_off_is_said_to_be_so(make_run, here, capsys):
    make_run()
    path = here / "checkpoints" / "mine" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-40])
    line = error_of(capsys, path, "--format", "slope", "--output", "out")
    assert "is half-written or not a checkpoint of slope" in line
    assert "no usable checkpoint" in error_of(capsys, "mine", "--format", "hf", "--output", "out")
