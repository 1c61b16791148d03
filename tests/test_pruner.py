"""The published pruner options, alone and together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slope
from slope.configs import compose
from slope.models import build_model, structure
from slope.training.pruner import PRUNED_MATRIX, check_pruner, sparsity_config

LAYERS = 3


def pruner(*overrides: str) -> Any:
    static = "pruner.pruned_matrix=static-weight"
    return compose([static, *(f"pruner.{override}" for override in overrides)]).pruner


def gpt2() -> Any:
    config = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 8}
    with torch.device("meta"):
        return build_model({"family": "gpt2", "config": config}, 24, 8)


def dense_layers(*overrides: str) -> set[str]:
    model = gpt2()
    config = sparsity_config(pruner(*overrides), model)
    with torch.device("meta"):
        report = slope.sparsify(model, config)
    return {layer.name for layer in report.layers if layer.pattern is None}


ALWAYS = {"lm_head", "transformer.h.0.attn.c_attn"}
PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def block(index: int, *parts: str) -> set[str]:
    return {f"transformer.h.{index}.{part}" for part in parts or PARTS}


def attention() -> set[str]:
    return set().union(*(block(i, "attn.c_attn", "attn.c_proj") for i in range(LAYERS)))


@pytest.mark.parametrize("attn", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_skip_options_alone_and_together(attn: bool, first: bool, last: bool) -> None:
    expected = set(ALWAYS)
    expected |= attention() if attn else set()
    expected |= block(0) if first else set()
    expected |= block(LAYERS - 1) if last else set()
    found = dense_layers(
        f"skip_attention={attn}", f"skip_first_block={first}", f"skip_last_block={last}"
    )
    assert found == expected


def test_settings_reach_the_library() -> None:
    cfg = compose(
        ["pruner=slope", "seed=7", "pruner.pattern=1:4", "pruner.mask=random",
         "pruner.column_mask_interval=100", "pruner.rules=[['*.mlp.*','2:8'],['*.1.*',dense]]"]
    ).pruner  # fmt: skip
    config = sparsity_config(cfg, gpt2())
    assert config == slope.SparsityConfig(
        pattern="1:4",
        mask="random",
        seed=7,
        column_mask_interval=100,
        adapter_rank=16,
        rules=(("*.mlp.*", "2:8"), ("*.1.*", "dense")),
    )


def test_rank_is_used_only_with_adapters() -> None:
    without = sparsity_config(pruner("lora_rank=0"), gpt2())
    assert without is not None
    assert without.adapter_rank == 0
    ratio = sparsity_config(pruner("add_lora=True", "lora_rank=0.25"), gpt2())
    assert ratio is not None
    assert ratio.adapter_rank == 0.25


@pytest.mark.parametrize("name", ["none", "dense", "null", "None"])
def test_dense_baseline_is_the_same_command(name: str) -> None:
    cfg = pruner(f"pruned_matrix={name}", "add_lora=True", "lora_rank=16", "reduction_dim=True")
    assert sparsity_config(cfg, gpt2()) is None


@pytest.mark.parametrize("name", PRUNED_MATRIX)
def test_every_published_name_is_known(name: str) -> None:
    cfg = pruner(f"pruned_matrix={name}")
    if PRUNED_MATRIX[name] in ("dense", "static-weight"):
        assert check_pruner(cfg) == (PRUNED_MATRIX[name] == "static-weight")
    else:
        with pytest.raises(
            ValueError, match=rf"{name} is not implemented in this version; use .*static-weight"
        ):
            check_pruner(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruned_matrix=weights"], r"pruned_matrix='weights' is unknown; choose static-weight"),
        (["reduction_dim=False"], r"reduction_dim=False .*not implemented .*reduction_dim=True"),
        (["unstructured_masking=True"], r"unstructured_masking=True is not implemented"),
        (['sparsity_increment="0,12,-1"'], r"'0,12,-1' is not implemented.*pruner.rules"),
        (["sparsity_increment=12"], r"sparsity_increment=12 is not implemented"),
        (["accelerate=True"], r"accelerate=True is not implemented.*pruner.backend=auto"),
        (["pattern=4:2"], r"4:2"),
        (["pattern=2:3"], r"power of two"),
        (["pattern=abc"], r"not of the form n:m"),
        (["pattern=124"], r"pruner.pattern='?124"),
        (["add_lora=True", "lora_rank=0"], r"lora_rank=0 is no adapter; set pruner.add_lora=False"),
        (["add_lora=True", "lora_rank=1.5"], r"lora_rank=1.5 must be a whole number"),
        (["add_lora=True", "lora_rank=-4"], r"lora_rank=-4 must be a whole number"),
        (["add_lora=True", "lora_start=0"], r"lora_start=0 is outside \(0, 1\]"),
        (["add_lora=True", "lora_start=1.01"], r"lora_start=1.01 is outside \(0, 1\]"),
        (["add_lora=True", "lora_lr=0"], r"lora_lr=0 must be a number above 0"),
        (["rules=[dense]"], r"'dense'; a rule is a pair of texts"),
        (["rules=[[a,b,c]]"], r"\['a', 'b', 'c'\]; a rule is a pair"),
        (["rules=[['*',3:1]]"], r"3:1"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruner(pruner(*overrides))


def test_no_increment_is_no_error() -> None:
    assert check_pruner(pruner("sparsity_increment=-1"))
    assert check_pruner(pruner('sparsity_increment=""'))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mask=biggest"], r"mask='biggest' is unknown"),
        (["backend=cuda"], r"backend='cuda' is unknown"),
        (["rules=[['nowhere.*',dense]]"], r"rule 'nowhere.\*' matches no linear layer"),
        (["add_lora=True", "lora_rank=17"], r"rank 17 does not fit layer '.*choose lora_rank"),
        (["pattern=2:32"], r"divisible"),
    ],
)
def test_library_refuses_the_rest(overrides: list[str], message: str) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        slope.sparsify(model, sparsity_config(pruner(*overrides), model))


def test_outside_projections_of_opt_stay_dense() -> None:
    cfg = compose(["experiment=c4/opt-350m", "pruner=slope", "model.config.num_hidden_layers=1"])
    with torch.device("meta"):
        model = build_model(cfg.model, 50257, 2048)
    config = sparsity_config(cfg.pruner, model)
    assert config is not None
    assert list(config.skip) == structure(model).outside
    assert {name.rpartition(".")[2] for name in config.skip} == {"project_in", "project_out"}
