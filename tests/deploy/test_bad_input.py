"""What a user may hand in by mistake or out of malice: the message, the exit code, nothing lost."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from export_runs import LAYER, Bomb, error_of, export, published
from safetensors.torch import load_file, save_file

import slope
from slope import cli
from slope.deploy import open_source
from slope.export import dense as dense_module
from slope.export import save as save_module
from slope.export import save_dense, save_peft
from slope.export.folder import new_folder

TO = ("--format", "slope", "--output", "out")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(params=["slope", "hf"])
def folder(request, here, make_model, tokenizer):
    """An export in either format of one model."""
    save = slope.save_pretrained if request.param == "slope" else save_dense
    save(make_model(adapter_rank=0), here / "bad", tokenizer)
    return here / "bad"


@pytest.fixture(params=["slope", "hf"])
def shards(request, here, make_model, monkeypatch):
    """The same in several files."""
    monkeypatch.setattr(save_module, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(dense_module, "SHARD_BYTES", 40_000)
    save = slope.save_pretrained if request.param == "slope" else save_dense
    save(make_model(adapter_rank=0), here / "bad")
    return sorted((here / "bad").glob("model-*.safetensors"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- files of weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_the_truncated_file_is_named(folder, capsys, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    line = error_of(capsys, "bad", *TO)
    assert "'bad/model.safetensors' is truncated or no safetensors file" in line


def test_a_changed_header_is_an_error(folder, capsys):
    path = folder / WEIGHTS
    content = path.read_bytes()
    for damaged in (b"\xff" * 8 + content[8:], content[:8] + b"x" + content[9:]):
        path.write_bytes(damaged)
        assert "is truncated or no safetensors file" in error_of(capsys, "bad", *TO)


def test_changed_metadata_of_the_file_are_found(here, make_model, capsys):
    slope.save_pretrained(make_model(), here / "bad")
    path = here / "bad" / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "tf"})
    assert "is not the file that was exported" in error_of(capsys, "bad", *TO)


@pytest.mark.parametrize("name", [f"{LAYER}.compressed", f"{LAYER}.bias", "transformer.ln_f.bias"])
def test_weights_that_are_no_floats_leave_the_model_alone(here, make_model, name):
    model = make_model()
    slope.save_pretrained(model, here / "bad")
    rewrite(here / "bad" / WEIGHTS, lambda tensors: tensors.update({name: tensors[name].int()}))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"'{name}' of .* is torch\.int32, not float"):
        slope.load_pretrained(here / "bad", model=model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_a_folder_of_two_exports_is_an_error(here, make_model, capsys):
    slope.save_pretrained(make_model(), here / "bad")
    save_file({"more": torch.ones(2)}, here / "bad" / "model-00002-of-00002.safetensors")
    line = error_of(capsys, "bad", *TO)
    assert "model-00002-of-00002.safetensors' is in the folder or in slope.json, but not in" in line
    (here / "bad" / "model-00002-of-00002.safetensors").unlink()
    edit(here / "bad" / "slope.json", lambda content: content.update(files={}))
    assert "model.safetensors' is in the folder or in slope.json" in error_of(capsys, "bad", *TO)


def test_shards_and_their_index_must_agree(shards, capsys):
    index = shards[0].parent / INDEX
    whole, first = index.read_text(), shards[0].name
    placed = next(name for name, file in json.loads(whole)["weight_map"].items() if file == first)

    def error(change):
        edit(index, lambda content: change(content["weight_map"]))
        line = error_of(capsys, "bad", *TO)
        index.write_text(whole)
        return line

    assert f"tensor 'gone' is not in '{first}'" in error(lambda m: m.update(gone=first))
    assert f"tensor '{placed}' is not in" in error(lambda m: m.update({placed: shards[1].name}))
    assert "a shard is in another folder" in error(lambda m: m.update({placed: "../x.safetensors"}))
    assert "model-9.safetensors' is missing" in error(lambda m: m.update(x="model-9.safetensors"))
    tensor = load_file(shards[0])[placed]
    kept = shards[1].read_bytes()
    rewrite(shards[1], lambda tensors: tensors.update({placed: tensor}))
    assert f"tensor '{placed}' is a second time in '{shards[1].name}'" in error(lambda m: None)
    shards[1].write_bytes(kept)
    index.unlink()
    assert f"'bad/{INDEX}' is missing; the folder is incomplete" in error_of(capsys, "bad", *TO)
    index.write_text(whole)
    shards[1].unlink()
    assert f"{shards[1].name}' is missing; the folder is incomplete" in error_of(capsys, "bad", *TO)


# --- descriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(vocabulary="many"), "'vocabulary' is many"),
        (lambda d: d.pop("files"), "'files' is None"),
        (lambda d: d["layers"][LAYER].update(in_features=-4), f"damaged at layer '{LAYER}'"),
        (lambda d: d["layers"][LAYER].update(in_features="x"), f"damaged at layer '{LAYER}'"),
        (lambda d: d["layers"][LAYER]["adapter"].update(rank=0), "rank=0 does not fit the adapter"),
        (lambda d: d["layers"][LAYER]["adapter"].update(rank=5), r"but \(5, 32\) is needed"),
        (
            lambda d: d["layers"].update({"transformer.h.9.mlp.c_fc": d["layers"][LAYER]}),
            "no tensor 'transformer.h.9.mlp.c_fc.compressed'",
        ),
    ],
)
def test_a_description_that_was_changed(here, make_model, change, message):
    slope.save_pretrained(make_model(), here / "bad")
    edit(here / "bad" / "slope.json", change)
    with pytest.raises(ValueError, match=message):
        slope.load_pretrained(here / "bad", verify=True)


def test_deeply_nested_json_is_damage(here, make_model):
    slope.save_pretrained(make_model(), here / "bad")
    (here / "bad" / "slope.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"slope\.json' is damaged \("):
        slope.load_pretrained(here / "bad")


def test_configurations_that_cannot_be_used(folder, capsys):
    path = folder / "config.json"
    whole = path.read_text()
    path.write_text(whole[:50])
    assert "'bad/config.json' cannot be used (Unterminated" in error_of(capsys, "bad", *TO)
    path.write_text("[1]")
    assert "model_type is [1], which" in error_of(capsys, "bad", *TO)
    path.write_text(whole)
    edit(path, lambda config: config.update(model_type="mamba99"))
    line = error_of(capsys, "bad", *TO)
    assert "model_type is 'mamba99', which transformers" in line and "pip install --upgrade" in line
    path.write_text(whole)
    edit(path, lambda config: config.update(n_head=7))
    assert "num_heads" in error_of(capsys, "bad", *TO)
    path.unlink()
    line = error_of(capsys, "bad", *TO)
    if (folder / "slope.json").is_file():
        assert "'bad' holds no config.json, which GPT2LMHeadModel is built from; it is inco" in line
    else:
        assert "'bad' holds no checkpoint: neither" in line and "nor config.json" in line


def test_code_of_a_folder_is_never_run(here, make_model):
    model = make_model(dense=True)
    save_dense(model, here / "hf")
    (here / "hf" / "theirs.py").write_text("open('exploded', 'w')\n")
    theirs = {"auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}
    edit(here / "hf" / "config.json", lambda config: config.update(theirs))
    assert type(open_source("hf").model) is type(model)
    edit(here / "hf" / "config.json", lambda config: config.update(model_type="theirs"))
    with pytest.raises(ValueError, match="model_type is 'theirs', which transformers"):
        open_source("hf")
    assert not (here / "exploded").exists()


def test_a_damaged_generation_config_is_named(here, make_model, capsys):
    slope.save_pretrained(make_model(), here / "bad")
    (here / "bad" / "generation_config.json").write_text("{")
    assert "generation_config.json' is not a valid JSON" in error_of(capsys, "bad", *TO)


def test_dense_tensors_of_wrong_shape_missing_or_unknown(here, make_model, capsys, caplog):
    save_dense(make_model(dense=True), here / "bad")
    name, path = f"{LAYER}.weight", here / "bad" / WEIGHTS
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(32, 64)}))
    line = error_of(capsys, "bad", *TO)
    assert f"tensor {name} of 'bad' has shape (32, 64), and its config.json asks for (32," in line
    rewrite(path, lambda tensors: tensors.pop(name))
    assert f"is incomplete: it has no {name}" in error_of(capsys, "bad", *TO)
    rewrite(path, lambda tensors: tensors.update({name: torch.rand(32, 128), "x": torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        assert export("bad", "--sparsify", "magnitude", *TO) == 0
    assert "holds 1 tensors that GPT2LMHeadModel does not have; they are left out: x" in caplog.text


def test_quantised_weights_are_not_read(here, make_model, capsys):
    save_dense(make_model(dense=True), here / "bad")
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    edit(here / "bad" / "config.json", lambda config: config.update(quantised))
    assert "holds quantised weights" in error_of(capsys, "bad", *TO)


# --- adapters -----------------------------------------------------------------------------------


def test_an_adapter_of_peft_is_no_model(here, make_model, capsys):
    model = make_model()
    save_peft(model, here / "lora")
    line = error_of(capsys, "lora", *TO)
    assert "'lora' holds an adapter of peft" in line and "merge_and_unload()" in line
    line = error_of(capsys, "lora/adapter_model.safetensors", *TO)
    assert "tensors without their configuration; give the folder 'lora'" in line
    # Beside the weights, transformers would put it into the model.
    save_dense(make_model(dense=True), here / "bad")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (here / "bad" / name).write_bytes((here / "lora" / name).read_bytes())
    assert "'bad' holds an adapter of peft" in error_of(capsys, "bad", *TO)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "size mismatch"),
        ({"target_modules": ["transformer.h.9.mlp.c_fc"]}, "not found in the base model"),
    ],
)
def test_peft_refuses_adapters_of_another_model(here, make_model, change, message):
    from peft import PeftModel

    model = make_model()
    save_peft(model, here / "lora")
    slope.deactivate_adapters(model)
    edit(here / "lora" / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises((RuntimeError, ValueError), match=message):
        PeftModel.from_pretrained(slope.densify(model, fold_adapters=True), here / "lora")


def damaged(key, value):
    return lambda folder: edit(folder / "adapter_config.json", lambda c: c.update({key: value}))


def changed(leaf, change):
    name = f"base_model.model.{LAYER}.{leaf}.weight"

    def apply(folder):
        rewrite(folder / "adapter_model.safetensors", lambda tensors: change(tensors, name))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damaged("peft_type", "IA3"),
            r"adapter_config\.json' cannot be used \(it describes no LORA",
        ),
        (damaged("use_rslora", True), "use_rslora is a scale that adapters do not have"),
        (damaged("r", "many"), "'r' is many"),
        (damaged("r", 4), r"is torch.float32 of shape \(3, 32\), and rank 4 of a layer of 32 x 32"),
        (damaged("r", 400), "needs floats of shape"),
        (damaged("r", 0), "has rank 0 and lora_alpha 1.0"),
        (damaged("target_modules", [["a"]]), "'target_modules' holds what is no name"),
        (damaged("rank_pattern", {LAYER: "x"}), f"layer '{LAYER}' has rank 'x'"),
        (damaged("target_modules", [LAYER]), r"lora_A\.weight' is of no layer in its adapter_conf"),
        (damaged("target_modules", ["h.9"]), "the model has no linear layer 'h.9'"),
        (damaged("target_modules", ["transformer.wte"]), "has no linear layer 'transformer.wte'"),
        (changed("lora_B", lambda t, name: t.pop(name)), r"lora_B\.weight' is missing"),
        (
            changed("lora_B", lambda t, name: t.update({name: t[name].t().contiguous()})),
            r"shape \(3, 128\), and rank 3 of a layer of 128 x 32 needs floats of shape \(128, 3\)",
        ),
        (changed("lora_A", lambda t, n: t.update({n: t[n].int()})), r"is torch\.int32 of shape"),
        (changed("lora_A", lambda t, n: t.update(more=t[n].clone())), "'more' is of no layer"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"),
            r"adapter_model\.safetensors' is truncated or no safetensors file",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be used"),
        (
            lambda folder: (folder / "slope_scales.json").write_text('{"a": "x"}'),
            r"slope_scales\.json' cannot be used \(it is no object of numbers",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"config\.json' is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"model\.s.*' is missing"),
    ],
)
def test_adapters_of_a_dense_export_that_do_not_fit(here, make_model, damage, message):
    save_dense(make_model(), here / "hf")
    damage(here / "hf" / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source("hf")


# --- prompts and options ------------------------------------------------------------------------


def generate(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(["generate", "mine", *arguments])
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return code, captured.err


def test_all_prompts_are_checked_before_the_first_is_generated(make_run, here, capsys):
    make_run()
    (here / "prompts.txt").write_text("the king\n" * 9 + "the " * 40 + "\n")
    code, err = generate(capsys, "--prompts-file", "prompts.txt", "--batch-size", "4")
    assert code == 1 and "prompt 10 ('the the the" in err and "shorten the prompt" in err


def test_prompts_in_another_encoding(make_run, here, capsys):
    make_run()
    (here / "prompts.txt").write_bytes(b"caf\xe9\n")
    code, err = generate(capsys, "--prompts-file", "prompts.txt")
    assert code == 1 and "'prompts.txt' is no text in UTF-8" in err and "iconv" in err
    (here / "prompts.txt").write_bytes(b"\xef\xbb\xbfthe king\n")
    assert cli.main(["generate", "mine", "--prompts-file", "prompts.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["prompt"] == "the king"


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (("--seed", "-1"), 2, "seed=-1 must be from 0"),
        (("--seed", str(2**64)), 2, "must be from 0 to 2**64 - 1"),
        (("--heads", "3"), 1, "heads=3 is for a .ckpt of the published code"),
    ],
)
def test_options_that_have_no_meaning(make_run, capsys, option, code, message):
    make_run()
    found, err = generate(capsys, "--prompt", "the", *option)
    assert found == code and message in err


# --- pickles ------------------------------------------------------------------------------------


class Command:
    """Runs a command when it is unpickled, by a function that torch knows to be dangerous."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_no_pickle_is_run(here, make_model, tokenizer, capsys):
    bomb = pickle.dumps(Bomb())
    (here / "plain.ckpt").write_bytes(bomb)
    torch.save({"state_dict": {"a": Command()}}, here / "zip.ckpt")
    torch.save({"slope": {}, "state_dict": Command()}, here / "ours.ckpt")
    for kind in ("slope", "hf"):
        save = slope.save_pretrained if kind == "slope" else save_dense
        save(make_model(adapter_rank=0), here / kind, tokenizer)
        (here / kind / WEIGHTS).write_bytes(bomb)
    assert "'plain.ckpt' is damaged or no checkpoint" in error_of(capsys, "plain.ckpt", *TO)
    for name in ("zip.ckpt", "ours.ckpt"):
        line = error_of(capsys, name, *TO)
        assert f"'{name}' holds what cannot be read without running its code (posix.syst" in line
        assert "weights_only" not in line
    for kind in ("slope", "hf"):
        assert "is truncated or no safetensors file" in error_of(capsys, kind, *TO)
    assert not (here / "exploded").exists()


def test_a_checkpoint_with_our_end_and_nothing_of_ours(here, capsys):
    from slope.training import checkpoint

    checkpoint.save({"slope": {}, "state_dict": {}}, here / "e.ckpt")
    line = error_of(capsys, "e.ckpt", *TO)
    assert "'e.ckpt' does not say what model it is of (KeyError: 'signature')" in line


# --- the published code -------------------------------------------------------------------------


def test_odd_files_of_the_published_code(here, make_model, capsys):
    content, _ = published(slope.densify(make_model(adapter_rank=0)))
    left = "model.transformer.layers.1.mlp.fc1.lora_left"

    def error(change, *options):
        state = dict(content["state_dict"])
        change(state)
        torch.save({"state_dict": state}, here / "theirs.ckpt")
        return error_of(capsys, "theirs.ckpt", *(options or ("--heads", "4")), *TO)

    def drop(part):
        return lambda state: [state.pop(name) for name in list(state) if part in name]

    assert "lora_left () and lora_right (3, 128)" in error(
        lambda s: s.update({left: torch.ones(())})
    )
    assert "lora_left None and lora_right (3, 128)" in error(drop("layers.1.mlp.fc1.lora_left"))
    assert "has no matrix transformer.h.0.mlp.c_fc.weight" in error(drop(".layers."))
    assert "no 'state_dict' of named tensors" in error(lambda s: s.update({3: torch.ones(2)}))
    assert "32 wide, so heads=5 does not divide it" in error(drop("none"), "--heads", "5")
    line = error(lambda s: s.update({n: torch.rand(t.shape) for n, t in s.items() if t.dim() == 2}))
    assert "no linear layer holds the zeros of 2:4. The published code writes" in line
    state = {name: t for name, t in content["state_dict"].items() if "lora" not in name}
    torch.save({"state_dict": state}, here / "theirs.ckpt")
    assert export("theirs.ckpt", "--heads", "4", *TO) == 0  # trained without adapters
    assert not any(True for _ in islice(slope.adapter_parameters(slope.load_pretrained("out")), 1))


# --- what a crash leaves ------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from slope.export import folder
aside = sys.argv[2] == "between the renames"
replace = os.replace
def stop(source, target):
    replace(source, target)
    if aside:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = stop
with folder.new_folder(sys.argv[1], force=True) as draft:
    (draft / "half").write_text("written")
    if not aside:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between the renames"])
def test_a_killed_export_leaves_the_earlier_one_and_the_next_clears_up(here, make_model, moment):
    model = make_model()
    slope.save_pretrained(model, here / "out")
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    environment = os.environ | {"PYTHONPATH": str(Path(slope.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, "out", moment], env=environment)
    assert done.returncode == -9
    assert len(list(here.iterdir())) > 1
    with pytest.raises(FileExistsError, match="--force"):
        slope.save_pretrained(model, here / "out")
    assert list(here.iterdir()) == [here / "out"]
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == before


def test_a_draft_that_somebody_writes_is_left_alone(here):
    with new_folder(here / "out", force=False) as draft:
        with new_folder(here / "out", force=False) as other:
            assert draft.is_dir() and other != draft
            (other / "file").touch()
        (draft / "file").touch()
        (here / "out" / "file").unlink()
    assert list(here.iterdir()) == [here / "out"]
