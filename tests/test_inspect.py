"""``slope inspect``: what it finds, what it prints, and that no broken mask passes."""

from __future__ import annotations

import json
import re

import pytest
import torch

import slope
from slope import cli, configs
from slope.cli import inspect
from slope.models import build_model
from slope.training import checkpoint, pruner, signature

BASE = ("experiment=smoke", "trainer.max_steps=20")
VOCABULARY = 304


def content_of(*overrides, step=17):
    """What a checkpoint of a run holds, as far as it is read."""
    cfg = configs.compose([*BASE, *overrides])
    model = build_model(cfg.model, VOCABULARY, 32)
    pruner.apply(cfg.pruner, model)
    with torch.no_grad():
        for parameter in slope.adapter_parameters(model):
            parameter.normal_()
    known = signature.config_signature(cfg) | signature.model_signature(model, VOCABULARY)
    known["trainer.max_steps"] = 20
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"slope": {"signature": known}, "state_dict": state, "global_step": step}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLOPE_TRACEBACK", raising=False)
    return tmp_path


def save(here, content, name="mine", file="last.ckpt"):
    path = here / "checkpoints" / name / file
    checkpoint.save(content, path)
    return path


def test_a_run_by_name_folder_and_file(here, capsys):
    path = save(here, content_of())
    for given in ("mine", "checkpoints/mine", str(path)):
        assert cli.main(["inspect", given]) == 0
        out = capsys.readouterr().out
        assert ", step 17: sparsified 7 of 9 linear layers (2:4), " in out
        (row,) = [line.split() for line in out.splitlines() if "h.1.mlp.c_proj" in line]
        assert row[1:6] == ["32", "x", "128", "2:4", "0.5000"]
        assert row[8] == "0.0938" and row[-3:] == ["adapter", "rank", "4"]
        assert "first linear layer after the embedding" in out
        assert "weight is tied to transformer.wte.weight" in out
        assert "0.5469 of dense" in out
        assert out.endswith("the constraints of all 7 sparse layers hold\n")


def test_json_has_report_and_diagnostics(here, capsys):
    save(here, content_of())
    assert cli.main(["inspect", "mine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == "checkpoints/mine/last.ckpt" and found["step"] == 17
    assert found["weights"] and found["violations"] == {}
    assert len(found["layers"]) == 9
    layer = found["layers"][1]
    assert layer["name"] == "transformer.h.0.attn.c_proj"
    assert (layer["method"], layer["pattern"], layer["rank"]) == ("slope", "2:4", 4)
    assert layer["density"] == 0.5 and layer["lemma"] == 0.09375 and layer["adapter_norm"] > 0
    assert found["layers"][0]["reason"] == "first linear layer after the embedding"
    assert found["total"]["density"] == 0.5
    assert found["total"]["imposed_sparsity"] == pytest.approx(0.094, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["pruner=extended-sr-ste"], ["2:4, dynamic-weight", "kept energy", "all 7 sparse"]),
        (["pruner=sr-ste", "pruner.pattern=1:4"], ["1:4", "all 7 sparse layers hold"]),
        (["pruner=fst", "pruner.dense_start=0.9"], ["fst", "0.5000", "all 4 sparse layers hold"]),
        (["pruner=fst", "pruner.dense_start=0.5"], ["1.0000", "all 4 sparse layers hold"]),
        (["pruner=s-ste"], ["s-ste", "hold"]),
        (["pruner.pruned_matrix=static-input"], ["static-input", "hold"]),
        (["pruner.unstructured_masking=True"], ["60%", "unstructured", "hold"]),
        (["pruner.reduction_dim=False"], ["along d_out", "hold"]),
        (["pruner=none"], ["sparsified 0 of 9", "no sparse layer: there are no masks to check"]),
    ],
)
def test_checkpoints_of_other_methods(here, capsys, overrides, texts):
    save(here, content_of(*overrides))
    assert cli.main(["inspect", "mine"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in texts), out


LAYER = "transformer.h.1.mlp.c_fc"


def test_a_flipped_byte_of_metadata_is_found(here, capsys):
    content = content_of()
    metadata = content["state_dict"][f"model.{LAYER}.metadata"]
    # 2:4: two positions of two bits per group; 0x05 sets both positions of group 0 to 1.
    metadata[3, 0] = (metadata[3, 0] & 0xF0) | 0x05
    save(here, content)
    assert cli.main(["inspect", "mine"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"slope: error: layer {LAYER!r}: metadata does not describe a 2:4 mask (a group repeats a "
        "position or is out of order).\n"
    )
    assert captured.out.endswith("1 of 7 sparse layers break a constraint\n")
    assert any(LAYER in line and "BROKEN" in line for line in captured.out.splitlines())


def test_other_tampering_is_found_and_every_layer_named(here, capsys):
    content = content_of()
    content["state_dict"][f"model.{LAYER}.column_mask"].fill_(255)
    content["state_dict"]["model.transformer.h.0.mlp.c_fc.metadata"].zero_()
    save(here, content)
    assert cli.main(["inspect", "mine", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert list(found["violations"]) == ["transformer.h.0.mlp.c_fc", LAYER]
    assert "the column mask keeps" in found["violations"][LAYER][0]
    assert found["total"] is None and "density" not in found["layers"][3]
    assert captured.err.count("slope: error: layer ") == 2


def test_a_method_with_a_broken_mask_is_found(here, capsys):
    content = content_of("pruner=fst")
    content["state_dict"][f"model.{LAYER}.keep_mask"][0, :4] = True
    save(here, content)
    assert cli.main(["inspect", "mine"]) == 1
    assert f"layer {LAYER!r}: the transposable mask keeps 4 of 4" in capsys.readouterr().err


def test_a_damaged_file_is_an_error(here, capsys):
    path = save(here, content_of())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cli.main(["inspect", str(path)]) == 1
    assert "is damaged (its SHA-256 does not match)" in capsys.readouterr().err
    assert cli.main(["inspect", "mine"]) == 1
    assert "no usable checkpoint in checkpoints/mine" in capsys.readouterr().err


def test_objects_are_never_unpickled(here, capsys):
    path = save(here, content_of() | {"more": torch.nn.Linear(2, 2)})
    assert cli.main(["inspect", str(path)]) == 1
    assert "holds objects beside tensors and plain values" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_itself(here, capsys):
    content = content_of()
    del content["state_dict"][f"model.{LAYER}.metadata"]
    save(here, content)
    assert cli.main(["inspect", "mine"]) == 1
    assert "last.ckpt does not fit the model that it describes: " in capsys.readouterr().err


def test_a_folder_of_save_pretrained(here, capsys):
    cfg = configs.compose(BASE)
    model = build_model(cfg.model, VOCABULARY, 32)
    pruner.apply(cfg.pruner, model)
    slope.save_pretrained(model, here / "export")
    assert cli.main(["inspect", "export"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("export: sparsified 7 of 9 linear layers")
    assert out.endswith("the constraints of all 7 sparse layers hold\n")

    from safetensors.torch import load_file, save_file

    tensors = load_file(here / "export" / "model.safetensors")
    tensors[f"{LAYER}.bitmask"][0] = 255
    save_file(tensors, here / "export" / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["inspect", "export"]) == 1
    assert f"the bitmask of layer {LAYER!r} keeps 4 of 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["gpt2/small"], ["47 of 49", "2304 x 768", "adapter rank 16", "50264 x 768"]),
        (["gpt2/small", "pruner.pattern=2:8"], ["(2:8)"]),
        (["gpt2/small", "pruner=none"], ["sparsified 0 of 49"]),
        (["experiment=smoke", "pruner.add_lora=False"], ["sparsified 7 of 9", "512 x 32"]),
        (["bert/base"], ["bert/base: sparsified", "3072 x 768"]),
        (["bert/large", "pruner.pattern=2:8"], ["(2:8)", "4096 x 1024"]),
        (["experiment=smoke", "pruner=extended-sr-ste"], ["dynamic-weight"]),
    ],
)
def test_a_model_is_built_without_weights(here, capsys, arguments, texts):
    assert cli.main(["inspect", *arguments]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in texts), out
    assert out.endswith("built without weights: there are no masks to check\n")
    assert "density" not in out


def test_json_of_a_model(here, capsys):
    assert cli.main(["inspect", "experiment=smoke", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["weights"] and found["total"] is None and found["step"] is None
    assert found["layers"][1]["bytes_stored"] < 0.6 * found["layers"][1]["bytes_dense"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["nothing"],
            1,
            "nothing is neither a checkpoint, nor a folder with one, nor a model. Runs under",
        ),
        (["gpt2/smal"], 1, "did you mean 'gpt2/small'? Runs under checkpoints/: mine; models:"),
        (["mien"], 1, "did you mean 'mine'?"),
        (["mine", "pruner.pattern=2:8"], 2, "mine is a checkpoint, which takes no overrides: 'pru"),
        (["mine", "other"], 2, "takes no overrides: 'other'; name mine alone."),
        (["gpt2/small", "bert/base"], 2, "gpt2/small and bert/base are several models; name one."),
        (["gpt2/small", "--tokens", "64"], 2, "--tokens goes with --backend"),
        (["experiment=smoke", "pruner.patern=2:4"], 2, "did you mean 'pruner.pattern'"),
        (["experiment=smoke", "pruner.pattern=3:2"], 2, "pattern 3:2 keeps n=3 of m=2"),
        ([], 2, "the following arguments are required: CHECKPOINT|MODEL"),
    ],
)
def test_wrong_arguments(here, capsys, arguments, code, message):
    save(here, {"x": torch.zeros(2)})
    assert cli.main(["inspect", *arguments]) == code
    assert message in capsys.readouterr().err


def test_usage_says_that_one_checkpoint_is_inspected_at_a_time(capsys):
    assert cli.main(["inspect"]) == 2
    err = capsys.readouterr().err
    assert " CHECKPOINT|MODEL [override ...]\n" in err
    assert err.endswith("the following arguments are required: CHECKPOINT|MODEL\n")


def test_a_folder_whose_files_have_other_names(here, capsys):
    save(here, {"x": torch.zeros(2)}, file="other.ckpt")
    assert cli.main(["inspect", "mine"]) == 1
    assert "checkpoints/mine holds no checkpoint named last.ckpt or step_<k>" in (
        capsys.readouterr().err
    )


def test_a_terminal_gets_a_table(here, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    save(here, content_of("pruner.rules=[['*.h.1.mlp','dense']]"))
    assert cli.main(["inspect", "mine"]) == 0
    out = capsys.readouterr().out
    assert "───" in out and "lemma" in out and "rule '*.h.1.mlp'" in out


@pytest.mark.parametrize("width", [80, 110, 120, 160])
def test_no_terminal_breaks_a_name_or_a_number(here, capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    save(here, content_of())
    assert cli.main(["inspect", "mine"]) == 0
    out = capsys.readouterr().out
    assert ("───" in out) == (width >= 120)  # plain columns where the table does not fit
    assert all(f"transformer.h.{i}.mlp.c_proj" in out for i in (0, 1))
    assert out.count("0.0938") >= 8  # Lemma 2.1 of seven layers and of their mean
    if width >= 120:
        assert max(len(line) for line in _visible(out).splitlines()[1:-2]) <= width


def _visible(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_every_number_that_is_shown_is_a_diagnostic():
    from slope.diagnostics import COLUMNS

    assert set(inspect._NUMBERS.values()) == set(COLUMNS) - {"flip_rate", "column_flip_rate"}


def test_backend_says_who_multiplies_and_why(here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["inspect", "gpt2/small", "pruner.pattern=2:8", "--backend"]) == 0
    out = capsys.readouterr().out
    assert "backend=auto on this machine, bf16, 8,192 tokens:" in out
    assert "3072 x 768 2:8, 12 layers: forward dense, input gradient dense" in out
    assert "pattern 2:8 has no sparse kernels, only 2:4 has" in out
    assert cli.main(["inspect", "gpt2/small", "--backend", "--tokens", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backend"]
    assert {path["shape"] for path in found} >= {"3072 x 768", "768 x 3072", "768 x 768"}
    assert all("the layer is on cpu" in path["reason"] for path in found)
    assert cli.main(["inspect", "gpt2/small", "--backend", "--tokens", "0"]) == 2
    assert "--tokens 0 must be at least 1" in capsys.readouterr().err


def test_paths_of_a_gpu_are_those_that_were_chosen(monkeypatch):
    from slope import paths
    from slope.backends.tuning import Choice

    chosen = {
        "forward": Choice("cusparselt", {"cusparselt": "3"}, {"cusparselt": 10.0, "dense": 12.5}),
        "input_gradient": Choice("dense", refused={"cusparselt": "no tiles"}),
    }
    monkeypatch.setattr(paths, "why_no_kernels", lambda *_: None)
    monkeypatch.setattr(paths.ops, "explain", lambda *_: chosen)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32))
    report = slope.sparsify(model, slope.SparsityConfig())
    first, *_ = paths.explain(report.layers, 16)
    assert (first.forward, first.input_gradient) == ("cusparselt", "dense")
    assert first.reason == (
        "forward: cusparselt (3) 10.0 µs, dense 12.5 µs; input gradient: cusparselt: no tiles"
    )


def test_a_folder_of_transformers_is_named_as_one(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "is a folder for transformers, whose weights are dense;" in capsys.readouterr().err
