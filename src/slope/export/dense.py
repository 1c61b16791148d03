"""Formats that other people's code loads: dense with zeros for `transformers`, adapters for `peft`.

The dense folder is what ``AutoModelForCausalLM.from_pretrained`` reads, zeros included. A PEFT
folder holds the adapters as a LoRA: see :mod:`slope.export.lora`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from slope.convert import densify
from slope.export.card import contents, write_card
from slope.export.folder import new_folder
from slope.export.lora import ADAPTER_FOLDER, active_adapters, write_lora
from slope.export.save import SHARD_BYTES, unwrap, write_tokenizer
from slope.layers import adapted_layers, adapter_layers, deactivate_adapters


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
    active = active_adapters(model)
    folded, beside = bool(active) and fold_adapters, bool(active) and not fold_adapters
    if beside:
        deactivate_adapters(dense)
    if any(True for _ in adapted_layers(dense)):
        densify(dense, fold_adapters=True)
    with new_folder(directory, force) as draft:
        dense.save_pretrained(draft, max_shard_size=SHARD_BYTES)
        write_tokenizer(draft, tokenizer)
        zeros = " with their zeros" if contents(model, folded).sparse else ""
        where = f"; adapters in `{ADAPTER_FOLDER}`, for peft" if beside else ""
        if folded:
            where = f"; those of {len(active)} layers have their adapters added in, and no zeros"
        write_card(draft, model, "hf", f"Dense weights{zeros}{where}.", folded)
        if beside:
            write_lora(draft / ADAPTER_FOLDER, model, active, None)
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
    active = active_adapters(model)
    if not active:
        sleeping = sum(1 for _ in adapter_layers(model))
        raise ValueError(
            f"the model has no active adapter ({sleeping} dormant), so there is nothing for peft; "
            "write the model with --format slope or --format hf."
        )
    with new_folder(directory, force) as draft:
        write_lora(draft, model, active, base)
    return Path(directory).resolve()
