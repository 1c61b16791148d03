"""One product for layers that read the same input, for serving: Q with K and V, gate with up.

With few tokens a product costs some microseconds beside the bytes that it reads, so few large ones
are faster than many small ones. The layers stay in the model under their names, with their
parameters, which become rows of one weight in one piece of memory: Y of layer i is
``X [W_1; W_2; …]ᵀ + [b_1, b_2, …]`` at its own columns. An adapter of the whole has copies of the
``down`` of all in one, and of their ``up`` in blocks on the diagonal.
"""

from __future__ import annotations

import copyreg
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope.adapters import Adapter
from slope.backends.support import KERNEL_DTYPES
from slope.linear import AdaptedLinear, SlopeLinear

_PARAMETERS = "values", "weight", "bias"
_BUFFERS = "metadata", "column_mask"


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
    called one after another with the same tensor, and ``nn.Linear`` likewise. Names and parameters
    stay as they are, and weights and biases may be written in place; they share memory, while state
    dicts, copies and pickles hold copies. What a layer gives are columns of a wider tensor.

    A layer goes on alone where it is called with another tensor than the first of its group, or
    where gradients of the input are wanted; it then packs its operand in each call. A group ends,
    with a warning, when an eager call finds parameters moved, trained, replaced or bound to other
    memory, a mask written, or an adapter that woke or fell asleep: then call this again. A compiled
    model sees the same, but for ``.data`` that was bound to other memory, and does not warn. It is
    not seen that an adapter is written through ``.data``, in compiled models in place either: call
    :meth:`SlopeLinear.invalidate`; nor, there and in inference mode, that an input, or there a
    weight, is written after some layers of a group have read the input and before others do, be it
    in a later call, unless the call that is made here shows it.

    Call it when the weights are loaded and before ``torch.compile``; merge adapters of peft first.

    Args:
        model: whose parameters are frozen, ``model.requires_grad_(False)``.
        args: of the call: a batch that reaches all layers, else as small as you like.
        kwargs: of the call.

    Returns:
        The groups found, with the reason for those that stay apart.

    Raises:
        ValueError: if no layers read the same input, or all groups stay apart.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        ...
        ...     def forward(self, x):
        ...         return self.q(x) * self.k(x) + self.v(x)
        >>> model = Attention().requires_grad_(False)
        >>> fuse_projections(model, torch.zeros(1, 8))
        [Fusion(names=('q', 'k', 'v'), why_apart=None)]
    """
    for module in list(model.modules()):
        if type(module) in _FUSED:
            _end(module)
    names = {module: name for name, module in model.named_modules() if _kind(module) is not None}
    groups = _called_together(model, list(names), lambda: model(*args, **kwargs))
    if not groups:
        raise ValueError(
            "fuse_projections() found no linear layers that are called one after another with the "
            "same input; nothing is to be gained for this model, or it is compiled already."
        )
    company = Counter(module for group in groups for module in group)
    places = Counter(
        parameter.untyped_storage().data_ptr()
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and _is_plain(parameter)
    )
    fusions, slot, made = [], _Slot(), []
    for group in groups:
        why = _why_apart(group)
        if any(company[module] > 1 for module in group):
            why = "a layer is called in other company too"
        elif why is None and any(
            places[p.untyped_storage().data_ptr()] > 1 for m in group for p in m.parameters()
        ):
            why = "a parameter shares memory with another one"
        fusions.append(Fusion(tuple(names[module] for module in group), why))
        if why is None:
            try:
                made.append(_Group(group, fusions[-1].names, slot))
                made[-1].begin()
            except BaseException:
                for each in made:
                    each.end()
                raise
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
    last: list[Any] = [None] * 3  # tensor, its version, kind

    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        now = x, None if x is None else _version(x), _kind(module)
        if x is None or x is not last[0] or now[1:] != tuple(last[1:]):
            runs.append([])
        runs[-1].append(module)
        last[:] = now

    hooks = [layer.register_forward_pre_hook(seen) for layer in layers]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            if any(training.values()):
                model.eval()
            call()
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(tuple(run) for run in runs if len(run) > 1))


def _kind(module: nn.Module) -> type | None:
    """What a layer can be fused as."""
    return next((kind for kind in (SlopeLinear, nn.Linear) if type(module) is kind), None)


def _is_plain(parameter: Tensor) -> bool:
    """Whether it is no tensor of a subclass, and holds numbers."""
    return type(parameter.data) is Tensor and not parameter.is_meta


def _why_apart(members: Sequence[Any]) -> str | None:
    """Reason why layers cannot be one product as they are, or None."""
    first = members[0]
    tensors = [parameter for member in members for parameter in member.parameters()]
    tensors += [buffer for member in members for buffer in member.buffers()]
    if any(not _is_plain(parameter) for parameter in tensors):
        return "their parameters are sharded, or hold no numbers"
    if any(_has_more(member) for member in members):
        return "they hold more than weights, or have a forward of their own"
    if any(parameter.requires_grad for parameter in tensors):
        return "they are trained; call model.requires_grad_(False) first"
    if len({(t.dtype, t.device) for t in tensors if t.is_floating_point()}) > 1:
        return "their parameters differ in dtype or device"
    if len({tensor.is_inference() for tensor in tensors}) > 1:
        return "some are tensors of inference mode and others not"
    if any(parameter.device.type == "cpu" and parameter.is_shared() for parameter in tensors):
        return "their memory is shared with other processes"
    if isinstance(first, SlopeLinear):
        if len({(m.pattern, m._backend.name, m.prune_backward) for m in members}) > 1:
            return "their patterns or backends differ"
        if len(set(map(_adapter_scale, members))) > 1:
            return "their adapters differ in scale, or some are active and others not"
        if sum(m.adapter.rank for m in members if m.adapter is not None) > first.in_features:
            return "their adapters' ranks add up to more than d_in"
    return None


def _has_more(member: nn.Module) -> bool:
    """Whether a layer holds what its class does not know of."""
    known = {*_PARAMETERS, *_BUFFERS, "adapter"}
    return "forward" in member.__dict__ or any(
        not known.issuperset(held)
        for held in (member._parameters, member._buffers, member._modules)
    )


def _adapter_scale(member: nn.Module) -> float | None:
    """Of an active adapter."""
    adapter = member.adapter if isinstance(member, AdaptedLinear) else None
    return adapter.scale if adapter is not None and adapter.active else None


class _Slot:
    """The latest product: one for all groups of a model, so that no more than one is held.

    Attributes:
        eager: of calls as they come.
        traced: inside a graph alone.
        warned: whether it was said that a group has ended.
    """

    def __init__(self) -> None:
        self.eager: tuple[Any, ...] | None = None
        self.traced: tuple[Any, ...] | None = None
        self.warned = False


class _Group:
    """Layers that are one product, and that product's layer, which belongs to no module.

    Args:
        members: in the order of their calls.
        names: of the members.
        slot: of their model.
    """

    def __init__(self, members: Sequence[Any], names: Sequence[str], slot: _Slot) -> None:
        self.members: tuple[Any, ...] = tuple(members)
        self._names, self._slot = ", ".join(names), slot
        first = self.members[0]
        # What moves into a tensor of inference mode could never be trained again.
        self._inference = next(first.parameters()).is_inference()
        with torch.inference_mode(self._inference), torch.no_grad():
            sparse = isinstance(first, SlopeLinear)
            self._whole: Any = (_joined_sparse if sparse else _joined_dense)(self.members)
        ends = list(accumulate(member.out_features for member in self.members))
        self._columns = list(zip([0, *ends], ends, strict=False))
        self._sizes = [member.out_features for member in self.members]
        self._scale = _adapter_scale(first)

    def begin(self) -> None:
        """Let the members' tensors be parts of the whole's."""
        with torch.inference_mode(self._inference), torch.no_grad():
            for member, (start, end) in zip(self.members, self._columns, strict=True):
                for held in (member._parameters, member._buffers):
                    for name, part in held.items():
                        if part is not None:
                            part.data = getattr(self._whole, name)[start:end].data
        self._tensors = [self._tensors_of(member) for member in self.members]
        self._records = [self._records_of(member) for member in self.members]
        self._versions = [self._versions_of(index) for index in range(len(self.members))]
        for index, member in enumerate(self.members):
            # As parametrizations do: names, hooks and references to the layers stay.
            member.__class__ = FusedSlopeLinear if type(member) is SlopeLinear else FusedLinear
            member._group, member._index = self, index

    def end(self, why: str | None = None) -> None:
        """Let the members go on alone.

        Args:
            why: reason to warn of, or None where it was asked for.
        """
        whole, self._whole, self._slot.eager = self._whole, None, None
        for member in self.members:
            if type(member) in _FUSED:
                member.__class__ = _FUSED[type(member)]
            member.__dict__.pop("_group", None)
            member.__dict__.pop("_index", None)
            if whole is not None:
                self._give_memory(member, whole)
        if why is not None and not self._slot.warned:
            self._slot.warned = True
            warnings.warn(
                f"fused layers go on alone, {self._names} first: {why}; call "
                "slope.fuse_projections(model, ...) again.",
                stacklevel=2,
            )

    def _give_memory(self, member: nn.Module, whole: nn.Module) -> None:
        """Of its own: who saves tensors may take those of one storage for the same."""
        with torch.inference_mode(self._inference), torch.no_grad():
            for held in (member._parameters, member._buffers):
                for name, part in held.items():
                    of = getattr(whole, name, None)
                    if part is None or of is None or not _is_plain(part):
                        continue
                    if part.untyped_storage().data_ptr() == of.untyped_storage().data_ptr():
                        part.data = part.data.clone()

    def output(self, member: Any, x: Tensor) -> Tensor | None:
        """Y of a member, or None where it is to go on alone."""
        index = getattr(member, "_index", None)  # a thread may just have ended the group
        # A replica for another GPU is no member.
        if index is None or self.members[index] is not member:
            return None
        if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
            return None  # the whole would be constants beside the members' parameters
        if torch.compiler.is_compiling():
            return self._traced(index, x)
        return self._eager(index, x)

    def _eager(self, index: int, x: Tensor) -> Tensor | None:
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return None  # vmap and its kin have no rule for what follows
        last, whole = self._slot.eager, self._whole
        key = _version(x), _autocast_dtype(x)
        if index and not self._serves(last, x, key):
            return None
        wanted = range(len(self.members)) if index == 0 else (index,)
        for number in wanted:
            why = self._why_over(number)
            if why is not None:
                if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                    self.end(why)
                return None
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        versions = [self._versions_of(number) for number in wanted]
        if index == 0:
            if whole is None:
                return None
            if versions != self._versions and isinstance(whole, SlopeLinear):
                whole._cache.clear()  # its tensors' versions are their own
                self._copy_adapters(whole.adapter)
            self._versions = versions
            # Unlike views they may be written in place, whatever autograd's mode.
            parts = torch.unsafe_split_with_sizes(whole(x), self._sizes, -1)
            last = self._slot.eager = self, x, key, parts, versions
        elif last is None or last[4][index] != versions[0]:
            return None
        if index == len(self.members) - 1:
            self._slot.eager = None
        y: Tensor = last[3][index]
        return y

    def _traced(self, index: int, x: Tensor) -> Tensor | None:
        if self._whole is None or torch.is_grad_enabled() and x.requires_grad:
            return None
        for number in range(len(self.members)) if index == 0 else (index,):
            if self._others(number):
                return None
        last = self._slot.traced
        if index == 0:
            last = self._slot.traced = self, x, _autocast_dtype(x), self._whole(x)
        elif not self._serves(last, x, _autocast_dtype(x)):
            return None
        if index == len(self.members) - 1:
            self._slot.traced = None
        start, end = self._columns[index]
        y: Tensor = last[3].narrow(-1, start, end - start)
        return y

    def _serves(self, last: Any, x: Tensor, key: Any) -> bool:
        """Whether the latest product is this group's of that input."""
        return last is not None and last[0] is self and last[1] is x and last[2] == key

    def _why_over(self, index: int) -> str | None:
        """Why a member is no part of the whole any more, or None."""
        # What costs as little as it can: an eager call waits for it.
        records, adapter = self._records[index]
        now = self.members[index]._modules.get("adapter")
        if now is not adapter or (
            now is not None and (now.scale if now.active else None) != self._scale
        ):
            return _OTHERS
        for held, name, tensor, place, written in records:
            if held.get(name) is not tensor:
                return _OTHERS
            if tensor is not None and tensor.data_ptr() != place:
                return "parameters were bound to other memory"
            if written is not None and tensor._version != written:
                return "a mask was written"
            if tensor is not None and tensor.requires_grad:
                return "they are trained"
        return None

    def _versions_of(self, index: int) -> list[int]:
        """How often what a member holds was written; those of inference mode are not counted."""
        return [
            tensor._version
            for _, _, tensor, _, _ in self._records[index][0]
            if tensor is not None and not self._inference
        ]

    @torch.no_grad()
    def _copy_adapters(self, whole: Adapter | None) -> None:
        ranks = 0
        if whole is not None:
            for member, (start, end) in zip(self.members, self._columns, strict=True):
                rows = slice(ranks, ranks := ranks + member.adapter.rank)
                whole.down[rows].copy_(member.adapter.down)
                whole.up[start:end, rows].copy_(member.adapter.up)

    def _others(self, index: int) -> bool:
        """Whether a member has other tensors or another adapter; a graph asks that too."""
        member = self.members[index]
        now, then = self._tensors_of(member), self._tensors[index]
        if len(now) != len(then) or _adapter_scale(member) != self._scale:
            return True
        return any(a is not b for a, b in zip(now, then, strict=True)) or any(
            tensor is not None and tensor.requires_grad for tensor in now
        )

    @staticmethod
    def _tensors_of(member: Any) -> tuple[Tensor | None, ...]:
        if not isinstance(member, SlopeLinear):
            return member.weight, member.bias
        if _adapter_scale(member) is None:
            return member.values, member.bias, member.metadata
        adapter: Any = member.adapter
        return member.values, member.bias, member.metadata, adapter.down, adapter.up

    def _records_of(self, member: Any) -> tuple[list[tuple[Any, ...]], Any]:
        """Where a member's tensors are held, these, their places, and versions of masks."""
        sparse = isinstance(member, SlopeLinear)
        own = [(member._parameters, name) for name in ("values" if sparse else "weight", "bias")]
        own += [(member._buffers, "metadata")] if sparse else []
        adapter = member._modules.get("adapter")
        if self._scale is not None:
            own += [(adapter._parameters, name) for name in ("down", "up")]
        records = []
        for held, name in own:
            tensor = held.get(name)
            written = _version(tensor) if name == "metadata" else None
            place = None if tensor is None else tensor.data_ptr()
            records.append((held, name, tensor, place, written))
        return records, adapter


_OTHERS = "other parameters or adapters came in, or an adapter fell asleep or woke"


def _version(tensor: Tensor) -> int | None:
    """Changes with a write in place; None where nobody counts these."""
    return None if tensor.is_inference() else tensor._version


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's, None where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class FusedSlopeLinear(SlopeLinear):
    """A :class:`SlopeLinear` that is a part of a group's; see :func:`fuse_projections`."""

    fused = True
    _group: _Group
    _index: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), as columns of the group's product where that is right."""
        group = getattr(self, "_group", None)  # a thread may just have ended it
        y = None if group is None else group.output(self, x)
        return SlopeLinear.forward(self, x) if y is None else y

    def invalidate(self) -> None:
        """End the group: what it was made of may be other now."""
        _end(self, "weights were moved or loaded, or invalidate() was called")
        SlopeLinear.invalidate(self)

    def _packed(self, values: Tensor, dtype: torch.dtype) -> Tensor | None:
        """None: values that moved into an operand of their own would leave the group's."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> SlopeLinear:
        if _moved(self, fn, recurse):
            self.invalidate()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep: bool) -> None:
        SlopeLinear._save_to_state_dict(self, destination, prefix, keep)
        _own(self, destination, prefix, keep)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or pickle is a plain layer."""
        return _plain(SlopeLinear, SlopeLinear.__getstate__(self))


class FusedLinear(nn.Linear):
    """An ``nn.Linear`` that is a part of a group's; see :func:`fuse_projections`."""

    fused = True
    _group: _Group
    _index: int

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O), as columns of the group's product where that is right."""
        group = getattr(self, "_group", None)
        y = None if group is None else group.output(self, input)
        return nn.Linear.forward(self, input) if y is None else y

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Linear:
        if _moved(self, fn, recurse):
            _end(self, "weights were moved or loaded")
        return self

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *others: Any) -> None:
        if local.get("assign_to_params_buffers"):
            _end(self, "weights were moved or loaded")
        nn.Linear._load_from_state_dict(self, state, prefix, local, *others)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep)
        _own(self, destination, prefix, keep)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or pickle is a plain layer."""
        return _plain(nn.Linear, self.__dict__)


_FUSED: dict[type, type] = {FusedSlopeLinear: SlopeLinear, FusedLinear: nn.Linear}


def _end(member: Any, why: str | None = None) -> None:
    group = getattr(member, "_group", None)
    if group is not None:
        group.end(why)


def _moved(member: nn.Module, fn: Any, recurse: bool) -> bool:
    """Apply as modules do; whether a tensor is elsewhere now, or of another kind."""

    def places() -> list[tuple[Any, ...]]:
        tensors = [*member.parameters(), *member.buffers()]
        return [(t.device, t.dtype, t.data_ptr() if _is_plain(t) else t) for t in tensors]

    before = places()
    nn.Module._apply(member, fn, recurse)
    return places() != before


def _own(member: nn.Module, state: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Copies in a state dict: who saves it may take tensors of one storage for the same."""
    for name in (*member._parameters, *member._buffers):
        if not keep_vars and prefix + name in state:
            state[prefix + name] = state[prefix + name].clone()


def _plain(kind: type, state: dict[str, Any]) -> tuple[Any, ...]:
    own = {name: value for name, value in state.items() if name not in ("_group", "_index")}
    for held in ("_parameters", "_buffers"):
        own[held] = {
            name: part if part is None else _copy_of(part) for name, part in own[held].items()
        }
    return copyreg._reconstructor, (kind, object, None), own  # type: ignore[attr-defined]


def _copy_of(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy


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
    if _adapter_scale(first) is not None:
        whole.adapter = _joined_adapter([m.adapter for m in members if m.adapter is not None])
    if whole.values.dtype in KERNEL_DTYPES:
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
