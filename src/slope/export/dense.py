"""Formats that other people's code loads: dense with zeros for `transformers`, adapters for `peft`.

The dense folder is what ``AutoModelForCausalLM.from_pretrained`` reads, zeros included. A PEFT
folder holds the adapters as LoRA: A = down (R, I), B = up (O, R), and lora_alpha / r = scale.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope.convert import densify
from slope.export.card import write_card
from slope.export.folder import new_folder
from slope.export.save import SHARD_BYTES, unwrap, write_tokenizer
from slope.layers import adapted_layers, adapter_layers, deactivate_adapters
from slope.linear import AdaptedLinear

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_dense(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    fold_adapters: bool = False,
    force: bool = False,
) -> Path:
    """Write a model of `transformers` as its own library does, sparse layers dense with zeros.

    Args:
        model: sparse or dense; it is not changed.
        directory: the folder to make.
        tokenizer: saved beside it if given.
        fold_adapters: add active adapters into the weights, which are then no longer sparse. Else
            they are written into the folder `adapter`, as by :func:`save_peft`.
        force: replace an earlier export of that name; any other content is never touched.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is none of `transformers`.
        FileExistsError: if the folder holds something already.
        OSError: if it cannot be written, for instance on a full disk.
    """
    model = unwrap(model)
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers, so only slope.save_pretrained "
            "(--format slope) can write it."
        )
    # A copy of the modules around the same tensors.
    tensors = (*model.parameters(), *model.buffers())
    dense: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    active = _active(model)
    beside = bool(active) and not fold_adapters
    if beside:
        deactivate_adapters(dense)
    if any(True for _ in adapted_layers(dense)):
        densify(dense, fold_adapters=True)
    with new_folder(directory, force) as draft:
        dense.save_pretrained(draft, max_shard_size=SHARD_BYTES)
        write_tokenizer(draft, tokenizer)
        where = f"; adapters in `{ADAPTER_FOLDER}`, for peft" if beside else ""
        folded = ", adapters added into the weights" if active and fold_adapters else ""
        write_card(draft, model, "hf", f"Dense weights with their zeros{folded}{where}.")
        if beside:
            _write_adapters(draft / ADAPTER_FOLDER, model, active, None)
    return Path(directory).resolve()


def save_peft(
    model: nn.Module, directory: str | Path, *, base: str | None = None, force: bool = False
) -> Path:
    """Write the active adapters as a LoRA that ``PeftModel.from_pretrained`` loads.

    Args:
        model: with active adapters.
        directory: the folder to make.
        base: name or folder of the dense model that they belong to, written down for
            ``AutoPeftModel``.
        force: replace an earlier export of that name; any other content is never touched.

    Returns:
        The folder.

    Raises:
        ValueError: if no adapter is active.
        FileExistsError: if the folder holds something already.
        OSError: if it cannot be written, for instance on a full disk.
    """
    model = unwrap(model)
    active = _active(model)
    if not active:
        sleeping = sum(1 for _ in adapter_layers(model))
        raise ValueError(
            f"the model has no active adapter ({sleeping} dormant), so there is nothing for peft; "
            "write the model with --format slope or --format hf."
        )
    with new_folder(directory, force) as draft:
        _write_adapters(draft, model, active, base)
    return Path(directory).resolve()


def _active(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {
        name: layer
        for name, layer in adapter_layers(model)
        if layer.adapter and layer.adapter.active
    }


def _write_adapters(
    folder: Path, model: nn.Module, layers: dict[str, AdaptedLinear], base: str | None
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        adapter = layer.adapter
        assert adapter is not None
        for leaf, parameter in (("lora_A", adapter.down), ("lora_B", adapter.up)):
            tensor = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.{leaf}.weight"] = tensor
        ranks[name], alphas[name] = adapter.rank, adapter.scale * adapter.rank
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": list(layers),
        "fan_in_fan_out": all(layer.origin == "Conv1D" for layer in layers.values()),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    folder.mkdir(exist_ok=True)
    try:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_card(folder, model, "peft", "Adapters of a sparse model, as a LoRA.")
