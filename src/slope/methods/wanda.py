"""Wanda: one-shot masks by |weight| times the norm of the input feature that it multiplies.

A Simple and Effective Pruning Approach for Large Language Models (arXiv:2306.11695), its score
|W_ij| · ‖X_j‖₂ compared in groups of m along d_in. The masks are chosen once from trained weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def wanda_scores(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Norms of the input features of linear layers over calibration batches.

    Args:
        model: called as ``model(**batch)`` in evaluation mode; it comes back as it was.
        layers: linear layers of it, by name.
        batches: calibration data, tensors on any device.

    Returns:
        ‖X_j‖₂ per layer, (I,) float32, zero for a feature that was never active.

    Raises:
        ValueError: if there is no batch, one is no mapping, or a layer was not called.
    """
    squares: dict[str, Tensor] = {}

    def measure(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            (x,) = (*inputs, *named.values())  # Linear calls it input, Conv1D x
            x = x.detach().reshape(-1, x.shape[-1]).float()
            found = squares.get(name)
            squares[name] = (x * x).sum(0) if found is None else found + (x * x).sum(0)

        return hook

    training = [module for module in model.modules() if module.training]
    hooks = [
        layer.register_forward_pre_hook(measure(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    device = next(model.parameters()).device
    count = 0
    try:
        model.eval()
        for batch in batches:
            count += 1
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"a batch is a {type(batch).__name__}; each must be a mapping, for example "
                    "{'input_ids': ids}."
                )
            model(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if not count:
        raise ValueError(
            "calibration has no batches; pass at least one, for example [{'input_ids': ids}]."
        )
    missing = [name for name in layers if name not in squares]
    if missing:
        raise ValueError(
            f"layer {missing[0]!r} was not called with the calibration batches, so its inputs are "
            "unknown; exclude it with skip=, or pass batches that reach it."
        )
    return {name: total.sqrt() for name, total in squares.items()}
