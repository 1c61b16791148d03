"""Checkpoints of the authors' published GPT-2 code: Lightning files with fp32 weights and zeros.

Such a file holds no masks: they are derived from the zeros and checked. It pickles its
configuration beside the tensors; each class that is named there is replaced by an empty one of
ours, under ``weights_only=True``, so nothing of the file is imported or run.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope.adapters import Adapter
from slope.deploy.prune import prune_by_zeros
from slope.export.load import parameters_on_meta, reason
from slope.layers import sparse_layers
from slope.training import checkpoint as checkpoints

_PREFIX = "model."
_SHARDED = "model_states.pt"  # large models: a folder with the weights in this file
_HEADS = {768: 12, 1024: 16, 1280: 20, 2560: 32}  # published sizes: width -> heads
# their name -> transformers' name
_NAMES = (
    (r"transformer\.embeddings\.word_embeddings\.", "transformer.wte."),
    (r"transformer\.embeddings\.position_embeddings\.", "transformer.wpe."),
    (r"transformer\.layers\.(\d+)\.mixer\.Wqkv\.", r"transformer.h.\1.attn.c_attn."),
    (r"transformer\.layers\.(\d+)\.mixer\.out_proj\.", r"transformer.h.\1.attn.c_proj."),
    (r"transformer\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.h.\1.mlp.c_fc."),
    (r"transformer\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.h.\1.mlp.c_proj."),
    (r"transformer\.layers\.(\d+)\.norm([12])\.", r"transformer.h.\1.ln_\2."),
    (r"transformer\.ln_f\.", "transformer.ln_f."),
    (r"lm_head\.", "lm_head."),
)


class _Ignored:
    """Stands for whatever class a checkpoint names beside its tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def is_published(path: Path) -> bool:
    """Whether this is a checkpoint that our own runs did not write."""
    if path.is_dir():
        return (path / _SHARDED).is_file()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - checkpoints.FOOTER_BYTES))
        return not file.read().startswith(checkpoints.MAGICS)


def load(path: Path, heads: int | None = None) -> Any:
    """A sparse GPT-2 of `transformers` from a published checkpoint, adapters active.

    Args:
        path: the file, or the folder that large models are saved as.
        heads: attention heads; None takes the number published for this width.

    Raises:
        ValueError: if the file is damaged or no GPT-2 of theirs, a layer is neither dense nor 2:4,
            or an adapter does not fit its layer.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    state, adapters = _translate(path, _read(path / _SHARDED if path.is_dir() else path))
    rows, width = _shape(path, state, "transformer.wte.weight")
    if heads is None and width not in _HEADS:
        raise ValueError(
            f"'{path}' is {width} wide and does not hold its number of attention heads; type "
            "--heads <the model's n_head>."
        )
    heads = _HEADS[width] if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(
            f"'{path}' is {width} wide, so heads={heads} does not divide it; type --heads <the "
            "model's n_head>."
        )
    blocks = {int(number) for number in re.findall(r"\.h\.(\d+)\.", " ".join(state))}
    config = GPT2Config(
        vocab_size=rows,
        n_positions=_shape(path, state, "transformer.wpe.weight")[0],
        n_embd=width,
        n_layer=1 + max(blocks, default=0),
        n_head=heads,
        n_inner=_shape(path, state, "transformer.h.0.mlp.c_fc.weight")[1],
        scale_attn_by_inverse_layer_idx=True,  # in all published configurations
        bos_token_id=None,
        eos_token_id=None,
    )
    with parameters_on_meta():
        model: Any = GPT2LMHeadModel(config)
    _check(path, state, model)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    try:
        prune_by_zeros(model, "2:4")
        _attach(model, adapters)
    except ValueError as error:
        raise ValueError(
            f"'{path}': {error} The published code writes layers that are 2:4 or dense, and their "
            "adapters; is the file damaged, or of another method?"
        ) from error
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint; everything else in it stays unread."""
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    names: list[str] = []
    try:
        names = get_unsafe_globals_in_checkpoint(path)
        ignored: Any = [(_Ignored, name) for name in names]
        with safe_globals(ignored):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' holds what cannot be read without running its code "
            f"({', '.join(names[:3]) or reason(error)}); nothing of it was run. Do not trust it."
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ValueError(
            f"'{path}' is damaged or no checkpoint ({reason(error)}); copy it again."
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(content, dict) and "slope" in content:
        checkpoints.load(path)  # one of ours without its end: says so
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    ):
        raise ValueError(
            f"'{path}' is no checkpoint of Lightning: it has no 'state_dict' of named tensors."
        )
    return state


def _translate(path: Path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and adapters under the names of transformers' GPT-2."""
    weights, adapters, unknown = {}, {}, []
    for name, tensor in state.items():
        if not name.startswith(_PREFIX):
            continue  # metrics
        short, count = name.removeprefix(_PREFIX), 0
        for theirs, ours in _NAMES:
            short, count = re.subn(f"^{theirs}", ours, short)
            if count:
                break
        if not count:
            unknown.append(name)
        elif short.endswith((".lora_left", ".lora_right")):
            adapters[short] = tensor
        else:
            # GPT-2 of transformers stores these weights transposed.
            linear = re.search(r"\.c_(attn|proj|fc)\.weight$", short)
            weights[short] = tensor.t().contiguous() if linear else tensor
    if unknown or "transformer.wte.weight" not in weights:
        found = ", ".join(unknown[:3]) or ", ".join(list(state)[:3]) or "no tensor"
        raise ValueError(
            f"'{path}' is no GPT-2 of the published code (gpt2s, gpt2m, gpt2l): it holds {found}."
        )
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    return weights, adapters


def _shape(path: Path, state: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name not in state or state[name].dim() != 2:
        raise ValueError(f"'{path}' is incomplete: it has no matrix {name}.")
    rows, columns = state[name].shape
    return rows, columns


def _check(path: Path, state: dict[str, Tensor], model: Any) -> None:
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"'{path}' does not fit a GPT-2: {name} is {there.get(name, 'absent')} in it and "
                f"should be {here.get(name, 'absent')}."
            )


def _attach(model: Any, adapters: dict[str, Tensor]) -> None:
    """Their output is x·left·right / rank: down is left transposed, up is right transposed."""
    layers = dict(sparse_layers(model))
    names = sorted({name.rpartition(".")[0] for name in adapters})
    for name in names:
        left, right = (adapters.get(f"{name}.lora_{side}") for side in ("left", "right"))
        layer = layers.get(name)
        fits = (
            layer is not None
            and left is not None
            and right is not None
            and left.dim() == 2
            and left.shape[0] == layer.in_features
            and right.shape == (left.shape[1], layer.out_features)
        )
        if not fits or layer is None or left is None or right is None:
            shapes = [None if t is None else tuple(t.shape) for t in (left, right)]
            raise ValueError(
                f"the adapter of {name} has shapes lora_left {shapes[0]} and lora_right "
                f"{shapes[1]}, which do not fit a sparse layer there."
            )
        layer.add_adapter(left.shape[1])
        adapter = layer.adapter
        assert isinstance(adapter, Adapter)
        with torch.no_grad():
            adapter.down.copy_(left.t())
            adapter.up.copy_(right.t())
        adapter.active = True
