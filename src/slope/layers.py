"""The sparse layers of a model and their adapters: found, counted, woken and put to sleep."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from slope.adapters import Adapter
from slope.linear import AdaptedLinear, SlopeLinear
from slope.methods import PrunedLinear

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
# What the utilities of torch before parametrizations leave behind: an attribute, who, how to undo.
_OLD_STYLE = (
    ("weight_mask", "prune", "prune.remove(layer, 'weight')"),
    ("weight_g", "weight_norm", "remove_weight_norm(layer)"),
    ("weight_orig", "spectral_norm", "remove_spectral_norm(layer)"),
)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer that can become sparse."""
    return is_linear_like(module) and obstacle(module) is None


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer, be it of a subclass or with a computed weight.

    The output projection of ``nn.MultiheadAttention`` is none: it is not called, and the attention
    multiplies by its weight.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def obstacle(module: nn.Module) -> str | None:
    """Why a layer that is like a linear one cannot become sparse, or None if it can."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(module, name):
            return (
                f"its {name} is computed by a parametrization; call "
                f"parametrize.remove_parametrizations(layer, {name!r}) first"
            )
    if not isinstance(module.weight, nn.Parameter):
        for attribute, maker, undo in _OLD_STYLE:
            if hasattr(module, attribute):
                return f"its weight is computed by {maker}; call torch.nn.utils.{undo} first"
        return "its weight is no Parameter of its own; make it one first"
    if getattr(type(module), "fused", False):
        return "it is one product with others; sparsify before slope.fuse_projections"
    # A subclass may read its weight in ways of its own.
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        kind = type(module).__name__
        return f"{kind} is a subclass of nn.Linear; SlopeLinear.from_linear(layer) converts it"
    return None


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a layer that is like a linear one; the weight of an ``nn.Linear`` is not read.

    Reading a computed weight may change its state: spectral norms iterate.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1], weight.shape[0]  # Conv1D has it transposed


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new``, which takes the place of ``old``, its forward and backward hooks."""
    for name in _HOOKS:
        # The dictionaries themselves: the handles point to them and go on working.
        new.__dict__[name] = old.__dict__[name]


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
    kind = parametrize.type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and hasattr(module, "nf")
