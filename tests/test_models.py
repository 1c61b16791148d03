"""Models of every family: built without a download, their parts found, misfits refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import slope
from slope.models import (
    FAMILIES,
    attend_causally,
    attention_names,
    block_names,
    build_model,
    structure,
    tied_weights,
)

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "word_embed_proj_dim": 16, "do_layer_norm_before": False,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "bert": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16,
    },
}  # fmt: skip


def tiny(family: str, vocab_size: int = 50, max_length: int = 16, **config: Any) -> Any:
    return build_model(
        {"family": family, "config": {**TINY[family], **config}}, vocab_size, max_length
    )


def test_every_family_is_tried() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("family", TINY)
def test_family_trains_one_step(family: str) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    tokens = torch.randint(0, 50, (2, 16))
    more = {"next_sentence_label": torch.tensor([0, 1])} if family == "bert" else {}
    loss = model(input_ids=tokens, labels=tokens, **more).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", TINY)
def test_parts_have_the_names_that_structure_says(family: str) -> None:
    model = tiny(family)
    parts = structure(model)
    modules = dict(model.named_modules())
    assert len(parts.blocks) == 2
    assert block_names(model) == parts.blocks
    fused = family == "gpt2"
    for block, names in zip(parts.blocks, parts.attention, strict=True):
        assert len(names) == (2 if fused else 4)
        assert all(name.startswith(f"{block}.") and name in modules for name in names)
    assert attention_names(model) == [name for names in parts.attention for name in names]
    assert parts.first_qkv == parts.attention[0][:-1]
    assert parts.head is not None
    assert modules[parts.head] is model.get_output_embeddings()
    assert len(parts.outside) == {"opt": 2, "bert": 3}.get(family, 0)


@pytest.mark.parametrize("family", TINY)
def test_structure_is_the_same_after_sparsify(family: str) -> None:
    model = tiny(family)
    before = structure(model)
    slope.sparsify(model, slope.SparsityConfig(skip=tuple(before.outside)))
    assert structure(model) == before


def test_structure_without_head_or_of_a_stranger() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(**TINY["bert"], vocab_size=48)
    with torch.device("meta"):
        parts = structure(BertModel(config))
    assert (parts.head, parts.blocks[0]) == (None, "encoder.layer.0")
    assert parts.outside == ["pooler.dense"]
    assert structure(tiny("bert")).outside == [
        "bert.pooler.dense", "cls.predictions.transform.dense", "cls.seq_relationship"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"parts of Linear .*not known; known types: gpt2"):
        structure(nn.Linear(2, 2))


def test_tied_weights_are_found() -> None:
    assert ("transformer.wte.weight", "lm_head.weight") in tied_weights(tiny("gpt2"))
    assert tied_weights(tiny("llama", tie_word_embeddings=False)) == []


@pytest.mark.parametrize(
    ("data", "given", "expected"), [(257, None, 264), (56, None, 56), (50, 99, 99), (99, 99, 99)]
)
def test_vocabulary_is_rounded_up_or_as_given(data: int, given: int | None, expected: int) -> None:
    cfg = {"family": "gpt2", "config": {**TINY["gpt2"], "vocab_size": given}}
    assert build_model(cfg, data, 16).config.vocab_size == expected


def test_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        assert {p.device.type for p in tiny("gpt2").parameters()} == {"meta"}


def test_config_of_the_run_is_taken_and_left_alone() -> None:
    cfg = OmegaConf.create({"family": "gpt2", "config": {**TINY["gpt2"], "vocab_size": None}})
    OmegaConf.set_readonly(cfg, True)
    model: Any = build_model(cfg, 50, 16, eos_token_id=3)
    assert (model.config.vocab_size, model.config.eos_token_id) == (56, 3)


def test_no_embedding_is_frozen_as_padding() -> None:
    assert tiny("opt").model.decoder.embed_tokens.padding_idx is None


def test_same_seed_same_weights() -> None:
    torch.manual_seed(5)
    first = tiny("gpt2").state_dict()
    torch.manual_seed(5)
    second = tiny("gpt2").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("cfg", "vocab_size", "max_length", "message"),
    [
        ({"family": "gpt5"}, 50, 16, r"model.family='gpt5' is unknown; choose one of gpt2, opt"),
        (
            {"family": "gpt2", "attn_implementation": "fast"}, 50, 16,
            r"attn_implementation='fast' is unknown; choose one of sdpa",
        ),
        (
            {"family": "gpt2", "config": {"n_layers": 3}}, 50, 16,
            r"config.n_layers is no argument of GPT2Config; did you mean model.config.n_layer\?",
        ),
        (
            {"family": "gpt2", "config": {**TINY["gpt2"], "vocab_size": 40}}, 50, 16,
            r"tokenizer has 50 tokens and model.config.vocab_size=40; .* at least 50",
        ),
        (
            {"family": "gpt2", "config": TINY["gpt2"]}, 50, 17,
            r"max_length=17 is longer than the 16 positions .*model.config.n_positions=17",
        ),
        (
            {"family": "gpt2", "config": {**TINY["gpt2"], "n_head": 5}}, 50, 16,
            r"width 32 is not divisible by its 5 attention heads",
        ),
        (
            {"family": "llama", "config": {**_LLAMA, "num_key_value_heads": 3}}, 50, 16,
            r"4 attention heads cannot share 3 key/value heads",
        ),
    ],
)  # fmt: skip
def test_misfit_is_named(
    cfg: dict[str, Any], vocab_size: int, max_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(cfg, vocab_size, max_length)


@pytest.mark.parametrize("family", TINY)
def test_a_size_below_one_is_named_as_it_was_typed(family: str) -> None:
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    for key, value in ((layers, 0), (layers, -1), ("num_attention_heads", 0), ("hidden_size", -8)):
        message = rf"{key}={value} must be at least 1; the default is model.config.{key}=\d+"
        with pytest.raises(ValueError, match=message):
            tiny(family, **{key: value})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_without_a_mask_is_the_same_causal_attention(family: str) -> None:
    model = tiny(family).eval()
    tokens = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        attend_causally(model)
        actual = model(input_ids=tokens).logits
    assert model.config._attn_implementation == "sdpa_without_mask"
    torch.testing.assert_close(actual, expected)


def test_attention_that_needs_a_mask_keeps_it() -> None:
    models: list[Any] = [tiny("bert"), tiny("mistral", sliding_window=4), nn.Linear(4, 4)]
    for model in models:
        attend_causally(model)
    assert [model.config._attn_implementation for model in models[:2]] == ["sdpa", "sdpa"]
