"""Write a sparse model to a folder, all of it or nothing."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope.convert import pruned_layers, sparse_layers
from slope.export.layout import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    SLOPE_FILE,
    WEIGHTS_FILE,
    describe,
    encode,
    join,
)
from slope.linear import SlopeLinear


def save_pretrained(
    model: nn.Module, directory: str | Path, tokenizer: Any = None, *, force: bool = False
) -> Path:
    """Write a sparse model as compressed safetensors; :func:`load_pretrained` reads it back.

    The folder is written under a temporary name and renamed when it is complete, so a crash or a
    full disk never leaves half an export under its name.

    Args:
        model: a model with :class:`slope.SlopeLinear` layers; DDP and `torch.compile` wrappers are
            looked through.
        directory: the folder to make.
        tokenizer: saved beside it if given (of `transformers` or `tokenizers`).
        force: replace an earlier export of that name; any other content is never touched.

    Returns:
        The folder.

    Raises:
        ValueError: if the model has no sparse layer or one that is not compressed yet, or holds
            state that is no tensor.
        FileExistsError: if the folder holds something already.
        OSError: if it cannot be written, for instance on a full disk.
    """
    directory = Path(directory).resolve()
    model = _unwrap(model)
    tensors, description = _collect(model)
    _check_target(directory, force)

    draft = _beside(directory, "new")
    try:
        draft.mkdir(parents=True)
        _write(draft, model, tensors, description, tokenizer)
        _move_into_place(draft, directory)
    except OSError as error:
        raise OSError(
            f"could not write the export '{directory}': {error}; free some space or choose another "
            "folder. Nothing that was there before has been changed."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _unwrap(model: nn.Module) -> nn.Module:
    inner: Any = model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
        inner = model._orig_mod
    return inner if inner is model else _unwrap(inner)


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
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for leaf, tensor in encode(layer).items():
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
        "layers": {name: describe(layer) for name, layer in layers.items()},
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


def _check_target(directory: Path, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"'{directory}' is a file; choose another folder for the export.")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not force:
        raise FileExistsError(
            f"folder '{directory}' is not empty; choose another one, or pass force=True to "
            "replace an earlier export."
        )
    if not (directory / SLOPE_FILE).is_file():
        raise FileExistsError(
            f"folder '{directory}' is not empty and holds no {SLOPE_FILE}, so it is no earlier "
            "export and force=True does not replace it; choose another folder."
        )


def _write(
    draft: Path,
    model: nn.Module,
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    tokenizer: Any,
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_separate(tensors), draft / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (draft / SLOPE_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
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
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(draft)
    elif tokenizer is not None:
        tokenizer.save(str(draft / "tokenizer.json"))
    for path in draft.rglob("*"):
        if path.is_file():
            _sync(path)


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


def _move_into_place(draft: Path, directory: Path) -> None:
    """Rename; an earlier export steps aside first and is removed last."""
    if directory.is_dir() and any(directory.iterdir()):
        aside = _beside(directory, "old")
        os.replace(directory, aside)
        try:
            os.replace(draft, directory)
        except OSError:
            os.replace(aside, directory)
            raise
        shutil.rmtree(aside)
    else:
        os.replace(draft, directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(directory: Path, purpose: str) -> Path:
    """A hidden name in the same file system that nobody else uses."""
    return directory.with_name(f".{directory.name}.{purpose}-{uuid.uuid4().hex[:12]}")
