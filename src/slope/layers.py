"""The sparse layers of a model and their adapters: found, counted, woken and put to sleep."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from slope.adapters import Adapter
from slope.linear import AdaptedLinear, SlopeLinear
from slope.methods import PrunedLinear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer that can become sparse."""
    # Exact types: a subclass may read its weight in ways of its own.
    return type(module) is nn.Linear or _is_conv1d(module)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SlopeLinear]]:
    """(name, layer) of every :class:`SlopeLinear`, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, SlopeLinear):
            yield name, module


def pruned_layers(model: nn.Module) -> Iterator[tuple[str, PrunedLinear]]:
    """(name, layer) of every :class:`slope.PrunedLinear`, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, PrunedLinear):
            yield name, module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) of every sparse layer, compressed or not, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) of every sparse layer that has an adapter, in the model's order."""
    for name, layer in adapted_layers(model):
        if layer.adapter is not None:
            yield name, layer


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Every adapter of the model."""
    for _, layer in adapter_layers(model):
        assert layer.adapter is not None
        yield layer.adapter


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of all adapters: give them a group of their own, without weight decay."""
    return [parameter for adapter in adapters(model) for parameter in adapter.parameters()]


def activate_adapters(model: nn.Module) -> None:
    """Wake every adapter; the output does not change at this step, since ``up`` is zero."""
    for adapter in adapters(model):
        adapter.active = True


def deactivate_adapters(model: nn.Module) -> None:
    """Put every adapter to sleep."""
    for adapter in adapters(model):
        adapter.active = False


def adapters_active(model: nn.Module) -> bool:
    """True if the model has adapters and they are active."""
    states = [adapter.active for adapter in adapters(model)]
    return bool(states) and all(states)


def refresh_column_masks(model: nn.Module) -> None:
    """Choose W^{R,C} anew in every layer; at a step boundary only."""
    for _, layer in sparse_layers(model):
        layer.refresh_column_mask()


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
