"""Adapters beside dense weights: what a dense export of a sparse model holds.

An adapter there is a term of its own, as in the sparse layer: Y = X Wᵀ + b + scale (X downᵀ) upᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from slope.adapters import Adapter
from slope.convert import densify
from slope.layers import adapter_layers
from slope.linear import AdaptedLinear, dense_weight


class AdaptedDense(AdaptedLinear):
    """A dense linear layer with an adapter; ``pattern`` is None.

    Args:
        linear: ``nn.Linear`` or transformers' ``Conv1D``; its bias is shared.
        adapter: of that layer.

    Attributes:
        weight: parameter (O, I).
    """

    weight: nn.Parameter

    def __init__(self, linear: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        weight = dense_weight(linear)
        self.out_features, self.in_features = weight.shape
        self.pattern = None  # type: ignore[assignment]
        self.origin = type(linear).__name__
        trained = next(linear.parameters()).requires_grad
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
        self.bias = linear.bias if isinstance(linear.bias, nn.Parameter) else None
        self.adapter = adapter
        self.train(linear.training)

    def stored(self) -> nn.Parameter:
        """The dense weight."""
        return self.weight

    def to_dense(self) -> Tensor:
        """The weight, detached; the adapter is not in it."""
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O); under autocast in its dtype, else x and the weight share theirs."""
        x = self._in_call_dtype(x, self.weight.dtype, "weights")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._with_adapter(x, nn.functional.linear(x, self.weight.to(x.dtype), bias))


def attach(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Give layers their adapters, by name and in place; a dense one becomes an AdaptedDense."""
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        if isinstance(layer, AdaptedLinear):
            layer.adapter = adapter
        else:
            model.set_submodule(name, AdaptedDense(layer, adapter))


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Dense layers in place of the adapted ones, for as long as the block prunes them.

    Outputs are the same meanwhile. Afterwards a layer that became sparse has its adapter again, and
    that of one which stayed dense is added into the weight. If the block fails, all is as before.
    """
    adapters: dict[str, Adapter] = {}
    hooks = []
    for name, layer in list(adapter_layers(model)):
        if isinstance(layer, AdaptedDense) and layer.adapter is not None:
            adapters[name], layer.adapter = layer.adapter, None
            linear = _dense(layer)
            # A sparse layer that takes the place of this one takes over the hook.
            hooks.append(
                linear.register_forward_hook(
                    lambda _, inputs, y, term=adapters[name]: y + term(inputs[0])
                )
            )
            model.set_submodule(name, linear)
    try:
        yield
    except BaseException:
        attach(model, adapters)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    attach(model, adapters)
    for name in adapters:
        pruned = model.get_submodule(name)
        if isinstance(pruned, AdaptedDense):
            model.set_submodule(name, _dense(pruned))


def _dense(layer: AdaptedDense) -> nn.Module:
    """The layer that it was made of, with the adapter, if it has one, added into the weight."""
    return densify(nn.ModuleList([layer]), fold_adapters=True)[0]  # type: ignore[index]
