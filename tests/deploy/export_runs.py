"""``slope export`` as it is typed, and checkpoints of others."""

from __future__ import annotations

import copy

import torch

from slope import cli

LAYER = "transformer.h.1.mlp.c_fc"
IDS = torch.arange(12).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def error_of(capsys, *arguments, code=1):
    capsys.readouterr()
    assert export(*arguments) == code
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    return line


class Configuration:
    """Stands for the configuration objects that their files pickle."""

    def __init__(self):
        self.content = {"n_head": 4}


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        import subprocess

        return subprocess.check_output, (["touch", "exploded"],)


THEIRS = {
    "wte": "embeddings.word_embeddings", "wpe": "embeddings.position_embeddings",
    "attn.c_attn": "mixer.Wqkv", "attn.c_proj": "mixer.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2", "ln_1": "norm1", "ln_2": "norm2", "h": "layers",
}  # fmt: skip


def published(model, rank=3):
    """Their file for a dense GPT-2 with 2:4 zeros, and the same model with the adapters folded."""
    state, folded = {}, copy.deepcopy(model)
    for name, tensor in model.state_dict().items():
        for ours, theirs in THEIRS.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        linear = name.endswith((".Wqkv.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight"))
        state[f"model.{name}"] = tensor.t().contiguous() if linear else tensor.clone()
    for block in (0, 1):
        module = folded.transformer.h[block].mlp.c_fc
        left, right = torch.randn(32, rank), torch.randn(rank, 128)
        prefix = f"model.transformer.layers.{block}.mlp.fc1"
        state[f"{prefix}.lora_left"], state[f"{prefix}.lora_right"] = left, right
        with torch.no_grad():
            module.weight += left @ right / rank
    state["train_metrics.count"] = torch.tensor(3)
    content = {"state_dict": state, "global_step": 7, "hyper_parameters": Configuration()}
    return content, folded
