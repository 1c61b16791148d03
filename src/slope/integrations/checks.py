"""Whether a trainer that begins has a sparse model, and an optimizer made after it became so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from slope.layers import adapted_layers


def check_run(model: nn.Module, optimizers: Iterable[Any], dense: bool) -> None:
    """Turn down a model that was not sparsified, or was so after the optimizer was made.

    Args:
        model: about to be trained.
        optimizers: of the run, wrapped or not. What holds flat copies of the parameters, as FSDP1
            and DeepSpeed do, cannot be judged and passes.
        dense: whether the model may have no sparse layers.

    Raises:
        ValueError: if nothing would be sparse, or the sparse layers would not be trained.
    """
    stored = [layer.stored() for _, layer in adapted_layers(model)]
    if not stored and not dense:
        raise ValueError(
            "the model has no sparse layers; call slope.sparsify(model, ...) before the trainer "
            "makes the optimizer, or type lora_start=None to train it dense."
        )
    held = {id(p): p for opt in optimizers for group in opt.param_groups for p in group["params"]}
    trained = {id(parameter) for parameter in stored if parameter.requires_grad}
    own = {id(parameter) for parameter in model.parameters()}
    stale = any(held[key].ndim == 2 for key in held.keys() - own)
    if stale and trained and not trained & held.keys():
        raise ValueError(
            "the optimizer holds no weights of the sparse layers but dense ones that the model no "
            "longer has, so these layers would not be trained; call slope.sparsify(model) first "
            "and then make the optimizer."
        )
