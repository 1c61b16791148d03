"""Active adapters as a LoRA of `peft`: A = down (R, I), B = up (O, R), lora_alpha / r = scale.

``write_lora`` writes what ``PeftModel.from_pretrained`` loads, ``read_lora`` reads it back bit for
bit. Since not every scale is such a quotient to the last bit, a file of our own holds them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope.adapters import Adapter
from slope.export.card import write_card
from slope.export.load import reason
from slope.layers import adapter_layers, is_linear
from slope.linear import AdaptedLinear, dense_weight

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SCALES = "slope_scales.json"


def active_adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers with an active adapter, by name."""
    return {
        name: layer
        for name, layer in adapter_layers(model)
        if layer.adapter and layer.adapter.active
    }


def write_lora(
    folder: Path, model: nn.Module, layers: Mapping[str, AdaptedLinear], base: str | None
) -> None:
    """Write adapters.

    Args:
        folder: where; it is made if need be.
        model: whose they are.
        layers: those with an active adapter, by name.
        base: name or folder of the dense model that they belong to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, ranks, alphas, scales = {}, {}, {}, {}
    for name, layer in layers.items():
        adapter = layer.adapter
        assert adapter is not None
        for key, parameter in zip(_keys(name), (adapter.down, adapter.up), strict=True):
            tensor = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[key] = tensor
        ranks[name], scales[name] = adapter.rank, adapter.scale
        alphas[name] = adapter.scale * adapter.rank
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
    for name, content in ((ADAPTER_CONFIG, config), (_SCALES, scales)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_card(folder, model, "peft", "Adapters of a sparse model, as a LoRA.")


def lora_beside(directory: Path) -> Path | None:
    """The folder of the adapters of a dense export; None if it has none.

    One that has lost a file counts, so that :func:`read_lora` says which.
    """
    folder = directory / ADAPTER_FOLDER
    there = any((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return folder if there else None


def read_lora(folder: Path, model: nn.Module) -> dict[str, Adapter]:
    """Active adapters by the name of their layer, as :func:`write_lora` wrote them.

    Args:
        folder: with the configuration and the tensors.
        model: dense; each adapter has to fit a linear layer of it and gets the dtype of its weight.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if one is damaged, or an adapter is not whole or does not fit.
    """
    config, tensors, scales = _read_config(folder), _read_tensors(folder), _read_scales(folder)
    try:
        adapters = {
            name: _adapter(name, model, config, tensors) for name in config["target_modules"]
        }
        for name, adapter in adapters.items():
            # Who edits lora_alpha wants another scale.
            if math.isclose(exact := scales.get(name, math.nan), adapter.scale, rel_tol=1e-12):
                adapter.scale = exact
        read = {key for name in adapters for key in _keys(name)}
        if foreign := sorted(tensors.keys() - read):
            raise ValueError(f"tensor {foreign[0]!r} is of no layer in its {ADAPTER_CONFIG}")
    except ValueError as error:
        raise ValueError(
            f"the adapters in '{folder}' cannot be used ({error}); export the model again, or "
            "take that folder away to go on without them."
        ) from error
    return adapters


def _keys(name: str) -> tuple[str, str]:
    """Names of the tensors down and up of a layer."""
    down, up = (f"base_model.model.{name}.lora_{leaf}.weight" for leaf in "AB")
    return down, up


def _read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder / ADAPTER_CONFIG)
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError("it describes no LORA")
        if config.get("use_rslora"):
            raise ValueError("use_rslora is a scale that adapters do not have")
        kinds: dict[str, Any] = {"target_modules": list, "rank_pattern": dict}
        kinds |= {"alpha_pattern": dict, "r": int, "lora_alpha": (int, float)}
        for key, kind in kinds.items():
            if not isinstance(config.get(key), kind):
                raise ValueError(f"{key!r} is {str(config.get(key))[:40]}")
        if not all(isinstance(name, str) for name in config["target_modules"]):
            raise ValueError("'target_modules' holds what is no name")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be used ({reason(error)}); export it again.") from error
    return config


def _read_scales(folder: Path) -> dict[str, float]:
    """The scale of each layer to the last bit; empty if another tool wrote the folder."""
    path = folder / _SCALES
    if not path.is_file():
        return {}
    try:
        scales: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(scales, dict) or not all(isinstance(s, float) for s in scales.values()):
            raise ValueError("it is no object of numbers")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be used ({reason(error)}); export it again.") from error
    return scales


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _existing(folder / ADAPTER_WEIGHTS)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is truncated or no safetensors file ({error}); copy or export it again."
        ) from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing; the folder is incomplete, copy it again.")
    return path


def _adapter(
    name: Any, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Adapter:
    """The adapter of one layer.

    Raises:
        ValueError: if it is not whole or does not fit.
    """
    linear = dict(model.named_modules()).get(name)
    if linear is None or not is_linear(linear):
        raise ValueError(f"the model has no linear layer {name!r}")
    weight = dense_weight(linear)
    rank = config["rank_pattern"].get(name, config["r"])
    alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"layer {name!r} has rank {rank!r} and lora_alpha {alpha!r}")
    (rows, columns), found = weight.shape, []
    for key, shape in zip(_keys(name), ((rank, columns), (rows, rank)), strict=True):
        tensor = tensors.get(key)
        if tensor is None:
            raise ValueError(f"tensor {key!r} is missing")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"tensor {key!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, and rank {rank} "
                f"of a layer of {rows} x {columns} needs floats of shape {shape}"
            )
        found.append(nn.Parameter(tensor.to(weight)))
    adapter = Adapter(columns, rows, rank, alpha / rank, device="meta")
    adapter.down, adapter.up = found
    adapter.active = True
    return adapter
