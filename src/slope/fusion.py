"""One product for layers that read the same input, for serving: Q with K and V, gate with up.

With few tokens a product costs some microseconds beside the bytes that it reads, so few large ones
are faster than many small ones. The layers stay in the model under their names, with their
parameters, which become rows of one weight in one piece of memory: Y of layer i is
``X [W_1; W_2; …]ᵀ + [b_1, b_2, …]`` at its own columns. An adapter of the whole has the ``down`` of
all in one and their ``up`` in blocks on the diagonal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope.adapters import Adapter
from slope.linear import AdaptedLinear, SlopeLinear


class Fusion(NamedTuple):
    """Layers that read the same input.

    Attributes:
        names: of the layers, in the order in which the model calls them.
        why_apart: reason why they stay apart, or None if they are one product now.
    """

    names: tuple[str, ...]
    why_apart: str | None


def fuse_projections(model: nn.Module, *args: Any, **kwargs: Any) -> list[Fusion]:
    """Make linear layers that read the same input one product, in place; for serving.

    The model is called once, without gradients, to see which layers those are: :class:`SlopeLinear`
    called one after another with the same tensor, and ``nn.Linear`` likewise. State dict, names and
    parameters stay as they are; parameters share memory. Each layer goes on alone wherever fusing
    would not be right: with gradients, called with another tensor than the first of its group, or
    behind ``.to()``, until an eager call has put them together again. Call it when the weights are
    loaded and before ``torch.compile``; a compiled model does not see that ``.data`` of a parameter
    was bound to other memory, nor that an input was written between two layers of a group.

    Args:
        model: whose parameters are frozen, ``model.requires_grad_(False)``.
        args: of the call, for example a batch of one token.
        kwargs: of the call.

    Returns:
        The groups found, with the reason for those that stay apart.

    Raises:
        ValueError: if no layers read the same input, or all groups stay apart.

    Example:
        >>> model.eval().requires_grad_(False)
        >>> slope.fuse_projections(model, input_ids=torch.tensor([[0]]))
        [Fusion(names=('…layers.1.self_attn.q_proj', '…k_proj', '…v_proj'), why_apart=None), …]
    """
    names = {module: name for name, module in model.named_modules() if _kind(module) is not None}
    groups = _called_together(model, list(names), lambda: model(*args, **kwargs))
    if not groups:
        raise ValueError(
            "fuse_projections() found no linear layers that are called one after another with the "
            "same input; nothing is to be gained for this model."
        )
    company = Counter(module for group in groups for module in group)
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    fusions = []
    for group in groups:
        why = _why_apart(group)
        if any(company[module] > 1 for module in group):
            why = "a layer is called in other company too"
        elif any(shared[id(p)] > 1 for module in group for p in module.parameters()):
            why = "a parameter is shared with another layer"
        fusions.append(Fusion(tuple(names[module] for module in group), why))
        if why is None:
            _Group(group)
    if all(fusion.why_apart for fusion in fusions):
        first = fusions[0]
        raise ValueError(
            f"fuse_projections() found {len(fusions)} groups and none can be one product; "
            f"{', '.join(first.names)}: {first.why_apart}."
        )
    return fusions


def _called_together(
    model: nn.Module, layers: Sequence[nn.Module], call: Callable[[], object]
) -> list[tuple[nn.Module, ...]]:
    """Layers of one kind that a call of the model gives the same tensor, one after another."""
    runs: list[list[nn.Module]] = []
    last: list[Any] = [None, None]  # tensor and kind

    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, kind = inputs[0] if inputs else None, _kind(module)
        if x is None or x is not last[0] or kind is not last[1]:
            runs.append([])
        runs[-1].append(module)
        last[:] = x, kind

    hooks = [layer.register_forward_pre_hook(seen) for layer in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            call()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(tuple(run) for run in runs if len(run) > 1))


def _kind(module: nn.Module) -> type | None:
    """What a layer can be fused as."""
    for kind in (SlopeLinear, nn.Linear):
        if type(module) is kind or type(module) is _MEMBERS[kind]:
            return kind
    return None


def _why_apart(members: Sequence[Any]) -> str | None:
    """Reason why layers cannot be one product as they are, or None."""
    first = members[0]
    tensors = [parameter for member in members for parameter in member.parameters()]
    if len(set(members)) < len(members):
        return "a layer is called twice"
    if any(parameter.requires_grad for parameter in tensors):
        return "they are trained; call model.requires_grad_(False) first"
    if any(type(parameter.data) is not Tensor or parameter.is_meta for parameter in tensors):
        return "their parameters are sharded, or hold no numbers"
    if len({(parameter.dtype, parameter.device) for parameter in tensors}) > 1:
        return "their parameters differ in dtype or device"
    if isinstance(first, SlopeLinear):
        if len({(m.pattern, m._backend.name, m.prune_backward) for m in members}) > 1:
            return "their patterns or backends differ"
        if len(set(map(_adapter_scale, members))) > 1:
            return "their adapters differ in scale, or some are active and others not"
        if sum(m.adapter.rank for m in members if m.adapter is not None) > first.in_features:
            return "their adapters' ranks add up to more than d_in"
    return None


def _adapter_scale(member: AdaptedLinear) -> float | None:
    """Of an active adapter."""
    adapter = member.adapter
    return adapter.scale if adapter is not None and adapter.active else None


class _Group:
    """Layers that are one product, and that product's layer, which belongs to no module.

    Args:
        members: in the order of their calls; they become members.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members: tuple[Any, ...] = tuple(members)
        ends = list(accumulate(member.out_features for member in self.members))
        self._columns = list(zip([0, *ends], ends, strict=False))
        self._last: tuple[Tensor, int | None, Tensor] | None = None
        self._whole: Any = None
        self._state: tuple[Any, ...] | None = None
        for index, member in enumerate(self.members):
            # As parametrizations do: names, hooks and references to the layers stay.
            member.__class__ = _MEMBERS[_kind(member)]  # type: ignore[index]
            member._group, member._index = self, index
        self._join()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: its members' memory is apart, so it joins anew."""
        return {**self.__dict__, "_last": None, "_whole": None, "_state": None}

    def output(self, index: int, x: Tensor) -> Tensor | None:
        """Y of a member, or None where it is to go on alone."""
        if index:
            last = self._last
            if last is None or last[0] is not x or last[1] != _version(x):
                return None
        else:
            whole = self._current(x)
            if whole is None:
                return None
            last = self._last = x, _version(x), whole(x)
        if index == len(self.members) - 1:
            self._last = None
        start, end = self._columns[index]
        return last[2][..., start:end]

    def drop(self) -> None:
        """Forget the product: what it was made of may have changed."""
        self._whole = self._last = self._state = None

    def _current(self, x: Tensor) -> Any:
        """The product's layer if it is that of its members as they are, or None."""
        if not torch.compiler.is_compiling() and self._state != self._of_members():
            self.drop()
            captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
            if captured or _why_apart(self.members) is not None:
                return None
            self._join()
        return self._whole

    def _join(self) -> None:
        first = self.members[0]
        join = _joined_sparse if isinstance(first, SlopeLinear) else _joined_dense
        # What moves into a tensor of inference mode could never be trained again.
        with torch.inference_mode(next(first.parameters()).is_inference()), torch.no_grad():
            self._whole = join(self.members)
            for member, (start, end) in zip(self.members, self._columns, strict=True):
                for name, part in member.named_parameters(recurse=False):
                    part.data = getattr(self._whole, name)[start:end].data
                for name, part in member.named_buffers(recurse=False):
                    part.data = getattr(self._whole, name)[start:end].data
        self._state = self._of_members()

    def _of_members(self) -> tuple[Any, ...]:
        """What the product was made of: it need not be made anew while this stays."""
        tensors = [t for m in self.members for t in (*m.parameters(), *m.buffers())]
        scales = [_adapter_scale(m) for m in self.members if isinstance(m, AdaptedLinear)]
        return tuple(t.data_ptr() for t in tensors), tuple(map(_version, tensors)), tuple(scales)


def _version(tensor: Tensor) -> int | None:
    """Changes with a write in place; None where nobody counts these, as in a graph."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


class _Member:
    """Mixin of a layer that is part of a group."""

    _group: _Group
    _index: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), as columns of the group's product where that is right."""
        y = None if torch.is_grad_enabled() else self._group.output(self._index, x)
        return super().forward(x) if y is None else y  # type: ignore[misc]


class FusedSlopeLinear(_Member, SlopeLinear):
    """A :class:`SlopeLinear` whose tensors are rows of its group's."""

    def invalidate(self) -> None:
        """Drop the group's product too; the next eager forward makes it again."""
        super().invalidate()
        self._group.drop()

    def _packed(self, dtype: torch.dtype) -> Tensor | None:
        """None: values that moved into an operand of their own would leave the group's."""
        return None


class FusedLinear(_Member, nn.Linear):
    """An ``nn.Linear`` whose tensors are rows of its group's."""

    def _apply(self, fn: Any, recurse: bool = True) -> FusedLinear:
        self._group.drop()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._group.drop()
        super()._load_from_state_dict(*args, **kwargs)


_MEMBERS: dict[type, type] = {SlopeLinear: FusedSlopeLinear, nn.Linear: FusedLinear}


def _joined_sparse(members: Sequence[SlopeLinear]) -> SlopeLinear:
    first = members[0]
    whole = SlopeLinear(
        first.in_features,
        sum(member.out_features for member in members),
        bias=False,
        pattern=first.pattern,
        column_mask_interval=0,
        backend=first._backend.name,
        device="meta",
        dtype=first.values.dtype,
        prune_backward=first.prune_backward,
    )
    whole.values = _frozen([member.values for member in members])
    whole.metadata = torch.cat([member.metadata for member in members])
    whole.column_mask = torch.cat([member.column_mask for member in members])
    whole.bias = _joined_bias(members)
    adapters = [member.adapter for member in members if member.adapter is not None]
    if _adapter_scale(first) is not None:
        whole.adapter = _joined_adapter(adapters)
    whole.share_operand()
    return whole.eval()


def _joined_dense(members: Sequence[nn.Linear]) -> nn.Linear:
    first, rows = members[0], sum(member.out_features for member in members)
    whole = nn.Linear(first.in_features, rows, bias=False, device="meta", dtype=first.weight.dtype)
    whole.weight = _frozen([member.weight for member in members])
    whole.bias = _joined_bias(members)  # type: ignore[assignment]
    return whole.eval()


def _joined_bias(members: Sequence[Any]) -> nn.Parameter | None:
    """Biases of all; zeros for those that have none, None if none has one."""
    given = next((member.bias for member in members if member.bias is not None), None)
    if given is None:
        return None
    return _frozen([given.new_zeros(m.out_features) if m.bias is None else m.bias for m in members])


def _joined_adapter(adapters: Sequence[Adapter]) -> Adapter:
    """X downᵀ of all in one product, and each one's ``up`` for its own part of it alone."""
    whole = Adapter(
        adapters[0].down.shape[1],
        sum(adapter.up.shape[0] for adapter in adapters),
        sum(adapter.rank for adapter in adapters),
        adapters[0].scale,
        device="meta",
    )
    whole.down = _frozen([adapter.down for adapter in adapters])
    whole.up = nn.Parameter(torch.block_diag(*(a.up for a in adapters)), requires_grad=False)
    whole.active = True
    outputs = accumulate(adapter.up.shape[0] for adapter in adapters[:-1])
    ranks = accumulate(adapter.rank for adapter in adapters[:-1])
    whole.corners = tuple(corner for pair in zip(outputs, ranks, strict=True) for corner in pair)
    return whole


def _frozen(parts: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat(list(parts)), requires_grad=False)
