"""A tokenizer, tiny models of several families, and the checkpoint of a run that was never run."""

from __future__ import annotations

import pytest
import torch

import slope
from slope import configs
from slope.data.tokenizer import EOS, LoadedTokenizer, plain_tokenizer, train_bpe
from slope.models import build_model
from slope.training import checkpoint, pruner, signature

TEXT = "the history of the city and the river is the music of a king and a war " * 40
CONTEXT = 32


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.delenv("SLOPE_TRACEBACK", raising=False)


@pytest.fixture(scope="session")
def tokenizer():
    backend = train_bpe([TEXT], 280)
    return LoadedTokenizer(backend, EOS, {"bos_token": EOS}).to_transformers(CONTEXT)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A sparse tiny model with active adapters, in eval mode."""

    def make(family="gpt2", **options):
        import transformers as hf

        torch.manual_seed(0)
        sizes = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": CONTEXT}
        end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        if family == "gpt2":
            config = hf.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=288, n_positions=CONTEXT, **end
            )
            model = hf.GPT2LMHeadModel(config)
        elif family == "llama":
            wide = {"intermediate_size": 64, "num_key_value_heads": 2}
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **wide, **end))
        else:
            model = hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=64))
        if options.pop("dense", False):
            return model.eval()
        slope.sparsify(model, slope.SparsityConfig(**{"adapter_rank": 3, **options}))
        wake(model)
        return model.eval()

    return make


def wake(model):
    slope.activate_adapters(model)
    with torch.no_grad():
        for parameter in slope.adapter_parameters(model):
            parameter.normal_(std=0.3)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make_run(here, tokenizer):
    """Writes checkpoints/<name>/last.ckpt as a run would; the model that it holds comes back."""

    def make(name="mine", *overrides, with_tokenizer=True, family=None):
        cfg = configs.compose(["experiment=smoke", "trainer.max_steps=20", *overrides])
        if family is not None:
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
            sizes |= {"max_position_embeddings": CONTEXT, "vocab_size": None}
            cfg.model = {"family": family, "attn_implementation": "sdpa", "config": sizes}
        entries = len(tokenizer)
        model = build_model(cfg.model, entries, 32, eos_token_id=tokenizer.eos_token_id)
        pruner.apply(cfg.pruner, model)
        wake(model)
        known = signature.config_signature(cfg) | signature.model_signature(model, entries)
        known["trainer.max_steps"] = 20
        content = {
            "slope": {
                "signature": known,
                "tokenizer": plain_tokenizer(tokenizer) if with_tokenizer else None,
            },
            "state_dict": {f"model.{name}": t for name, t in model.state_dict().items()},
            "global_step": 20,
        }
        checkpoint.save(content, here / "checkpoints" / name / "last.ckpt")
        return model.eval()

    return make
