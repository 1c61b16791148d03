"""A tokenizer, a small sparse model with active adapters, and folders that hold it."""

from __future__ import annotations

import pytest
import torch

import slope
from slope.data.tokenizer import EOS, LoadedTokenizer, train_bpe
from slope.export import save_dense

TEXT = "the history of the city and the river is the music of a king and a war\n" * 40
CONTEXT = 32


@pytest.fixture(scope="session")
def tokenizer():
    backend = train_bpe([TEXT], 280)
    return LoadedTokenizer(backend, EOS, {"bos_token": EOS}).to_transformers(CONTEXT)


@pytest.fixture(scope="session")
def model(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "vocab_size": 288}
    made = GPT2LMHeadModel(GPT2Config(**sizes, **end, initializer_range=0.3))
    slope.sparsify(made, slope.SparsityConfig(adapter_rank=3))
    slope.activate_adapters(made)
    with torch.no_grad():
        for parameter in slope.adapter_parameters(made):
            parameter.normal_(std=0.3)
    return made.eval()


@pytest.fixture
def here(tmp_path, monkeypatch, model, tokenizer):
    """A folder to be in, with ``sparse/`` and the same model dense with zeros in ``dense/``."""
    monkeypatch.delenv("SLOPE_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    slope.save_pretrained(model, "sparse", tokenizer)
    save_dense(model, "dense", tokenizer, fold_adapters=True)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path
