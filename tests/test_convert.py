"""sparsify and densify: which layers, why not the others, and clear errors before any change."""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import oracle
import slope
from slope.layers import pruned_layers


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        gate = torch.sigmoid(self.q_proj(self.k_proj(x)))
        return x + self.mlp(self.o_proj(self.v_proj(x) * gate))


class TinyModel(nn.Module):
    """Embedding, two blocks, a head that may be tied to the embedding."""

    def __init__(self, tied=True, width=16, vocabulary=24):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


TOKENS = torch.arange(12).view(2, 6)


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    config = dict(vocab_size=48, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **options})).eval()


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers if layer.pattern is None}


def sparse_names(model):
    return [name for name, _ in slope.sparse_layers(model)]


def untouched(model):
    kinds = slope.SlopeLinear, slope.PrunedLinear
    return not any(isinstance(module, kinds) for module in model.modules())


# ---------------------------------------------------------------- what is converted


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_first_projections_stay_dense_and_the_report_says_why(tied):
    model = TinyModel(tied)
    report = slope.sparsify(model)
    why = reasons(report)
    assert set(why) == {"lm_head", *(f"layers.0.{p}_proj" for p in "qkv")}
    assert ("tied to embedding.weight" if tied else "head") in why["lm_head"]
    assert "first" in why["layers.0.q_proj"]
    assert len(sparse_names(model)) == 3 + 6
    if tied:
        assert model.lm_head.weight is model.embedding.weight
    text = str(report)
    assert "sparsified 9 of 13 linear layers (2:4)" in text
    for layer in report.layers:
        assert layer.name in text
        assert (layer.reason or "") in text


def test_values_are_the_largest_weights_and_the_rest_of_the_model_is_the_same():
    model = TinyModel()
    dense = copy.deepcopy(model)
    slope.sparsify(model, slope.SparsityConfig(pattern="1:4"))
    for name, layer in slope.sparse_layers(model):
        weight = dense.get_submodule(name).weight.detach()
        assert torch.equal(layer.to_dense(), weight * oracle.row_keep(weight, 1, 4))
        assert torch.equal(layer.bias, dense.get_submodule(name).bias)
    assert torch.equal(model.layers[0].q_proj.weight, dense.layers[0].q_proj.weight)
    assert torch.equal(model.embedding.weight, dense.embedding.weight)


def test_gpt2_conv1d_layers_are_converted_transposed():
    model = gpt2()
    dense = copy.deepcopy(model)
    report = slope.sparsify(model)
    assert len(sparse_names(model)) == 7
    why = reasons(report)
    assert set(why) == {"transformer.h.0.attn.c_attn", "lm_head"}
    assert "tied" in why["lm_head"]
    layer = model.transformer.h[1].mlp.c_fc
    weight = dense.transformer.h[1].mlp.c_fc.weight.detach().T
    assert (layer.in_features, layer.out_features) == (32, 128)
    assert torch.equal(layer.to_dense(), weight * oracle.row_keep(weight, 2, 4))
    for name, layer in slope.sparse_layers(model):  # the dense model, masked by hand
        dense.get_submodule(name).weight.data.copy_(layer.to_dense().T)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits)


def test_gpt2_trains_like_its_masked_twin():
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double().train()
    masked = copy.deepcopy(model)
    slope.sparsify(model, slope.SparsityConfig(column_mask_interval=1))
    for name, layer in slope.sparse_layers(model):
        naive = oracle.DenseMaskedLinear(layer.to_dense(), layer.bias, 2, 4, layer.keep_mask())
        masked.set_submodule(name, naive)
    losses = []
    for twin in (model, masked):
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            for module in twin.modules():
                if isinstance(module, oracle.DenseMaskedLinear):
                    module.refresh()
            loss = twin(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_llama_block_0_qkv_and_head_stay_dense():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    report = slope.sparsify(model)
    dense = {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"} | {"lm_head"}
    assert set(reasons(report)) == dense
    assert len(sparse_names(model)) == 14 - 3
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_random_mask_depends_on_seed_and_layer_only():
    def masks(seed, noise):
        torch.manual_seed(noise)
        model = TinyModel()
        state = torch.get_rng_state()
        slope.sparsify(model, slope.SparsityConfig(mask="random", seed=seed))
        assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
        return [layer.keep_mask() for _, layer in slope.sparse_layers(model)]

    first, again, other = masks(0, 1), masks(0, 2), masks(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]), "the seed must matter"
    assert not torch.equal(first[3], first[4]), "two layers of one shape must differ"


def test_shared_modules_stay_shared_and_dense():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.GELU(), shared, nn.Linear(16, 16))
    report = slope.sparsify(model)
    assert model[0] is model[2] is shared
    assert "tied" in reasons(report)["0"]
    assert sparse_names(model) == ["3"]


def test_frozen_layers_stay_frozen_and_modes_are_kept():
    model = TinyModel().eval()
    model.layers[1].requires_grad_(False)
    slope.sparsify(model)
    assert not model.layers[1].o_proj.values.requires_grad
    assert not model.layers[1].o_proj.bias.requires_grad
    assert model.layers[0].o_proj.values.requires_grad
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    model = TinyModel().to(dtype)
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(TOKENS).dtype == dtype


def test_meta_model_is_converted_by_shape_alone():
    with torch.device("meta"):
        model = TinyModel()
    report = slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
    assert len(sparse_names(model)) == 9
    assert all(t.is_meta for t in model.state_dict().values())
    other = TinyModel()
    assert (
        report.parameters_stored
        == slope.sparsify(other, slope.SparsityConfig(adapter_rank=2)).parameters_stored
    )


# ---------------------------------------------------------------- skip, rules, report


def test_skip_names_layers_or_their_parents():
    model = TinyModel()
    report = slope.sparsify(model, slope.SparsityConfig(skip=("layers.0", "*.mlp.2")))
    assert sparse_names(model) == [
        *(f"layers.1.{p}_proj" for p in "qkvo"), "layers.1.mlp.0",
    ]  # fmt: skip
    assert "layers.0" in reasons(report)["layers.0.o_proj"]
    assert "*.mlp.2" in reasons(report)["layers.1.mlp.2"]


def test_first_matching_rule_wins_and_may_sparsify_what_is_dense_by_default():
    model = TinyModel(tied=False)
    rules = (("*.mlp.0", "dense"), ("*.mlp", "2:8"), ("layers.0.q_proj", "1:2"))
    slope.sparsify(model, slope.SparsityConfig(rules=rules))
    patterns = {name: str(layer.pattern) for name, layer in slope.sparse_layers(model)}
    assert "layers.0.mlp.0" not in patterns
    assert patterns["layers.0.mlp.2"] == patterns["layers.1.mlp.2"] == "2:8"
    assert patterns["layers.0.q_proj"] == "1:2"
    assert "layers.0.k_proj" not in patterns
    assert patterns["layers.1.o_proj"] == "2:4"


def test_report_counts_parameters_and_bytes():
    model = TinyModel()
    before = sum(p.numel() for p in model.parameters())
    report = slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
    assert report.parameters_dense == before
    assert report.parameters_stored == sum(p.numel() for p in model.parameters())
    layers = [layer for _, layer in slope.sparse_layers(model)]
    assert report.weight_bytes_dense_equivalent == sum(
        layer.in_features * layer.out_features * 4 for layer in layers
    )
    assert report.weight_bytes_sparse_layers == sum(
        t.numel() * t.element_size()
        for layer in layers
        for t in (layer.values, layer.metadata, layer.column_mask)
    )
    for entry in report.layers:
        density = 1 if entry.pattern is None else entry.pattern.density
        assert entry.numel_dense == entry.in_features * entry.out_features
        assert entry.numel_stored == entry.numel_dense * density


def test_report_of_an_already_sparse_model_has_the_same_numbers():
    model = TinyModel()
    first, later = slope.sparsify(model), slope.sparsity_report(model)
    assert later.parameters_dense == first.parameters_dense
    assert later.parameters_stored == first.parameters_stored
    assert later.weight_bytes_sparse_layers == first.weight_bytes_sparse_layers
    assert [x.name for x in later.layers] == [x.name for x in first.layers]


def test_sparse_weight_costs_its_share_of_bytes():
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).bfloat16()
    report = slope.sparsify(model)
    # Values 1/2 of two bytes, metadata 1/8 byte, column mask 1/16 byte per dense element.
    share = report.weight_bytes_sparse_layers / report.weight_bytes_dense_equivalent
    assert share == pytest.approx((1 + 0.125 + 0.0625) / 2)


# ---------------------------------------------------------------- errors, before any change


@pytest.mark.parametrize("option", [{"skip": ("*.mpl.*",)}, {"rules": (("*.mpl.*", "2:8"),)}])
def test_name_pattern_that_matches_nothing_is_refused_and_shows_names(option):
    model = TinyModel()
    with pytest.raises(ValueError, match=r"\*\.mpl\.\*.*matches no.*layers\.\d"):
        slope.sparsify(model, slope.SparsityConfig(**option))
    assert untouched(model)


def test_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="matched no layers"):
        slope.sparsify(nn.Sequential(nn.Conv2d(3, 3, 3)))


def test_skipping_everything_is_refused_and_lists_what_was_found():
    with pytest.raises(ValueError, match="matched no layers.*Linear x13"):
        slope.sparsify(TinyModel(), slope.SparsityConfig(skip=("*",)))


@pytest.mark.parametrize(
    ("shape", "what"), [((18, 16), "in_features=18"), ((16, 18), "out_features=18")]
)
def test_size_that_the_pattern_does_not_divide_names_layer_and_fix(shape, what):
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(*shape)))
    with pytest.raises(ValueError, match=rf"{what}.*m=4.*1\.0.*skip.*20"):
        slope.sparsify(model)
    assert untouched(model)


@pytest.mark.parametrize("pattern", ["4:2", "2:3", "abc"])
def test_senseless_pattern_is_refused_when_the_config_is_made(pattern):
    with pytest.raises(ValueError, match=pattern):
        slope.SparsityConfig(pattern=pattern)
    with pytest.raises(ValueError, match=pattern):
        slope.SparsityConfig(rules=(("*", pattern),))


def test_other_bad_settings_are_refused():
    with pytest.raises(ValueError, match="mask='big'.*magnitude, random"):
        slope.SparsityConfig(mask="big")
    with pytest.raises(ValueError, match=r"skip='lm_head'.*\['lm_head'\]"):
        slope.SparsityConfig(skip="lm_head")
    with pytest.raises(ValueError, match="rule"):
        slope.SparsityConfig(rules=(("*", "2:4", "dense"),))
    with pytest.raises(ValueError, match="method='sparse'.*static-weight, .*dynamic-output-grad"):
        slope.SparsityConfig(method="sparse")
    with pytest.raises(ValueError, match="adapter_init='zeros'.*normal, kaiming, orthogonal"):
        slope.SparsityConfig(adapter_init="zeros")
    for percent in (0, 100, -3, float("nan")):
        with pytest.raises(ValueError, match=r"unstructured_sparsity=.*outside \(0, 100\).*60"):
            slope.SparsityConfig(unstructured_sparsity=percent)
    for decay in (-1e-4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="srste_decay=.*at least 0"):
            slope.SparsityConfig(method="dynamic-weight", srste_decay=decay)


UNSTRUCTURED = {"unstructured_sparsity": 60}
SENSELESS = [
    (UNSTRUCTURED | {"method": "dynamic-input"},
     "unstructured_sparsity=60 with method='dynamic-input'.*method='static-weight' or "),
    (UNSTRUCTURED | {"mask": "random"},
     "unstructured_sparsity=60 with mask='random'.*mask='magnitude' or "),
    (UNSTRUCTURED | {"prune_backward": False},
     "unstructured_sparsity=60 with prune_backward=False.*prune_backward=True or "),
    (UNSTRUCTURED | {"rules": (("*.mlp", "2:8"),)},
     r"unstructured_sparsity=60 with the rule \('\*\.mlp', '2:8'\).*'dense' in the rule or "),
    ({"mask": "random", "method": "dynamic-weight"},
     "mask='random' with method='dynamic-weight'.*mask='magnitude' or method='static-weight'"),
    ({"mask": "transposable", "pattern": "4:8"},
     "mask='transposable' with pattern 4:8.*2:4 or mask='magnitude'"),
    ({"mask": "transposable", "rules": (("*", "2:8"),)},
     "mask='transposable' with pattern 2:8.*2:4 or mask='magnitude'"),
    ({"mask": "transposable", "reduction_dim": False},
     "mask='transposable' with reduction_dim=False.*alike; choose reduction_dim=True or "),
    ({"mask": "wanda", "reduction_dim": False},
     "mask='wanda' with reduction_dim=False.*choose reduction_dim=True or mask='magnitude'"),
    ({"mask_rescale": True},
     "mask_rescale=True with mask='magnitude'.*mask='random' or mask_rescale=False"),
    ({"srste_decay": 2e-4},
     "srste_decay=0.0002 with method='static-weight'.*srste_decay=0, or .*'dynamic-weight'"),
    ({"srste_decay": 2e-4, "method": "s-ste"}, "srste_decay=0.0002 with method='s-ste'"),
    ({"mvue": False}, "mvue=False with method='static-weight'.*mvue=True or choose method='fst'"),
    ({"method": "fst", "pattern": "2:8"}, "method='fst' with pattern 2:8.*2:4 or method="),
    ({"method": "fst", "reduction_dim": False}, "reduction_dim=False with method='fst'.*=True"),
    ({"method": "s-ste", "reduction_dim": False}, "reduction_dim=False with method='s-ste'"),
    ({"method": "static-input", "prune_backward": False},
     "prune_backward=False with method='static-input'.*prune_backward=True, or "),
    ({"method": "dynamic-weight", "prune_backward": False, "reduction_dim": False},
     "prune_backward=False with method='dynamic-weight' and reduction_dim=False.*one of the two"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), SENSELESS, ids=[str(o) for o, _ in SENSELESS])
def test_options_that_have_no_meaning_together_name_both_and_what_to_choose(options, message):
    with pytest.raises(ValueError, match=message):
        slope.SparsityConfig(**options)


def test_calibration_batches_are_for_wanda_and_wanda_needs_them():
    model, batches = TinyModel(), [{"tokens": TOKENS}]
    with pytest.raises(ValueError, match="mask='wanda' needs batches.*calibration=batches"):
        slope.sparsify(model, slope.SparsityConfig(mask="wanda"))
    with pytest.raises(ValueError, match="calibration with mask='magnitude'.*mask='wanda'"):
        slope.sparsify(model, calibration=batches)
    with torch.device("meta"):
        empty = TinyModel()
    with pytest.raises(ValueError, match="mask='wanda'.*meta device.*mask='magnitude'"):
        slope.sparsify(empty, slope.SparsityConfig(mask="wanda"), batches)
    assert untouched(model)
    assert untouched(empty)


def test_sparsifying_twice_is_refused():
    model = TinyModel()
    slope.sparsify(model)
    with pytest.raises(ValueError, match="sparse already.*densify"):
        slope.sparsify(model)


def test_bare_linear_layer_is_refused_because_it_cannot_be_replaced_in_place():
    layer = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"SlopeLinear\.from_linear"):
        slope.sparsify(layer)


def test_weight_with_nan_is_refused_before_any_change():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        slope.sparsify(model)
    assert untouched(model)


# ---------------------------------------------------------------- subclasses, computed weights


class MyLinear(nn.Linear):
    pass


def pruned(name):
    return lambda layer: prune.random_unstructured(layer, name, 0.5)


def weight_norm_of_old(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


# How a layer is made, and what the report says of it.
RESISTING = {
    "subclass": (lambda layer: MyLinear(16, 16), r"MyLinear is a subclass of nn\.Linear; SlopeL"),
    "old weight_norm": (
        weight_norm_of_old,
        r"computed by weight_norm; call torch\.nn\.utils\.remove_weight_norm\(layer\) first",
    ),
    "old spectral_norm": (
        nn.utils.spectral_norm, r"computed by spectral_norm; call .*remove_spectral_norm\(layer\)",
    ),
    "prune": (pruned("weight"), r"computed by prune; call .*prune\.remove\(layer, 'weight'\)"),
    "weight_norm": (
        nn.utils.parametrizations.weight_norm, r"weight is computed by a parametrization; call ",
    ),
    "spectral_norm": (
        nn.utils.parametrizations.spectral_norm, r"remove_parametrizations\(layer, 'weight'\)",
    ),
    "parametrized bias": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh()),
        r"its bias is computed by a parametrization",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "why"), RESISTING.values(), ids=RESISTING)
def test_subclasses_and_computed_weights_stay_dense_and_the_report_says_why(make, why):
    model = nn.Sequential(nn.Linear(16, 16), make(nn.Linear(16, 16)))
    state = copy.deepcopy(model[1].state_dict())
    resisting, outputs = model[1], model[1].eval()(torch.ones(2, 16))
    model.train()
    report = slope.sparsify(model)
    assert model[1] is resisting
    assert sparse_names(model) == ["0"]
    assert re.search(why, reasons(report)["1"])
    assert re.search(why, reasons(slope.sparsity_report(model))["1"])
    entry = report.layers[1]
    assert (entry.numel_dense, entry.bytes_stored) == (256, 1024)
    assert all(torch.equal(model[1].state_dict()[name], state[name]) for name in state)
    assert torch.equal(model[1].eval()(torch.ones(2, 16)), outputs)


@pytest.mark.parametrize(("make", "why"), RESISTING.values(), ids=RESISTING)
def test_a_model_of_nothing_else_is_refused_with_the_next_step(make, why):
    model = nn.Sequential(make(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=f"matched no layers.*Linear x1.*because: 0: .*{why}"):
        slope.sparsify(model)
    with pytest.raises(
        ValueError, match=f"rule '0' matches no layer that can be sparse: 0: .*{why}"
    ):
        slope.sparsify(model, slope.SparsityConfig(rules=[("0", "2:4")]))


def test_a_parametrized_conv1d_is_reported_too():
    model = gpt2()
    layer = model.transformer.h[1].mlp.c_fc
    nn.utils.parametrizations.weight_norm(layer)
    report = slope.sparsify(model)
    entry = next(entry for entry in report.layers if entry.name == "transformer.h.1.mlp.c_fc")
    assert "parametrization" in entry.reason
    assert (entry.in_features, entry.out_features) == (32, 128)


def test_a_subclass_may_be_skipped_by_name():
    model = nn.Sequential(nn.Linear(16, 16), MyLinear(16, 16))
    report = slope.sparsify(model, slope.SparsityConfig(skip=["1"]))
    assert reasons(report) == {"1": "skip='1'"}


def test_what_attention_reads_itself_is_neither_converted_nor_listed():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    report = slope.sparsify(model)
    assert [layer.name for layer in report.layers] == ["linear1", "linear2"]


def test_a_model_without_linear_layers_is_told_what_can_be_converted():
    with pytest.raises(ValueError, match=r"found: none\. It converts nn\.Linear and .*Conv1D"):
        slope.sparsify(nn.Sequential(nn.Conv2d(3, 3, 3)))


@pytest.mark.parametrize("options", [{}, {"method": "dynamic-weight"}])
def test_a_bias_that_is_no_parameter_is_refused_before_any_change(options):
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), pruned("bias")(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=r"layer '2' has a bias that is no Par.*skip=\['2'\]"):
        slope.sparsify(model, slope.SparsityConfig(**options))
    assert untouched(model)
    prune.remove(model[2], "bias")
    bias = model[2].bias.detach().clone()
    slope.sparsify(model, slope.SparsityConfig(**options))
    assert torch.equal(model[2].bias, bias)


# ---------------------------------------------------------------- heads


class Classifier(nn.Module):
    def __init__(self, **heads):
        super().__init__()
        self.body = nn.Linear(16, 16)
        for name, head in heads.items():
            setattr(self, name, head)


@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs", "seq_relationship", "head"])
def test_heads_of_other_tasks_stay_dense(name):
    report = slope.sparsify(Classifier(**{name: nn.Linear(16, 3)}))
    assert reasons(report) == {name: "output head"}


@pytest.mark.parametrize("name", ["classifier", "classification_head"])
def test_of_a_head_of_several_layers_the_last_one_stays_dense(name):
    head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    report = slope.sparsify(Classifier(**{name: head}))
    assert reasons(report) == {f"{name}.2": "output head"}


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("BertForSequenceClassification", {"classifier"}),
        ("BertForQuestionAnswering", {"qa_outputs"}),
        ("BertForPreTraining", {"cls.predictions.decoder", "cls.seq_relationship"}),
        ("RobertaForSequenceClassification", {"classifier.out_proj"}),
    ],
)
def test_heads_of_transformers_stay_dense(kind, heads):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = getattr(transformers, kind).config_class(vocab_size=48, **sizes)
    report = slope.sparsify(getattr(transformers, kind)(config))
    dense = {name for name, why in reasons(report).items() if "first linear" not in why}
    assert dense == heads


# ---------------------------------------------------------------- hooks


def hooked(layer, seen):
    """One hook of each kind on ``layer``; what they see goes into ``seen``."""
    return [
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        layer.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True),
        layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]


ALL_HOOKS = ["pre", "forward", "backward pre", "backward"]


def fired(model, seen):
    seen.clear()
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    return list(seen)


def back_to_dense(model):
    slope.densify(model)


@pytest.mark.parametrize(
    "options", [{}, {"method": "dynamic-weight"}, {"unstructured_sparsity": 50}]
)
def test_hooks_of_a_dense_layer_go_over_to_the_sparse_one_and_back(options):
    model, seen = nn.Sequential(nn.Linear(16, 16)), []
    handles = hooked(model[0], seen)
    slope.sparsify(model, slope.SparsityConfig(**options))
    assert fired(model, seen) == ALL_HOOKS
    handles.pop(0).remove()
    slope.densify(model)
    assert fired(model, seen) == ALL_HOOKS[1:]
    for handle in handles:
        handle.remove()
    assert fired(model, seen) == []


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, back_to_dense),
        ({"method": "dynamic-weight"}, back_to_dense),
        ({"method": "dynamic-weight"}, slope.compress_weights),
        ({"method": "dynamic-input"}, slope.compress_weights),
    ],
)
def test_hooks_of_a_sparse_layer_go_over_to_what_takes_its_place(options, change):
    model, seen = nn.Sequential(nn.Linear(16, 16)), []
    slope.sparsify(model, slope.SparsityConfig(**options))
    before, handles = model[0], hooked(model[0], seen)
    change(model)
    assert model[0] is not before
    assert fired(model, seen) == ALL_HOOKS
    for handle in handles:
        handle.remove()
    assert fired(model, seen) == []


# ---------------------------------------------------------------- back to dense, and state


@pytest.mark.parametrize("make", [TinyModel, gpt2], ids=["linear", "conv1d"])
def test_densify_gives_the_old_classes_and_equal_outputs(make):
    model = make().eval()
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    slope.sparsify(model)

    def logits():
        y = model(TOKENS)
        return y if torch.is_tensor(y) else y.logits

    before = logits()
    assert slope.densify(model) is model
    assert untouched(model)
    torch.testing.assert_close(logits(), before)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names


def test_densify_and_sparsify_again_find_the_same_mask():
    model = TinyModel()
    slope.sparsify(model)
    state = copy.deepcopy(model.state_dict())
    slope.densify(model)
    slope.sparsify(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_densify_refuses_to_lose_an_active_adapter_and_folds_it_on_request():
    model = TinyModel()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
    slope.activate_adapters(model)
    for _, layer in slope.sparse_layers(model):
        nn.init.normal_(layer.adapter.up, std=0.1)
    before = model(TOKENS)
    with pytest.raises(ValueError, match="active adapter.*fold_adapters=True"):
        slope.densify(model)
    slope.densify(model, fold_adapters=True)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-5)


def test_densify_of_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="dense already"):
        slope.densify(TinyModel())


def test_model_state_goes_through_a_file_into_a_model_with_other_masks():
    model = TinyModel()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(77)
    other = TinyModel()
    slope.sparsify(other, slope.SparsityConfig(adapter_rank=2, mask="random", seed=3))
    other(TOKENS).sum().backward()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_deepcopy_of_a_model_is_independent():
    model = TinyModel()
    slope.sparsify(model)
    before = model(TOKENS).detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), before)
    assert twin.lm_head.weight is twin.embedding.weight
    for parameter in twin.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(model(TOKENS), before)


# ---------------------------------------------------------------- the other methods


METHODS = {
    "dynamic-weight": {"method": "dynamic-weight"},
    "static along d_out": {"reduction_dim": False},
    "unstructured": {"unstructured_sparsity": 50},
    "static-input": {"method": "static-input"},
    "dynamic-output-grad": {"method": "dynamic-output-grad"},
    "fst": {"method": "fst"},
    "s-ste": {"method": "s-ste"},
}
every_method = pytest.mark.parametrize("options", list(METHODS.values()), ids=list(METHODS))


@every_method
def test_the_same_layers_are_converted_whatever_the_method(options):
    model, sparse = TinyModel(), TinyModel()
    slope.sparsify(sparse)
    slope.sparsify(model, slope.SparsityConfig(**options))
    assert [name for name, _ in pruned_layers(model)] == sparse_names(sparse)
    assert not sparse_names(model)
    with pytest.raises(ValueError, match="sparse already.*densify"):
        slope.sparsify(model)


def test_report_of_a_dense_method_counts_every_weight_and_its_masks():
    model = TinyModel()
    before = sum(p.numel() for p in model.parameters())
    report = slope.sparsify(model, slope.SparsityConfig(reduction_dim=False, adapter_rank=2))
    assert len(report.sparse) == 9
    assert report.parameters_dense == before
    assert report.parameters_stored == sum(p.numel() for p in model.parameters())
    numel = sum(layer.weight.numel() for _, layer in pruned_layers(model))
    assert report.weight_bytes_dense_equivalent == 4 * numel
    assert report.weight_bytes_sparse_layers == 5 * numel  # and one byte of mask each
    assert all(layer.numel_stored == layer.numel_dense for layer in report.layers)
    assert "9 of 13 linear layers (2:4, static-weight along d_out), " in report.summary()
    assert "2:4      static-weight along d_out, adapter rank 2" in str(report)
    assert slope.sparsity_report(model).sparse == report.sparse


def test_report_of_an_unstructured_mask_shows_its_share():
    report = slope.sparsify(TinyModel(), slope.SparsityConfig(unstructured_sparsity=62.5))
    assert {layer.kind for layer in report.sparse} == {"62.5%"}
    assert all(layer.pattern is None for layer in report.sparse)
    assert "9 of 13 linear layers (62.5%, static-weight, unstructured), " in report.summary()
    assert "62.5%    static-weight, unstructured" in str(report)
    assert {layer.kind for layer in report.layers if layer.method is None} == {"dense"}


def test_unstructured_masks_need_no_divisible_size():
    model = nn.Sequential(nn.Linear(17, 19))
    slope.sparsify(model, slope.SparsityConfig(unstructured_sparsity=50))
    assert model[0].keep_mask.sum() == 17 * 19 // 2


@every_method
def test_densify_gives_back_the_forwards_weight(options):
    model = TinyModel().eval()
    classes = [type(module) for module in model.modules()]
    slope.sparsify(model, slope.SparsityConfig(**options))
    weights = {name: layer.to_dense() for name, layer in pruned_layers(model)}
    before = model(TOKENS)
    assert slope.densify(model) is model
    assert untouched(model)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(model(TOKENS), before)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@every_method
def test_compress_weights_ships_what_is_row_pruned_and_leaves_the_rest_dense(options):
    model = TinyModel().eval()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=2, **options))
    slope.activate_adapters(model)
    pruned = dict(pruned_layers(model))
    for layer in pruned.values():
        nn.init.normal_(layer.adapter.up, std=0.1)
    before = model(TOKENS)
    row_pruned = options.get("method") in ("dynamic-weight", "fst", "s-ste")
    if not row_pruned:
        with pytest.raises(ValueError, match=r"active adapter.*compress_weights\(model, fold"):
            slope.compress_weights(model)
        assert dict(pruned_layers(model)) == pruned, "nothing has been changed"
    assert slope.compress_weights(model, fold_adapters=True) is model
    assert not list(pruned_layers(model))
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-5)
    compressed = dict(slope.sparse_layers(model))
    assert set(compressed) == (set(pruned) if row_pruned else set())
    for name, layer in compressed.items():
        assert torch.equal(layer.to_dense(), pruned[name].to_dense())
        assert torch.equal(layer.keep_mask(), pruned[name].masks()[0])
        assert layer.adapter is pruned[name].adapter
        assert layer.bias is pruned[name].bias
        assert not layer.training


def test_compress_weights_leaves_a_dense_phase_dense_and_frozen_weights_frozen():
    model = TinyModel().requires_grad_(False)
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight"))
    layer = model.layers[1].o_proj
    layer.dense = True
    weight = layer.weight.detach().clone()
    slope.compress_weights(model)
    assert type(model.layers[1].o_proj) is nn.Linear
    assert torch.equal(model.layers[1].o_proj.weight, weight)
    assert not model.layers[1].k_proj.values.requires_grad
    with pytest.raises(ValueError, match="no PrunedLinear.*compressed already"):
        slope.compress_weights(model)


def test_compress_weights_of_shapes_alone():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8))
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight"))
    slope.compress_weights(model)
    assert model[0].values.is_meta


def test_a_method_converts_conv1d_and_rules_give_patterns():
    model = gpt2()
    rules = (("*.mlp", "2:8"), ("*.attn", "dense"))
    report = slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight", rules=rules))
    assert {str(layer.pattern) for _, layer in pruned_layers(model)} == {"2:8"}
    assert len(report.sparse) == 4
    before = model(TOKENS).logits
    slope.compress_weights(model)
    assert {layer.origin for _, layer in slope.sparse_layers(model)} == {"Conv1D"}
    torch.testing.assert_close(model(TOKENS).logits, before)


def test_wanda_mask_is_the_row_mask_of_weight_times_feature_norm():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    x = torch.randn(2, 5, 16) * torch.arange(1, 17)
    features = [x.flatten(0, 1), torch.tanh(model[0](x)).detach().flatten(0, 1)]
    batches = [{"input": part} for part in x.split(1)]
    report = slope.sparsify(model, slope.SparsityConfig(mask="wanda"), batches)
    assert len(report.sparse) == 2
    for layer, weight, inputs in zip((model[0], model[2]), weights, features, strict=True):
        keep = oracle.row_keep(weight * inputs.double().norm(dim=0), 2, 4)
        assert torch.equal(layer.keep_mask(), keep)
        assert torch.equal(layer.to_dense(), weight * keep)
    assert not torch.equal(model[0].keep_mask(), oracle.row_keep(weights[0], 2, 4))


def test_a_lazy_layer_is_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))
    with pytest.raises(ValueError, match="layer '1' is lazy .* call the model on an example first"):
        slope.sparsify(model)
    assert type(model[0]) is nn.Linear
    model(torch.randn(2, 16))
    assert len(slope.sparsify(model).sparse) == 2


def test_s_ste_is_compressed_where_magnitudes_tie():
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1.0, 1.0, 0.5]).repeat(16, 4))
        model[0].weight[3] = 0
        model[0].weight[4] = torch.tensor([3.0, 1.0, 1.0, 0.5]).repeat(4)
    slope.sparsify(model, slope.SparsityConfig(method="s-ste"))
    x = torch.randn(3, 16, requires_grad=True)
    y = model(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    slope.compress_weights(model)
    assert isinstance(model[0], slope.SlopeLinear) and not model[0].prune_backward
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], gradient)


def test_compression_keeps_an_exact_backward_exact():
    model = nn.Sequential(nn.Linear(16, 16))
    slope.sparsify(model, slope.SparsityConfig(method="dynamic-weight", prune_backward=False))
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    slope.compress_weights(model)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], gradient)
