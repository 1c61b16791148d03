"""The pruner options, alone and together, for every model family, and what is refused."""

from __future__ import annotations

import copy
import inspect
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

import slope
from slope import backends
from slope.configs import compose
from slope.methods import PrunedLinear
from slope.models import build_model, structure
from slope.training import program
from slope.training import pruner as training_pruner
from slope.training.pruner import (
    LORA_SCHEDULES,
    PRUNED_MATRIX,
    apply,
    check_pruner,
    schedule,
    sparsity_config,
)

LAYERS = 3
METHODS = {name: method for name, method in PRUNED_MATRIX.items() if method != "dense"}
WEIGHTLESS = ("static-input", "dynamic-input", "dynamic-output-grad")
_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
          "num_hidden_layers": LAYERS, "max_position_embeddings": 8}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 8},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": LAYERS,
            "num_attention_heads": 2, "max_position_embeddings": 8, "word_embed_proj_dim": 16},
    "llama": _LLAMA | {"num_key_value_heads": 2},
    "mistral": _LLAMA | {"num_key_value_heads": 2},
    "qwen2": _LLAMA | {"num_key_value_heads": 2},
    "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS,
             "num_attention_heads": 2, "max_position_embeddings": 8},
}  # fmt: skip
OUTPUT = {"gpt2": "attn.c_proj", "opt": "self_attn.out_proj", "bert": "attention.output.dense"}


@cache
def _composed() -> Any:
    cfg = compose(["pruner.pruned_matrix=static-weight"])
    return OmegaConf.create({"pruner": OmegaConf.to_container(cfg.pruner, resolve=True)})


def pruner(*overrides: str) -> Any:
    """The section with some overrides; composing anew each time would take seconds in all."""
    cfg = copy.deepcopy(_composed())
    for text in overrides:
        override = OverridesParser.create().parse_override(f"pruner.{text}")
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return cfg.pruner


@cache
def _built(family: str) -> Any:
    with torch.device("meta"):
        return build_model({"family": family, "config": FAMILIES[family]}, 24, 8)


def build(family: str = "gpt2") -> Any:
    """A dense model on the meta device."""
    return copy.deepcopy(_built(family))


def sparsify(model: nn.Module, *overrides: str) -> slope.SparsityReport:
    report = apply(pruner(*overrides), model)
    assert report is not None
    return report


def dense_layers(*overrides: str) -> set[str]:
    report = sparsify(build(), *overrides)
    return {layer.name for layer in report.layers if layer.pattern is None}


ALWAYS = {"lm_head", "transformer.h.0.attn.c_attn"}
PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def block(index: int, *parts: str) -> set[str]:
    return {f"transformer.h.{index}.{part}" for part in parts or PARTS}


def attention() -> set[str]:
    return set().union(*(block(i, "attn.c_attn", "attn.c_proj") for i in range(LAYERS)))


# -- methods ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("matrix", [*METHODS, "unstructured"])
def test_every_name_dimension_and_skip_in_every_family(family: str, matrix: str) -> None:
    """Eight combinations of the skips for each of the two dimensions, on the meta device."""
    method = METHODS.get(matrix, "static-weight")
    chosen = f"pruned_matrix={matrix}" if matrix in METHODS else "unstructured_masking=True"
    parts = structure(build(family))
    always = {parts.head, *parts.first_qkv, *parts.outside} - {None}
    for reduction in (True, False):
        cfg = pruner(chosen, f"reduction_dim={reduction}")
        if not reduction and method in ("fst", "s-ste"):
            with pytest.raises(ValueError, match=rf"reduction_dim=False with .*={method} has no"):
                check_pruner(cfg)
            continue
        compressed = matrix in METHODS and method == "static-weight" and reduction
        for attention, first, last in itertools.product([False, True], repeat=3):
            cfg.skip_attention, cfg.skip_first_block, cfg.skip_last_block = attention, first, last
            model = build(family)
            report = apply(cfg, model)
            assert report is not None
            whole = [parts.blocks[0]] * first + [parts.blocks[-1]] * last
            expected = always | {
                layer.name
                for layer in report.layers
                if layer.name.startswith(tuple(f"{block}." for block in whole))
            }
            expected |= {name for names in parts.attention * attention for name in names}
            assert {layer.name for layer in report.layers if layer.method is None} == expected
            kind = slope.SlopeLinear if compressed else PrunedLinear
            assert all(isinstance(model.get_submodule(one.name), kind) for one in report.sparse)


@pytest.mark.parametrize("name", ["none", "dense", "null", "None"])
def test_dense_baseline_is_the_same_command(name: str) -> None:
    cfg = pruner(f"pruned_matrix={name}", "add_lora=True", "lora_rank=16", "reduction_dim=True")
    assert sparsity_config(cfg, build()) is None
    assert apply(cfg, build()) is None


def test_methods_compute_what_they_are_named_after() -> None:
    """The name reaches the layer: masks of the two products, for each dimension."""
    rows, columns = {}, {}
    for text in ("static-weight", "dynamic-weight"):
        for reduction in (True, False):
            torch.manual_seed(0)
            config = {"family": "gpt2", "config": FAMILIES["gpt2"]}
            model = build_model(config, 24, 8)
            apply(pruner(f"pruned_matrix={text}", f"reduction_dim={reduction}"), model)
            layer: Any = model.get_submodule("transformer.h.1.mlp.c_fc")
            if isinstance(layer, PrunedLinear):
                rows[text, reduction], columns[text, reduction] = layer.masks()
            else:
                rows[text, reduction] = layer.keep_mask()
                columns[text, reduction] = layer.column_keep_mask()
    assert rows["static-weight", True].equal(rows["dynamic-weight", True])
    assert columns["static-weight", True].equal(columns["dynamic-weight", True])
    assert rows["static-weight", False].unflatten(0, (-1, 4)).sum(1).eq(2).all()  # along d_out
    assert columns["static-weight", False].unflatten(1, (-1, 4)).sum(2).le(2).all()
    assert columns["dynamic-weight", False].equal(rows["dynamic-weight", False])


@pytest.mark.parametrize("percent", [60, 12.5])
def test_unstructured_mask_has_that_many_zeros(percent: float) -> None:
    torch.manual_seed(0)
    model = build_model({"family": "gpt2", "config": FAMILIES["gpt2"]}, 24, 8)
    report = apply(
        pruner("unstructured_masking=True", f"unstructured_mask_sparsity={percent}",
               "reduction_dim=False"), model
    )  # fmt: skip
    assert report is not None
    assert {layer.kind for layer in report.sparse} == {f"{percent:g}%"}
    for one in report.sparse:
        dense = model.get_submodule(one.name).to_dense()
        kept = int((100 - percent) * dense.numel() / 100)
        assert int((dense != 0).sum()) == kept


def test_fst_searches_as_often_as_it_is_told() -> None:
    model = build()
    sparsify(model, "pruned_matrix=fst", "mask_interval=7")
    layers = [module for module in model.modules() if isinstance(module, PrunedLinear)]
    assert {layer.method.interval for layer in layers} == {7}


def test_settings_reach_the_library() -> None:
    cfg = compose(
        ["pruner=slope", "seed=7", "pruner.pattern=1:4", "pruner.mask=random",
         "pruner.column_mask_interval=100", "pruner.rules=[['*.mlp.*','2:8'],['*.1.*',dense]]",
         "pruner.mask_rescale=True", "pruner.lora_scale=2", "pruner.lora_init=orthogonal"]
    ).pruner  # fmt: skip
    assert sparsity_config(cfg, build()) == slope.SparsityConfig(
        pattern="1:4",
        mask="random",
        mask_rescale=True,
        seed=7,
        column_mask_interval=100,
        adapter_rank=16,
        adapter_scale=2,
        adapter_init="orthogonal",
        rules=(("*.mlp.*", "2:8"), ("*.1.*", "dense")),
    )


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("slope", slope.SparsityConfig(adapter_rank=16, skip=[])),
        ("extended-sr-ste", slope.SparsityConfig(
            method="dynamic-weight", srste_decay=6e-6, skip=[])),
        ("sr-ste", slope.SparsityConfig(
            method="dynamic-weight", srste_decay=2e-4, prune_backward=False, skip=[])),
        ("fst", slope.SparsityConfig(
            method="fst", srste_decay=6e-5,
            skip=[name for names in structure(build()).attention for name in names])),
        ("s-ste", slope.SparsityConfig(method="s-ste", skip=[])),
    ],
)  # fmt: skip
def test_groups_are_the_methods_they_are_named_after(
    group: str, expected: slope.SparsityConfig
) -> None:
    cfg = compose([f"pruner={group}", "seed=0"]).pruner
    found = sparsity_config(cfg, build())
    assert found is not None
    assert {**vars(found), "skip": list(found.skip)} == {
        **vars(expected),
        "skip": list(expected.skip),
    }


def test_rank_is_used_only_with_adapters() -> None:
    without = sparsity_config(pruner("lora_rank=0"), build())
    assert without is not None
    assert without.adapter_rank == 0
    ratio = sparsity_config(pruner("add_lora=True", "lora_rank=0.25"), build())
    assert ratio is not None
    assert ratio.adapter_rank == 0.25


def test_outside_projections_of_opt_stay_dense() -> None:
    cfg = compose(["experiment=c4/opt-350m", "pruner=slope", "model.config.num_hidden_layers=1"])
    with torch.device("meta"):
        model = build_model(cfg.model, 50257, 2048)
    config = sparsity_config(cfg.pruner, model)
    assert config is not None
    assert list(config.skip) == structure(model).outside
    assert {name.rpartition(".")[2] for name in config.skip} == {"project_in", "project_out"}


# -- sparsity_increment ----------------------------------------------------------------------------


def patterns_of_blocks(report: slope.SparsityReport, blocks: list[str]) -> list[set[str]]:
    return [
        {layer.kind for layer in report.sparse if layer.name.startswith(f"{block}.")}
        for block in blocks
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"0,2,-1"', ["2:8", "2:8", "2:4"]),
        ('"2"', ["2:4", "2:4", "2:8"]),
        ("2", ["2:4", "2:4", "2:8"]),
        ("[1,2]", ["2:4", "2:8", "2:16"]),
        ('"0, 1"', ["2:8", "2:16", "2:16"]),
        ("0", ["2:8"] * 3),
        ('"0,3,-1"', ["2:8"] * 3),
        ('"1,2,-1"', ["2:4", "2:8", "2:4"]),
        ('"2,-1"', ["2:4"] * 3),
        ('""', ["2:4"] * 3),
        ("-1", ["2:4"] * 3),
        ('"-1"', ["2:4"] * 3),
    ],
)
def test_increments_in_every_family(family: str, text: str, expected: list[str]) -> None:
    model = build(family)
    parts = structure(model)
    report = sparsify(model, f"sparsity_increment={text}")
    assert patterns_of_blocks(report, parts.blocks) == [{kind} for kind in expected]
    kinds = {layer.name: layer.kind for layer in report.layers}
    output = OUTPUT.get(family, "self_attn.o_proj")
    assert [kinds[f"{block}.{output}"] for block in parts.blocks] == expected
    assert {kinds[name] for name in parts.first_qkv} == {"dense"}
    inside = tuple(f"{block}." for block in parts.blocks)
    assert all(one.name.startswith(inside) for one in report.sparse)


def test_the_published_increments_of_a_model_with_24_blocks() -> None:
    config = FAMILIES["bert"] | {"num_hidden_layers": 24, "hidden_size": 32}
    with torch.device("meta"):
        large = build_model({"family": "bert", "config": config}, 24, 8)
    for text, expected in {
        "0,12,-1": ["2:8"] * 12 + ["2:4"] * 12,
        "12": ["2:4"] * 12 + ["2:8"] * 12,
        "0,12": ["2:8"] * 12 + ["2:16"] * 12,
        "0": ["2:8"] * 24,
        "12,-1": ["2:4"] * 24,
        "6,12,18": ["2:4"] * 6 + ["2:8"] * 6 + ["2:16"] * 6 + ["2:32"] * 6,
    }.items():
        model = copy.deepcopy(large)
        report = sparsify(model, f'sparsity_increment="{text}"')
        found = patterns_of_blocks(report, structure(model).blocks)
        assert found == [{kind} for kind in expected], text


def test_increments_stand_behind_rules_and_skips() -> None:
    report = sparsify(
        build(), "sparsity_increment=1", "pattern=1:4", "skip_last_block=True",
        "rules=[['*.1.mlp.c_fc','1:2'],['*.0.attn.c_attn','2:4'],['*.1.attn.c_proj',dense]]",
    )  # fmt: skip
    kinds = {layer.name.removeprefix("transformer.h."): layer.kind for layer in report.layers}
    assert kinds["0.attn.c_attn"] == "2:4" and kinds["0.mlp.c_fc"] == "1:4"
    assert kinds["1.mlp.c_fc"] == "1:2" and kinds["1.attn.c_proj"] == "dense"
    assert kinds["1.mlp.c_proj"] == kinds["1.attn.c_attn"] == "1:8"
    assert {kinds[f"2.{part}"] for part in PARTS} == {"dense"}


@pytest.mark.parametrize("text", ["dynamic-weight", "s-ste", "dynamic-input"])
def test_increments_hold_for_other_methods(text: str) -> None:
    model = build()
    report = sparsify(model, f"pruned_matrix={text}", "sparsity_increment=2")
    assert patterns_of_blocks(report, structure(model).blocks) == [{"2:4"}, {"2:4"}, {"2:8"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"2,1"', r"sparsity_increment=2,1 is not ascending; it lists the blocks .* \"0,12,-1\""),
        ('"1,1,-1"', r"sparsity_increment=1,1,-1 is not ascending"),
        ('"a"', r"sparsity_increment=a is not numeric at 'a'; it lists the blocks"),
        ('"0,,2"', r"0,,2 is not numeric at ''"),
        ('"1.5"', r"1.5 is not numeric at '1.5'"),
        ('"0,-1,2"', r"0,-1,2 has a block below 0; only the last entry may be -1"),
        ("-2", r"-2 has a block below 0"),
        ('"0,1,2,3"', r"with pruner.pattern=2:4 doubles m 4 times, to 64, and m can be at most 32"),
    ],
)
def test_increments_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruner(pruner(f"sparsity_increment={text}"))


@pytest.mark.parametrize("text", ["3", '"0,4,-1"', '"4,-1"'])
def test_increments_beyond_the_last_block(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"block \d is beyond the last block; this model has 3 blocks, 0 to 2"
    ):
        sparsity_config(pruner(f"sparsity_increment={text}"), build())


# -- rules -----------------------------------------------------------------------------------------


def test_a_rule_that_cannot_divide_its_layer_names_it() -> None:
    with pytest.raises(
        ValueError,
        match=r"in_features=16 is not divisible by m=32 of pattern 2:32 \(layer "
        r"'transformer.h.0.mlp.c_fc'\); keep it dense with "
        r"pruner.rules=\[\['transformer.h.0.mlp.c_fc', 'dense'\]\] or pad to 32",
    ):
        sparsify(build(), "rules=[['*.c_fc','2:32']]")


# -- the schedule ----------------------------------------------------------------------------------


def test_schedule_of_the_options() -> None:
    made = schedule(pruner("lora_start=0.5", "evolve_interval=10", "evolve_stop=0.5"), 100)
    assert (made.start_step, made.lora_lazy, made.dense_start) == (50, True, None)
    evolution = made.evolution
    assert evolution is not None
    assert (evolution.interval, evolution.fraction, evolution.stop) == (10, 0.3, 0.5)
    assert schedule(pruner("lora_lazy=False"), 100).start_step == 0
    assert schedule(pruner(), 100, adapters=False).lora_start is None
    fst = schedule(compose(["pruner=fst"]).pruner, 100)
    assert fst.dense_start == 0.8333
    dense = schedule(pruner("pruned_matrix=none", "evolve_interval=10", "dense_start=0.5"), 100)
    assert (dense.evolution, dense.dense_start) == (None, None)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruned_matrix=weights"], r"pruned_matrix='weights' is unknown; choose static-weight"),
        (["pattern=4:2"], r"4:2"),
        (["pattern=2:3"], r"power of two"),
        (["pattern=abc"], r"not of the form n:m"),
        (["pattern=124"], r"pruner.pattern='?124"),
        (["mask=biggest"], r"pruner.mask=biggest is unknown; choose one of magnitude, random"),
        (["backend=cuda"], r"pruner.backend=cuda is unknown"),
        (["column_mask_interval=-1"], r"pruner.column_mask_interval=-1 must be a whole number"),
        (["mask=wanda", "calibration_batches=0"], r"calibration_batches=0 must be a whole number"),
        (["add_lora=True", "lora_rank=0"], r"lora_rank=0 is no adapter; set pruner.add_lora=False"),
        (["add_lora=True", "lora_rank=1.5"], r"lora_rank=1.5 must be a whole number"),
        (["add_lora=True", "lora_rank=-4"], r"lora_rank=-4 must be a whole number"),
        (["add_lora=True", "lora_start=0"], r"lora_start=0 is outside \(0, 1\].*lora_lazy=False"),
        (["add_lora=True", "lora_start=1.01"], r"lora_start=1.01 is outside \(0, 1\]"),
        (["add_lora=True", "lora_lr=0"], r"lora_lr=0 must be a number above 0"),
        (["add_lora=True", "lora_scale=0"], r"lora_scale=0 must be a finite number other than 0"),
        (["add_lora=True", "lora_init=zero"], r"pruner.lora_init=zero is unknown; choose one of n"),
        (["add_lora=True", "lora_schedule=step"], r"lora_schedule=step is unknown; .*linear"),
        (["rules=[dense]"], r"'dense'; a rule is a pair of texts"),
        (["rules=[[a,b,c]]"], r"\['a', 'b', 'c'\]; a rule is a pair"),
        (["rules=[['*',3:1]]"], r"3:1"),
        (["unstructured_masking=True", "unstructured_mask_sparsity=100"],
         r"pruner.unstructured_mask_sparsity=100 is outside \[1, 100\)"),
        (["pruned_matrix=dynamic-weight", "srste_decay=-1"], r"pruner.srste_decay=-1.0 must be"),
        (["evolve_interval=-3"], r"pruner.evolve_interval=-3"),
        (["evolve_interval=3", "evolve_fraction=1.5"], r"pruner.evolve_fraction=1.5"),
        (["evolve_interval=3", "evolve_stop=0"], r"pruner.evolve_stop=0"),
        (["pruned_matrix=fst", "mask_interval=0"], r"mask_interval=0 must be a whole number of at"),
        (["pruned_matrix=fst", "dense_start=1.5"], r"dense_start=1.5 is outside \(0, 1\]"),
    ],
)  # fmt: skip
def test_values_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruner(pruner(*overrides))


UNSTRUCTURED = "unstructured_masking=True"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([UNSTRUCTURED, "pruned_matrix=dynamic-input"],
         r"pruner.unstructured_masking=True with pruner.pruned_matrix=dynamic-input has no meaning"
         r".*choose pruner.pruned_matrix=static-weight or pruner.unstructured_masking=False"),
        ([UNSTRUCTURED, "mask=random"],
         r"pruner.unstructured_masking=True with pruner.mask=random .*choose pruner.mask=magnitude"
         r" or pruner.unstructured_masking=False"),
        ([UNSTRUCTURED, "prune_backward=False"],
         r"unstructured_masking=True with pruner.prune_backward=False .*choose pruner.prune_backw"),
        ([UNSTRUCTURED, "rules=[['*','2:8']]"], r"unstructured_masking=True with the rule .*'2:8'"),
        ([UNSTRUCTURED, "sparsity_increment=1"],
         r"sparsity_increment=1 with pruner.unstructured_masking=True .*choose pruner.spars"),
        ([UNSTRUCTURED, "evolve_interval=10"],
         r"evolve_interval=10 with pruner.unstructured_masking=True .*choose pruner.evolve_int"),
        (["reduction_dim=False", "evolve_interval=10"],
         r"evolve_interval=10 with pruner.reduction_dim=False .*choose pruner.evolve_interval=0"),
        (["pruned_matrix=s-ste", "evolve_interval=10"],
         r"evolve_interval=10 with pruner.pruned_matrix=s-ste .*choose pruner.evolve_interval=0"),
        (["mask=transposable", "evolve_interval=10"],
         r"evolve_interval=10 with pruner.mask=transposable .*choose .*pruner.mask=magnitude"),
        (["mask=transposable", "sparsity_increment=1"],
         r"sparsity_increment=1 with pruner.mask=transposable: it needs 2:8"),
        (["pruned_matrix=fst", "sparsity_increment=1"],
         r"sparsity_increment=1 with pruner.pruned_matrix=fst: it needs 2:8"),
        (["mask=transposable", "pattern=2:8"], r"pruner.mask=transposable with pattern 2:8"),
        (["mask=random", "pruned_matrix=dynamic-weight"],
         r"pruner.mask=random with pruner.pruned_matrix=dynamic-weight .*choose pruner.mask=magn"),
        (["mask=wanda", "reduction_dim=False"],
         r"pruner.mask=wanda with pruner.reduction_dim=False .*choose pruner.reduction_dim=True"),
        (["mask_rescale=True"],
         r"pruner.mask_rescale=True with pruner.mask=magnitude .*choose pruner.mask=random"),
        (["srste_decay=6e-6"],
         r"pruner.srste_decay=6e-06 with pruner.pruned_matrix=static-weight .*srste_decay=0"),
        (["mvue=False"], r"pruner.mvue=False with pruner.pruned_matrix=static-weight .*matrix=fst"),
        (["pruned_matrix=s-ste", "prune_backward=False"],
         r"pruner.prune_backward=False with pruner.pruned_matrix=s-ste .*choose pruner.prune_back"),
        (["pruned_matrix=dynamic-weight", "reduction_dim=False", "prune_backward=False"],
         r"pruner.prune_backward=False with pruner.pruned_matrix=dynamic-weight and "
         r"pruner.reduction_dim=False says it twice"),
        (["mask_interval=10"],
         r"pruner.mask_interval=10 with pruner.pruned_matrix=static-weight has no meaning: it "
         r"searches no transposable masks; choose pruner.mask_interval=40, or .*matrix=fst"),
        (["pruned_matrix=dynamic-weight", "dense_start=0.8"],
         r"pruner.dense_start=0.8 with pruner.pruned_matrix=dynamic-weight .*dense_start=null, or"),
        (["pruned_matrix=fst", "column_mask_interval=100"],
         r"pruner.column_mask_interval=100 with pruner.pruned_matrix=fst .*mask_interval=1, or"),
        (["prune_backward=False", "column_mask_interval=100"],
         r"column_mask_interval=100 with pruner.prune_backward=False has no meaning"),
    ],
)  # fmt: skip
def test_combinations_without_a_meaning_name_both(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruner(pruner(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rules=[['nowhere.*',dense]]"], r"rule 'nowhere.\*' matches no linear layer"),
        (["add_lora=True", "lora_rank=17"], r"lora_rank=17 does not fit .*pruner.lora_rank=16"),
        (["pattern=2:32"], r"divisible"),
    ],
)
def test_library_refuses_the_rest(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(build(), *overrides)


def test_options_of_what_is_off_are_not_read() -> None:
    assert check_pruner(
        pruner("lora_rank=0", "lora_start=7", "lora_schedule=no", "evolve_fraction=9",
               "unstructured_mask_sparsity=400", "calibration_batches=0")
    )  # fmt: skip
    assert check_pruner(pruner("add_lora=True", "lora_lazy=False", "lora_start=7"))
    for name in LORA_SCHEDULES:
        assert check_pruner(pruner("add_lora=True", f"lora_schedule={name}"))


# -- accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (["pruned_matrix=dynamic-weight"], "cuda",
         r"pruner.accelerate=True with pruner.pruned_matrix=dynamic-weight: .*static weights.*; "
         r"choose pruner.accelerate=False, or pruner.pruned_matrix=static-weight"),
        (["reduction_dim=False"], "cuda", r"with pruner.reduction_dim=False: .*reduction_dim=True"),
        ([UNSTRUCTURED], "cuda", r"with pruner.unstructured_masking=True: .*masking=False"),
        (["prune_backward=False"], "cuda", r"with pruner.prune_backward=False: the input gradi"),
        (["backend=dense"], "cuda", r"with pruner.backend=dense: .*or pruner.backend=auto"),
        (["pattern=1:4"], "cuda", r"with pruner.pattern=1:4: .*2:4 alone, not 1:4; .*attern=2:4"),
        (["rules=[['*.mlp.*','2:8']]"], "cuda",
         r"with the rule \[\*.mlp.\*,2:8\] in pruner.rules: .*or 2:4 or dense in that rule"),
        (["sparsity_increment=2"], "cuda", r"with pruner.sparsity_increment=2: .*not 2:8; choose"),
        ([], "cpu", r"with trainer.accelerator=cpu: .*'cpu' has no sparse tensor cores; .*GPU"),
        ([], "cuda", r"with pruner.backend=auto: torch .* finds no GPU; "
         r"choose pruner.accelerate=False, which takes the fastest backend there is"),
        ([], None, r"with pruner.backend=auto: torch .* finds no GPU"),
    ],
)  # fmt: skip
def test_accelerate_where_no_kernel_can_serve(
    overrides: list[str], device: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruner(pruner("accelerate=True", *overrides), device)


def test_accelerate_with_kernels_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not_sparse_kernels", lambda pattern, device_type: None)
    assert check_pruner(pruner("accelerate=True"), "cuda")
    assert check_pruner(pruner("accelerate=True", "mask=transposable", "prune_backward=False"))
    assert not check_pruner(pruner("accelerate=True", "pruned_matrix=none"), "cpu")


def test_every_key_of_the_section_is_read_and_documented() -> None:
    """A key that nobody reads would be ignored; some are read by the program itself."""
    documented = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    text = inspect.getsource(training_pruner) + inspect.getsource(program)
    for key in training_pruner.defaults():
        assert f'"{key}"' in text or f"pruner.{key})" in text, key
        assert f"`{key}`" in documented or f"pruner.{key}`" in documented, key
