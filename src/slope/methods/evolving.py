"""A static mask that evolves: RigL within n:m groups, over compressed weights.

Every ``interval`` steps a share of the groups swaps its smallest kept weight for the pruned entry
with the largest gradient. The dense ∇W that shows that gradient is collected in those steps alone.
New weights begin at zero and with fresh optimizer state, so nothing jumps. The share decays along
half a cosine to 0 at ``stop`` of the run. After RigL (Evci et al., arXiv:1911.11134, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope.compressed import column_indices, compress
from slope.linear import SlopeLinear


@dataclass(frozen=True)
class Evolution:
    """When and how much a mask evolves.

    Attributes:
        interval: optimizer steps between swaps.
        fraction: share of the groups that swap at the first time.
        stop: share of the run after which the mask is fixed.

    Raises:
        ValueError: for a value outside these.
    """

    interval: int
    fraction: float = 0.3
    stop: float = 0.75

    def __post_init__(self) -> None:
        if (
            isinstance(self.interval, bool)
            or self.interval != int(self.interval)
            or (self.interval < 1)
        ):
            raise ValueError(
                f"interval={self.interval} must be a whole number of optimizer steps, at least 1, "
                "for example 100."
            )
        for name in ("fraction", "stop"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                example = getattr(Evolution, name)
                raise ValueError(f"{name}={value} is outside (0, 1], for example {name}={example}.")

    def share(self, step: int, max_steps: int) -> float:
        """Share of the groups that swap in optimizer step ``step`` (from 0) of ``max_steps``."""
        end = self.stop * max_steps
        if step == 0 or step % self.interval or step >= end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * step / end))


class GradientCollector:
    """Sums the dense ∇W of layers over the micro-batches of one optimizer step.

    Args:
        layers: whose gradients are wanted.
    """

    def __init__(self, layers: list[SlopeLinear]) -> None:
        self.gradients: dict[SlopeLinear, Tensor] = {}
        self._hooks = [
            layer.register_forward_hook(self._watch, with_kwargs=True) for layer in layers
        ]

    def _watch(
        self,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        assert isinstance(layer, SlopeLinear)
        if not output.requires_grad:
            return
        x = inputs[0] if inputs else named["x"]
        x_TI = x.detach().reshape(-1, layer.in_features)

        def collect(dy: Tensor) -> None:
            dy_TO = dy.reshape(-1, layer.out_features)
            dw_OI = dy_TO.t() @ x_TI.to(dy.dtype)
            found = self.gradients.get(layer)
            self.gradients[layer] = dw_OI.float() if found is None else found + dw_OI.float()

        output.register_hook(collect)

    def close(self) -> None:
        """Stop watching; average the gradients over the processes, so that all swap alike."""
        for hook in self._hooks:
            hook.remove()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for gradient in self.gradients.values():
                torch.distributed.all_reduce(gradient)


@torch.no_grad()
def swap(
    layer: SlopeLinear, gradient: Tensor, share: float, optimizer: torch.optim.Optimizer
) -> int:
    """Swap the smallest kept weight of some groups for their best pruned entry, in place.

    The groups are those whose best pruned entry has the largest gradient. Values, gradient and
    optimizer state keep their entries in the new order; those of new entries are zero.

    Args:
        layer: a compressed layer.
        gradient: dense ∇W, (O, I).
        share: of the groups, in [0, 1].
        optimizer: of the layer's values; state tensors of their shape are reordered.

    Returns:
        The number of groups that swapped: none where a gradient is not finite, since the loss
        scaler skips that step.

    Raises:
        ValueError: if the values are sharded, since a group must be seen whole.
    """
    if type(layer.values.data) is not Tensor:
        raise ValueError(
            "evolving masks need whole layers, but these values are "
            f"{type(layer.values.data).__name__}; use trainer.strategy=ddp, or no evolution."
        )
    if not bool(gradient.isfinite().all()):
        return 0
    pattern, shape = layer.pattern, (layer.out_features, layer.in_features)
    keep_mask = layer.keep_mask().view(-1, pattern.m)
    weight = layer.to_dense().abs().view(-1, pattern.m)
    wanted = gradient.abs().view(-1, pattern.m).masked_fill(keep_mask, -1.0)
    best = wanted.max(1)
    worst = weight.masked_fill(~keep_mask, math.inf).argmin(1)
    count = min(round(share * len(keep_mask)), int((best.values > 0).sum()))
    rows = best.values.sort(descending=True, stable=True).indices[:count]
    keep_mask[rows, worst[rows]] = False
    keep_mask[rows, best.indices[rows]] = True
    keep_mask = keep_mask.view(shape)

    columns = column_indices(layer.metadata, pattern, layer.in_features)
    metadata = compress(layer.to_dense(), keep_mask, pattern).metadata
    for tensor in _alike(layer.values, optimizer):
        dense = tensor.new_zeros(shape).scatter_(1, columns, tensor)
        tensor.copy_(dense[keep_mask].view_as(tensor))
    layer.metadata.copy_(metadata)
    layer.refresh_column_mask()
    layer.invalidate()
    return count


def _alike(values: nn.Parameter, optimizer: Any) -> list[Tensor]:
    """The values, their gradient, and the optimizer's state of the same shape."""
    # ZeroRedundancyOptimizer keeps the state of its own share in an optimizer of its own.
    state = getattr(optimizer, "optim", optimizer).state.get(values, {})
    tensors = [values.data, *(t for t in state.values() if torch.is_tensor(t))]
    if values.grad is not None:
        tensors.append(values.grad)
    return [tensor for tensor in tensors if tensor.shape == values.shape]
