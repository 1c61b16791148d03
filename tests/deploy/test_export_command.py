"""``slope export``: any checkpoint in, any format out, and dense ones made sparse on the way."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from export_runs import (
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
from slope.deploy import open_source
from slope.export import save_dense
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
    assert "sparsified 7 of 9 linear layers (2:4)" in out
    assert "the adapters are in hf/adapter, for peft\n" in out
    assert f"written: {here / 'peft'} (0.0 MB)" in out
    assert_equal_states(slope.load_pretrained("slope"), model)
    again = open_source("slope")
    assert_equal_states(again.model, model)
    assert again.tokenizer.eos_token_id == model.config.eos_token_id
    assert (here / "hf/tokenizer.json").is_file() and (here / "hf/adapter/README.md").is_file()
    slope.deactivate_adapters(model)
    assert torch.equal(logits(open_source("hf").model), logits(model))


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
    make_run("dense", "pruner=none")
    line = error_of(capsys, "dense", "--format", "slope", "--output", "none")
    assert "is dense, so there is nothing to compress; type --sparsify magnitude" in line
    assert export("dense", "--sparsify", "magnitude", "--format", "slope", "--output", "now") == 0


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
    line = error_of(capsys, "dense", "--sparsify", "wanda", "--calibration", "none.txt", *to)
    assert "no text file 'none.txt'" in line
    (here / "empty.txt").write_text("")
    line = error_of(capsys, "dense", "--sparsify", "wanda", "--calibration", "empty.txt", *to)
    assert "'empty.txt' holds no text to calibrate with" in line
    make_run()
    assert "sparse already" in error_of(capsys, "mine", "--sparsify", "magnitude", *to)
    with torch.no_grad():
        weight = dense.get_submodule(LAYER).weight
        weight[torch.rand(weight.shape) < 0.5] = 0
    save_dense(dense, "dense", force=True)
    line = error_of(capsys, "dense", "--sparsify", "zeros", *to)
    assert f"layer '{LAYER}' is" in line and "non-zeros of 4" in line and "magnitude" in line
    assert not (here / "out").exists()


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
