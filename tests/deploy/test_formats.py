"""The three formats: what is written is what comes back, here and in other people's code."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from export_runs import IDS, assert_equal_states, logits
from safetensors.torch import load_file, save_file

import slope
from slope.deploy.source import cast
from slope.export import dense as dense_module
from slope.export import save as save_module
from slope.export import save_dense, save_peft

FOREIGN = """
import sys
sys.modules["slope"] = None  # any import of it fails
import torch, transformers
from safetensors.torch import save_file
logits = {}
for family in sys.argv[2:]:
    folder = sys.argv[1] + "/" + family
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for name in ("hf", "folded"):
            model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")
            logits[f"{family}.{name}"] = model(input_ids=ids).logits
        try:
            import peft
        except ImportError:
            continue
        model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/hf")
        for name in ("peft", "hf/adapter"):
            adapted = peft.PeftModel.from_pretrained(model, f"{folder}/{name}").eval()
            logits[f"{family}.{name}"] = adapted(input_ids=ids).logits
            model = adapted.unload()
save_file(logits, sys.argv[1] + "/logits.safetensors")
"""


# --- for transformers and peft ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_folder_is_the_densified_model_bit_for_bit(
    tmp_path, make_model, family, fold, dtype
):
    model = make_model(family)
    cast(model, dtype)  # rotary frequencies stay as transformers computes them
    before = copy.deepcopy(model)
    save_dense(model, tmp_path / "hf", fold_adapters=fold)
    assert_equal_states(model, before)  # and still sparse
    assert (tmp_path / "hf" / "adapter").is_dir() == (not fold)
    if not fold:
        slope.deactivate_adapters(model)
    expected = slope.densify(model, fold_adapters=fold)
    loaded = type(model).from_pretrained(tmp_path / "hf", dtype="auto")
    assert_equal_states(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    assert os.listdir(tmp_path) == ["hf"]


def test_others_load_them_where_slope_cannot_be_imported(tmp_path, make_model):
    families = ("gpt2", "llama")
    wanted = {}
    for family in families:
        model = make_model(family, adapter_rank=0.1)  # ranks 3 and 6 or 13
        save_dense(model, tmp_path / family / "hf")
        save_dense(model, tmp_path / family / "folded", fold_adapters=True)
        save_peft(model, tmp_path / family / "peft")
        wanted[family] = logits(model)
        folded = slope.densify(copy.deepcopy(model), fold_adapters=True)
        slope.deactivate_adapters(model)
        wanted[f"{family}.hf"], wanted[f"{family}.folded"] = logits(model), logits(folded)
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(tmp_path), *families],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    assert len(found) == (8 if find_spec("peft") else 4)
    for name, theirs in found.items():
        family = name.split(".")[0]
        assert torch.equal(theirs, wanted.get(name, wanted[family])), name
        assert torch.allclose(wanted[f"{family}.folded"], wanted[family], atol=1e-5)
        assert not torch.allclose(wanted[f"{family}.hf"], wanted[family], atol=1e-2)


def test_a_lora_has_the_ranks_and_the_scale_of_the_adapters(tmp_path, make_model):
    model = make_model(adapter_rank=0.1, adapter_scale=0.5)
    save_peft(model, tmp_path / "peft", base="mine/base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "mine/base" and config["fan_in_fan_out"]
    assert config["target_modules"] == [name for name, _ in slope.sparse_layers(model)]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, layer in slope.sparse_layers(model):
        rank = config["rank_pattern"].get(name, config["r"])
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) / rank == 0.5
        down, up = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert torch.equal(down, layer.adapter.down) and torch.equal(up, layer.adapter.up)
        assert down.shape[0] == rank


def test_dormant_adapters_and_foreign_models_are_errors(tmp_path, make_model):
    model = make_model()
    slope.deactivate_adapters(model)
    with pytest.raises(ValueError, match=r"no active adapter \(7 dormant\).*--format slope"):
        save_peft(model, tmp_path / "out")
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        save_dense(torch.nn.Linear(4, 4), tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("save", [save_dense, save_peft, slope.save_pretrained])
def test_force_replaces_exports_of_any_format_and_nothing_else(tmp_path, make_model, save):
    model = make_model()
    for earlier in (save_dense, save_peft, slope.save_pretrained):
        out = tmp_path / earlier.__name__
        earlier(model, out)
        with pytest.raises(FileExistsError, match="not empty.*--force"):
            save(model, out)
        save(model, out, force=True)
        assert (out / "adapter_config.json").is_file() == (save is save_peft)
        assert (out / "slope.json").is_file() == (save is slope.save_pretrained)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / "README.md").write_text("# years of work")
    with pytest.raises(FileExistsError, match="no earlier export and is not replaced"):
        save(model, theirs, force=True)
    assert sorted(os.listdir(theirs)) == ["README.md", "config.json"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, make_model, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense_module, "write_lora", full)
    for save in (save_dense, save_peft):
        with pytest.raises(OSError, match=r"No space left.*free some space"):
            save(make_model(), tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_every_file_can_be_read_by_whoever_may_read_the_folder(tmp_path, make_model):
    save_dense(make_model(), tmp_path / "hf")
    files = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    readable = (tmp_path / "hf").stat().st_mode & 0o444
    assert {path.stat().st_mode & 0o444 for path in files} == {readable}


def test_the_card_says_what_is_sparse_and_how_to_load_it(tmp_path, make_model, tokenizer):
    model = make_model("llama")
    slope.save_pretrained(model, tmp_path / "out", tokenizer)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: slope-llm\ntags: ["sparsity", "2:4"]\n---\n')
    assert "| `model.layers.1.mlp.down_proj` | 32 x 64 | 2:4 | 3 |" in card
    assert 'slope.load_pretrained("this folder")' in card


def test_a_card_says_no_layer_sparse_that_is_not(tmp_path, make_model):
    model = make_model("llama")
    save_dense(model, tmp_path / "hf")
    save_dense(model, tmp_path / "folded", fold_adapters=True)
    save_dense(make_model("llama", dense=True), tmp_path / "dense")
    save_dense(make_model("llama", method="dynamic-input", adapter_rank=0), tmp_path / "inputs")
    cards = {path.parent.name: path.read_text() for path in tmp_path.glob("*/README.md")}
    head = 'tags: ["sparsity", "2:4"]\n---\n<!-- slope export -->\n# LlamaForCausalLM, 2:4 sparse\n'
    assert head in cards["hf"] and "12 linear layers are 2:4" not in cards["hf"]
    assert "| `model.layers.1.mlp.down_proj` | 32 x 64 | 2:4 | 3 |" in cards["hf"]
    for name in ("folded", "dense", "inputs"):
        assert "tags: []\n" in cards[name] and "# LlamaForCausalLM, dense\n" in cards[name]
        assert "2:4" not in cards[name] and "their zeros" not in cards[name]
        assert "all 15 linear layers are dense." in cards[name]
    assert "Dense weights; those of 11 layers have their adapters added in" in cards["folded"]


# --- ours ------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(save_module, "SHARD_BYTES", 40_000)
    model = make_model()
    return model, slope.save_pretrained(model, tmp_path / "out")


def test_a_large_model_is_written_in_shards_that_load_alike(sharded):
    model, folder = sharded
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all((folder / shard).stat().st_size < 45_000 for shard in shards)
    loaded = slope.load_pretrained(folder, verify=True)
    assert_equal_states(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_missing_and_truncated_shards_are_errors(sharded):
    _, folder = sharded
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shard.name}' is truncated"):
        slope.load_pretrained(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}' is missing; the folder is incompl"):
        slope.load_pretrained(folder)


@pytest.mark.parametrize(
    "index", ["{", '{"weight_map": []}', "{}", '{"weight_map": {"a": "../other.safetensors"}}']
)
def test_a_damaged_index_is_an_error(sharded, index):
    _, folder = sharded
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json' is damaged"):
        slope.load_pretrained(folder)


def test_a_changed_value_is_found_on_request(tmp_path, make_model):
    folder = slope.save_pretrained(make_model(), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.attn.c_attn.compressed"][2, 3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    slope.load_pretrained(folder)
    with pytest.raises(ValueError, match=r"not the file that was exported \(its SHA-256 differs"):
        slope.load_pretrained(folder, verify=True)


def test_sparse_layers_take_nine_sixteenths_of_bf16_and_no_column_mask(tmp_path, make_model):
    model = make_model("llama", adapter_rank=0)
    model.to(torch.bfloat16)
    slope.refresh_column_masks(model)
    folder = slope.save_pretrained(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    parts = ("compressed", "bitmask", "column_mask")
    for name, layer in slope.sparse_layers(model):
        stored = sum(t.nbytes for part in parts if (t := tensors.get(f"{name}.{part}")) is not None)
        assert stored == 0.5625 * 2 * layer.in_features * layer.out_features
    assert_equal_states(slope.load_pretrained(folder), model)


def test_weights_are_mapped_and_not_read(tmp_path, make_model):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc, to see what is mapped")
    folder = slope.save_pretrained(make_model(), tmp_path / "out")
    loaded = slope.load_pretrained(folder)
    (line,) = [x for x in maps.read_text().splitlines() if str(folder / "model.safetensors") in x]
    begin, end = (int(text, 16) for text in line.split()[0].split("-"))
    _, layer = next(slope.sparse_layers(loaded))
    assert begin <= layer.values.data_ptr() < end
    assert begin <= loaded.get_input_embeddings().weight.data_ptr() < end


def test_column_masks_can_be_left_to_training(tmp_path, make_model):
    model = make_model("llama")
    folder = slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(folder, training=False)
    _, layer = next(slope.sparse_layers(loaded))
    assert torch.equal(layer.column_keep_mask(), layer.keep_mask())
    assert torch.equal(logits(loaded), logits(model))
    for each in (loaded, model):
        each(input_ids=IDS, labels=IDS).loss.backward()
    assert_equal_states(loaded, model)
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_version_1_is_read(tmp_path, make_model):
    model = make_model(column_mask_interval=0)
    with torch.no_grad():
        for _, layer in slope.sparse_layers(model):
            layer.values.normal_()  # so that every column mask is stored, as version 1 did
    folder = slope.save_pretrained(model, tmp_path / "out")
    description = json.loads((folder / "slope.json").read_text())
    description["format_version"] = 1
    for key in ("files", "vocabulary"):
        del description[key]
    for entry in description["layers"].values():
        assert entry.pop("column_mask")
    (folder / "slope.json").write_text(json.dumps(description))
    assert_equal_states(slope.load_pretrained(folder, verify=True), model)


def test_a_bitmask_of_another_pattern_is_an_error(tmp_path, make_model):
    folder = slope.save_pretrained(make_model(), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.attn.c_attn.bitmask"][2] = 0b00010111
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="keeps 3 of 4 in row 2, group 0, but its pattern is 2:4"):
        slope.load_pretrained(folder)


def test_generate_of_transformers_runs_on_what_load_pretrained_gives(tmp_path, make_model):
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    options |= {"disable_compile": True, "pad_token_id": 0}
    for family in ("gpt2", "llama"):
        model = make_model(family)
        slope.save_pretrained(model, tmp_path / family)
        loaded = slope.load_pretrained(tmp_path / family)
        wanted = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
        found = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
        assert torch.equal(found, wanted) and wanted.shape == (2, 18)
