"""Write a sparse model to a folder, all of it or nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope.export.card import write_card
from slope.export.folder import new_folder
from slope.export.layout import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    SLOPE_FILE,
    describe,
    encode,
    join,
)
from slope.layers import pruned_layers, sparse_layers
from slope.linear import SlopeLinear

SHARD_BYTES = 5 * 10**9


def save_pretrained(
    model: nn.Module, directory: str | Path, tokenizer: Any = None, *, force: bool = False
) -> Path:
    """Write a sparse model as compressed safetensors; :func:`load_pretrained` reads it back.

    The folder is written under a temporary name and renamed when it is complete, so a crash or a
    full disk never leaves half an export under its name.

    Args:
        model: a model with :class:`slope.SlopeLinear` layers; the wrappers of DDP, DataParallel,
            averaging (``AveragedModel``) and `torch.compile` are looked through.
        directory: the folder to make.
        tokenizer: saved beside it if given (of `transformers` or `tokenizers`).
        force: replace an earlier export of that name; any other content is never touched.

    Returns:
        The folder.

    Raises:
        ValueError: if the model has no sparse layer or one that is not compressed yet, shares one
            or a parameter of one, has no weights, averages masks, or holds state that is no tensor.
        FileExistsError: if the folder holds something already.
        OSError: if it cannot be written, for instance on a full disk.
    """
    model = unwrap(model)
    tensors, description = _collect(model)
    with new_folder(directory, force) as draft:
        _write(draft, model, tensors, description, tokenizer)
    return Path(directory).resolve()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, AveragedModel and `torch.compile`."""
    inner: Any = model
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    if isinstance(model, (*parallel, torch.optim.swa_utils.AveragedModel)):
        if getattr(model, "use_buffers", False):
            raise ValueError(
                "AveragedModel(use_buffers=True) has averaged the masks, which are no numbers; "
                "leave use_buffers away."
            )
        inner = model.module
    elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
        inner = model._orig_mod
    return inner if inner is model else unwrap(inner)


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the file and the content of `slope.json`."""
    from slope import __version__

    layers = dict(sparse_layers(model))
    pruned = next(pruned_layers(model), None)
    if pruned is not None:
        name, method = pruned[0], pruned[1].method.name
        raise ValueError(
            f"layer {name!r} is a PrunedLinear (method {method}), which stores its weight dense; "
            "call slope.compress_weights(model) before saving."
        )
    if not layers:
        raise ValueError(
            "the model has no SlopeLinear, so there is nothing to compress; save a dense model "
            "with its own save_pretrained() or torch.save(model.state_dict(), …)."
        )
    _check_not_shared(model)
    empty = next((name for name, layer in layers.items() if layer.values.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"layer {empty!r} is on the meta device and has no weights to save; load or initialise "
            "them first."
        )
    entries = {name: describe(layer) for name, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for leaf, tensor in encode(layer, entries[name]).items():
            tensors[join(name, leaf)] = tensor
    inside = {join(name, key) for name, layer in layers.items() for key in layer.state_dict()}
    dense, tied = _dense_tensors(model, inside)
    buffers = _computed_buffers(model)
    clash = sorted((dense.keys() | buffers.keys()) & tensors.keys())
    if clash:
        raise ValueError(
            f"tensor {clash[0]!r} of the model has the name of a stored part of a sparse layer; "
            "rename it."
        )
    tensors |= dense | buffers
    description: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "slope_version": __version__,
        "architecture": type(model).__name__,
        "layers": entries,
        "tied": tied,
        "buffers": sorted(buffers),
    }
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if isinstance(attention, str):
        description["attn_implementation"] = attention
    return tensors, description


def _check_not_shared(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SlopeLinear):
            first = seen.setdefault(id(module), name)
            if first != name:
                raise ValueError(
                    f"layers {first!r} and {name!r} are one SlopeLinear; sharing a sparse layer "
                    "cannot be saved. Give each place a layer of its own."
                )
    names: dict[int, str] = {}
    inside = {id(p) for _, layer in sparse_layers(model) for p in layer.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and names.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"{names[id(parameter)]!r} and {name!r} are one parameter, and one of a sparse "
                "layer; that cannot be saved. Give each its own."
            )


def _dense_tensors(model: nn.Module, inside: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors outside sparse layers, each once, and alias -> name for tied ones."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    tensors, tied = {}, {}
    for name, value in model.state_dict().items():
        if name in inside:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {name!r} is a {type(value).__name__}, no tensor; an export holds tensors "
                "only. Turn it into a buffer."
            )
        if name in parameters:
            original = first.setdefault(id(parameters[name]), name)
            if original != name:
                tied[name] = original
                continue
        tensors[name] = value
    return tensors, tied


def _computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Float buffers outside the state dict (rotary frequencies): a cast changes their values."""
    stored = model.state_dict().keys()
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in stored and buffer.is_floating_point()
    }


def _write(
    draft: Path,
    model: nn.Module,
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    tokenizer: Any,
) -> None:
    description["files"] = _write_tensors(draft, tensors)
    given = tokenizer is not None
    description["vocabulary"] = vocabulary(tokenizer) if given else None
    description["vocabulary_sha256"] = vocabulary_sha256(tokenizer) if given else None
    (draft / SLOPE_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    write_card(draft, model, "slope", "Compressed weights: kept values and a bitmask.")
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.dtype = _dtype(model)
        config.save_pretrained(draft)
        assert (draft / CONFIG_FILE).is_file()
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(draft)
    write_tokenizer(draft, tokenizer)


def _write_tensors(draft: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one file, or shards and their index; file name -> SHA-256."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = _separate(tensors)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    try:
        for file, names in plan.filename_to_tensors.items():
            part = {name: tensors[name] for name in names}
            save_file(part, draft / file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (draft / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {file: sha256(draft / file) for file in plan.filename_to_tensors}


def write_tokenizer(draft: Path, tokenizer: Any) -> None:
    """Save a tokenizer of `transformers` or `tokenizers`; None writes nothing."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(draft)
    elif tokenizer is not None:
        tokenizer.save(str(draft / "tokenizer.json"))


def vocabulary(tokenizer: Any) -> int:
    """Largest id of a tokenizer plus one: the rows that an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_sha256(tokenizer: Any) -> str:
    """SHA-256, in hex, of which entry of a tokenizer has which id."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two of them in one storage."""
    storages: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())
