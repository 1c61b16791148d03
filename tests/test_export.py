from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slope
from slope.compressed import pack_bits, unpack_bits
from slope.export import folder as folder_module
from slope.export import load as load_module
from slope.export import save as save_module


class Mlp(nn.Module):
    """A model that transformers does not know, with a tied pair and a computed float buffer."""

    def __init__(self, features=16, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(24, features)
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, features, bias=False)
        self.norm = nn.LayerNorm(features)
        self.lm_head = nn.Linear(features, 24, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.register_buffer("scale", torch.linspace(0.3, 1.7, features), persistent=False)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, ids):
        x = self.embedding(ids) * self.scale
        return self.lm_head(self.norm(x + self.down(torch.relu(self.up(x)))))


def sparse_mlp(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = Mlp()
    slope.sparsify(model, slope.SparsityConfig(**options))
    with torch.no_grad():
        for _, layer in slope.sparse_layers(model):
            if layer.adapter is not None:
                layer.adapter.up.normal_()
    return model.to(dtype).eval()


def tiny(family):
    """A model of transformers, small enough for a test."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 16}
    llama = {"intermediate_size": 64, "num_key_value_heads": 2}
    if family == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
        return hf.GPT2LMHeadModel(config)
    if family == "opt":
        return hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32))
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **llama))
    if family == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**sizes, **llama))
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, **llama))
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=64))


def assert_same_model(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    pairs = zip(slope.sparse_layers(loaded), slope.sparse_layers(model), strict=True)
    for (name, layer), (other_name, other) in pairs:
        assert name == other_name
        assert torch.equal(layer.keep_mask(), other.keep_mask())
        assert torch.equal(layer.column_keep_mask(), other.column_keep_mask())
        assert layer.column_mask_interval == other.column_mask_interval
        assert layer.origin == other.origin
        assert (layer.adapter is None) == (other.adapter is None)
        if layer.adapter is not None:
            assert layer.adapter.scale == other.adapter.scale
            assert layer.adapter.active == other.adapter.active


def rewrite(folder, change):
    """Edit the tensors of an export in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_description(folder, change):
    description = json.loads((folder / "slope.json").read_text())
    change(description)
    (folder / "slope.json").write_text(json.dumps(description))


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "2:8", "4:8", "2:16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_module_comes_back_bit_for_bit(tmp_path, pattern, dtype):
    model = sparse_mlp(pattern=pattern, dtype=dtype, adapter_rank=3, column_mask_interval=5)
    slope.activate_adapters(model)
    slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    assert_same_model(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.lm_head.weight is loaded.embedding.weight
    assert loaded.scale.dtype == dtype and torch.equal(loaded.scale, model.scale)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "qwen2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers_comes_back_bit_for_bit(tmp_path, family, dtype):
    model = tiny(family)
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2, mask="random", seed=4))
    model = model.to(dtype).eval()
    slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same_model(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert not any(p.is_meta for p in loaded.parameters())


def test_a_loaded_model_trains_on_as_the_original_does(tmp_path):
    model = sparse_mlp(adapter_rank=2)
    slope.activate_adapters(model)
    slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    for each in (model, loaded):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(IDS).flatten(0, 1), IDS.flatten()).backward()
            optimizer.step()
    assert_same_model(loaded, model)


def test_the_stored_column_mask_is_kept_though_the_values_would_give_another(tmp_path):
    model = sparse_mlp(column_mask_interval=0)
    with torch.no_grad():
        for _, layer in slope.sparse_layers(model):
            layer.values.copy_(torch.randn_like(layer.values))
    slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    assert_same_model(loaded, model)
    before = loaded.up.column_keep_mask()
    loaded.up.refresh_column_mask()
    assert not torch.equal(before, loaded.up.column_keep_mask())


def test_an_exact_backward_comes_back_and_stays_exact(tmp_path):
    model = sparse_mlp(prune_backward=False)
    slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    assert_same_model(loaded, model)
    loaded.up.refresh_column_mask()
    assert torch.equal(loaded.up.column_keep_mask(), loaded.up.keep_mask())


def test_an_export_written_before_that_option_is_read(tmp_path):
    model = sparse_mlp()
    slope.save_pretrained(model, tmp_path / "out")

    def forget(description):
        for entry in description["layers"].values():
            del entry["prune_backward"]

    edit_description(tmp_path / "out", forget)
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    assert_same_model(loaded, model)
    assert loaded.up.prune_backward


def test_layers_of_other_methods_are_compressed_before_they_are_saved(tmp_path):
    model = Mlp()
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight"))
    expected = model(IDS)
    match = r"'up' is a PrunedLinear \(method dynamic-weight\).*slope\.compress_weights\(model\)"
    with pytest.raises(ValueError, match=match):
        slope.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    slope.save_pretrained(slope.compress_weights(model), tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    torch.testing.assert_close(loaded(IDS), expected)
    other = Mlp()
    slope.sparsify(other, slope.SparsityConfig(method="dynamic-weight"))
    with pytest.raises(ValueError, match=r"'up' of the model is a PrunedLinear.*dense model"):
        slope.load_pretrained(tmp_path / "out", model=other)


def test_a_kept_weight_that_is_zero_stays_kept(tmp_path):
    model = sparse_mlp()
    with torch.no_grad():
        model.up.values[:, ::3] = 0.0
    slope.save_pretrained(model, tmp_path / "out")
    loaded = slope.load_pretrained(tmp_path / "out", model=Mlp())
    assert torch.equal(loaded.up.keep_mask(), model.up.keep_mask())


def test_the_layout_is_values_row_major_and_little_endian_bits(tmp_path):
    model = sparse_mlp()
    slope.save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    dense = model.up.to_dense().detach()
    bits = [
        [(int(byte) >> bit) & 1 for byte in row for bit in range(8)]
        for row in tensors["up.bitmask"]
    ]
    kept = torch.tensor(bits, dtype=torch.bool)[:, : dense.shape[1]]
    assert torch.equal(kept, model.up.keep_mask())
    assert torch.equal(tensors["up.compressed"].flatten(), dense[kept])
    assert tensors["up.shape"].tolist() == [[32], [16]]
    assert "lm_head.weight" not in tensors


def test_values_and_bitmask_take_nine_sixteenths_of_the_dense_bytes_in_bf16(tmp_path):
    model = sparse_mlp(dtype=torch.bfloat16)
    slope.save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = sum(tensors[f"up.{leaf}"].nbytes for leaf in ("compressed", "bitmask"))
    assert stored == 0.5625 * model.up.to_dense().nbytes


def test_a_sparse_model_and_a_meta_model_can_be_loaded_into(tmp_path):
    model = sparse_mlp(seed=1)
    slope.save_pretrained(model, tmp_path / "out")
    assert_same_model(slope.load_pretrained(tmp_path / "out", model=sparse_mlp(seed=2)), model)
    with torch.device("meta"):
        empty = Mlp()
    assert torch.equal(slope.load_pretrained(tmp_path / "out", model=empty)(IDS), model(IDS))


def test_a_compiled_wrapper_is_looked_through(tmp_path):
    model = sparse_mlp()
    slope.save_pretrained(torch.compile(model, backend="eager"), tmp_path / "out")
    assert_same_model(slope.load_pretrained(tmp_path / "out", model=Mlp()), model)


def test_views_into_one_storage_are_saved(tmp_path):
    model = sparse_mlp()
    both = torch.arange(10.0)
    model.register_buffer("first", both[:5])
    model.register_buffer("second", both[5:])
    slope.save_pretrained(model, tmp_path / "out")
    other = Mlp()
    other.register_buffer("first", torch.zeros(5))
    other.register_buffer("second", torch.zeros(5))
    loaded = slope.load_pretrained(tmp_path / "out", model=other)
    assert torch.equal(loaded.second, both[5:])


def test_the_tokenizer_and_the_generation_config_travel_along(tmp_path):
    from tokenizers import Tokenizer, models

    model = tiny("gpt2")
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    slope.sparsify(model)
    slope.save_pretrained(model, tmp_path / "out", Tokenizer(models.WordLevel({"a": 0}, "a")))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert slope.load_pretrained(tmp_path / "out").generation_config.temperature == 0.25


def test_saving_leaves_the_model_and_its_config_alone(tmp_path):
    model = tiny("llama")
    slope.sparsify(model)
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    slope.save_pretrained(model, tmp_path / "out")
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    model = tiny("gpt2")
    slope.sparsify(model)
    slope.save_pretrained(model, tmp_path / "out")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    slope.load_pretrained(tmp_path / "out")


# --- the folder: all or nothing ---------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_force_replaces_an_export(tmp_path):
    slope.save_pretrained(sparse_mlp(seed=1), tmp_path / "out")
    newer = sparse_mlp(seed=2)
    with pytest.raises(FileExistsError, match=r"not empty.*force=True"):
        slope.save_pretrained(newer, tmp_path / "out")
    slope.save_pretrained(newer, tmp_path / "out", force=True)
    assert_same_model(slope.load_pretrained(tmp_path / "out", model=Mlp()), newer)
    assert os.listdir(tmp_path) == ["out"]


def test_force_never_removes_what_is_no_export(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no slope\.json.*choose another"):
        slope.save_pretrained(sparse_mlp(), tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        slope.save_pretrained(sparse_mlp(), tmp_path / "file", force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    slope.save_pretrained(sparse_mlp(), tmp_path / "out")
    assert (tmp_path / "out" / "slope.json").is_file()


@pytest.mark.parametrize(
    ("module", "step"), [(save_module, "_write"), (folder_module, "_move_into_place")]
)
def test_a_full_disk_leaves_the_earlier_export_whole(tmp_path, monkeypatch, module, step):
    model = sparse_mlp(seed=1)
    slope.save_pretrained(model, tmp_path / "out")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, full)
    with pytest.raises(OSError, match=r"No space left.*free some space"):
        slope.save_pretrained(sparse_mlp(seed=2), tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_model(slope.load_pretrained(tmp_path / "out", model=Mlp()), model)


def test_a_dense_model_and_a_shared_sparse_layer_are_errors(tmp_path):
    with pytest.raises(ValueError, match="has no SlopeLinear"):
        slope.save_pretrained(Mlp(), tmp_path / "out")
    model = sparse_mlp()
    model.again = model.up
    with pytest.raises(ValueError, match="'up' and 'again' are one SlopeLinear"):
        slope.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damaged and foreign folders --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    model = sparse_mlp(adapter_rank=2, column_mask_interval=0)
    with torch.no_grad():  # so that the column mask is older than the values, and stored
        model.up.values.normal_()
    return slope.save_pretrained(model, tmp_path / "out")


def test_a_missing_folder_and_missing_files_are_errors(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no folder"):
        slope.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*model=model"):
        slope.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors' is missing"):
        slope.load_pretrained(folder, model=Mlp())
    (folder / "slope.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no slope\.json"):
        slope.load_pretrained(folder, model=Mlp())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_an_error(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        slope.load_pretrained(folder, model=Mlp())


def test_a_pickle_in_place_of_the_weights_is_an_error(folder):
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        slope.load_pretrained(folder, model=Mlp())


def test_unknown_versions_and_other_tools_are_errors(folder):
    edit_description(folder, lambda d: d.update(format_version=99))
    with pytest.raises(ValueError, match="format_version 99.*pip install --upgrade"):
        slope.load_pretrained(folder, model=Mlp())
    edit_description(folder, lambda d: d.update(format="other"))
    with pytest.raises(ValueError, match="does not describe a 'slope' export"):
        slope.load_pretrained(folder, model=Mlp())
    (folder / "slope.json").write_text('{"format": "slo')
    with pytest.raises(ValueError, match="is damaged"):
        slope.load_pretrained(folder, model=Mlp())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("layers"), "'layers' is None; export"),
        (lambda d: d["layers"]["up"].pop("pattern"), "damaged at layer 'up'"),
        (lambda d: d["layers"]["up"].update(pattern="4:2"), "4:2"),
        (lambda d: d["layers"]["up"].update(pattern="1:4"), "has shape"),
        (lambda d: d["layers"].update(other=d["layers"]["up"]), "no tensor 'other.compressed'"),
        (lambda d: d["layers"].pop("up"), "does not fit the model Mlp"),
        (lambda d: d["layers"]["up"]["adapter"].update(rank=3), "has shape"),
        (lambda d: d["tied"].update({"lm_head.weight": "gone"}), "does not fit the model"),
        (lambda d: d.update(buffers=["gone"]), "no buffer 'gone'"),
    ],
)
def test_a_description_that_does_not_fit_the_weights_is_an_error(folder, change, message):
    edit_description(folder, change)
    with pytest.raises(ValueError, match=message):
        slope.load_pretrained(folder, model=Mlp())


def break_row_mask(tensors):
    kept = unpack_bits(tensors["up.bitmask"], 16)
    kept[3, 4:8] = True
    tensors["up.bitmask"] = pack_bits(kept)


def break_column_mask(tensors):
    tensors["up.column_mask"].fill_(255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_row_mask, "layer 'up' keeps 4 of 4 in row 3, group 1, but its pattern is 2:4"),
        (break_column_mask, "column mask of layer 'up' keeps more than 2 of 4"),
        (lambda t: t.pop("norm.weight"), "missing in the file .'norm.weight'"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown to the model .'extra'"),
        (lambda t: t.pop("up.bitmask"), "no tensor 'up.bitmask'"),
        (lambda t: t.update({"up.shape": torch.tensor([[16], [32]])}), "shape stored"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda t: t.update({"up.bitmask": t["up.bitmask"].int()}), "not uint8"),
    ],
)
def test_damaged_tensors_are_errors_and_leave_the_model_alone(folder, change, message):
    rewrite(folder, change)
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        slope.load_pretrained(folder, model=model)
    assert not list(slope.sparse_layers(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_of_other_sizes_or_layers_is_an_error(folder):
    with pytest.raises(ValueError, match="'up' of the model is 64 x 16, the saved one 32 x 16"):
        slope.load_pretrained(folder, model=Mlp(hidden=64))
    with pytest.raises(ValueError, match="has no layer 'up'"):
        slope.load_pretrained(folder, model=nn.Linear(4, 4))
    other = Mlp()
    other.up = nn.Embedding(32, 16)
    with pytest.raises(ValueError, match="is a Embedding, which cannot be sparse"):
        slope.load_pretrained(folder, model=other)


def test_an_architecture_that_transformers_lacks_is_an_error(tmp_path):
    model = tiny("gpt2")
    slope.sparsify(model)
    folder = slope.save_pretrained(model, tmp_path / "out")
    for name in ("NoSuchModel", "AutoTokenizer"):
        edit_description(folder, lambda d, name=name: d.update(architecture=name))
        with pytest.raises(ValueError, match=f"has no model '{name}'"):
            slope.load_pretrained(folder)


def test_building_on_meta_is_undone_afterwards():
    with load_module.parameters_on_meta():
        assert nn.Linear(4, 4).weight.is_meta
    assert not nn.Linear(4, 4).weight.is_meta


def test_an_unknown_backend_is_no_damage_of_the_file(tmp_path):
    slope.save_pretrained(sparse_mlp(), tmp_path / "m")
    with pytest.raises(ValueError, match="^backend='foo' is unknown; choose one of auto, dense"):
        slope.load_pretrained(tmp_path / "m", model=Mlp(), backend="foo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_named(tmp_path, device):
    slope.save_pretrained(sparse_mlp(), tmp_path / "m")
    with pytest.raises(RuntimeError, match=f"device='{device}' is not there.*device='cpu'"):
        slope.load_pretrained(tmp_path / "m", model=Mlp(), device=device)


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_frozen_in_the_given_model_stays_frozen(tmp_path, sparse):
    slope.save_pretrained(sparse_mlp(adapter_rank=2), tmp_path / "m")
    model = sparse_mlp(adapter_rank=2) if sparse else Mlp()
    model.up.requires_grad_(False)
    model.norm.requires_grad_(False)
    loaded = slope.load_pretrained(tmp_path / "m", model=model)
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    adapter = {"up.adapter.down", "up.adapter.up"} if sparse else set()
    assert frozen == {"up.values", "up.bias", "norm.weight", "norm.bias"} | adapter


def test_hooks_of_the_given_model_stay(tmp_path):
    slope.save_pretrained(sparse_mlp(), tmp_path / "m")
    model, seen = Mlp(), []
    handle = model.up.register_forward_hook(lambda *_: seen.append("up"))
    slope.load_pretrained(tmp_path / "m", model=model)(IDS)
    assert seen == ["up"]
    handle.remove()
    model(IDS)
    assert seen == ["up"]


def test_a_single_layer_takes_over_and_keeps_its_hooks_and_its_frozen_bias(tmp_path):
    layer, seen = slope.SlopeLinear(16, 8), []
    slope.save_pretrained(layer, tmp_path / "m")
    other = slope.SlopeLinear(16, 8)
    other.bias.requires_grad_(False)
    other.register_forward_hook(lambda *_: seen.append("called"))
    x = torch.randn(2, 16)
    assert torch.equal(slope.load_pretrained(tmp_path / "m", model=other)(x), layer(x))
    assert seen == ["called"]
    assert [name for name, p in other.named_parameters() if p.requires_grad] == ["values"]


def test_what_was_loaded_for_inference_is_saved_and_trains_on(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    slope.sparsify(model)
    slope.save_pretrained(model, tmp_path / "a")
    frozen = slope.load_pretrained(tmp_path / "a", copy.deepcopy(model), training=False)
    slope.save_pretrained(frozen, tmp_path / "b")
    again = slope.load_pretrained(tmp_path / "b", copy.deepcopy(model))
    assert torch.equal(again[0].column_mask, model[0].column_mask)


def test_a_parameter_of_a_sparse_layer_in_two_places_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].bias = model[0].bias
    slope.sparsify(model)
    with pytest.raises(ValueError, match=r"'0.bias' and '1.bias' are one parameter"):
        slope.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_and_averaged_masks_are_refused(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    slope.sparsify(model)
    with pytest.raises(ValueError, match="layer '0' is on the meta device and has no weights"):
        slope.save_pretrained(model, tmp_path / "out")
    trained = nn.Sequential(nn.Linear(16, 16))
    slope.sparsify(trained)
    averaged = torch.optim.swa_utils.AveragedModel(trained, use_buffers=True)
    with pytest.raises(ValueError, match="has averaged the masks, .*; leave use_buffers away"):
        slope.save_pretrained(averaged, tmp_path / "out")
    slope.save_pretrained(torch.optim.swa_utils.AveragedModel(trained), tmp_path / "out")
