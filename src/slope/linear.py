"""The sparse linear layer: half the weight as parameter, its mask as uint8 buffers.

The parameter is ``values``, plain and 2-D, so optimizers, clipping, DDP, FSDP2, GradScaler and
state_dict are stock and work on n/m of the bytes. It is not called ``weight`` and the class is no
``nn.Linear``: code that multiplies by ``module.weight`` must fail, not compute nonsense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope.adapters import Adapter
from slope.backends import AdapterTerm, Backend, Operands, SparseWeight, get_backend
from slope.compressed import (
    compress,
    decompress,
    keep_mask_from_metadata,
    pack_bits,
    unpack_bits,
)
from slope.functional import slope_linear
from slope.masks import row_keep_mask
from slope.pattern import NMPattern

_SAMPLED = 1024  # of a frozen layer's values, about


class _Prepared(NamedTuple):
    """Expanded operands and what they were made of."""

    operands: Operands
    source: tuple[Tensor, ...]
    trusted: _Trusted | None


class _Trusted(NamedTuple):
    """Tensors of a frozen layer as they were when their contents were last compared."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    sample: Tensor

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> _Trusted:
        return cls(tensors, cls._versions(tensors), cls._sampled(tensors[0]))

    def still(self, tensors: tuple[Tensor, ...]) -> bool:
        return (
            all(a is b for a, b in zip(self.tensors, tensors, strict=True))
            and self.versions == self._versions(tensors)
            and torch.equal(self.sample, self._sampled(tensors[0]))
        )

    @staticmethod
    def _versions(tensors: tuple[Tensor, ...]) -> tuple[int | None, ...]:
        # Tensors made under inference_mode track no version.
        return tuple(None if t.is_inference() else t._version for t in tensors)

    @staticmethod
    def _sampled(values: Tensor) -> Tensor:
        flat = values.detach().reshape(-1)
        return flat[:: flat.numel() // _SAMPLED | 1].clone()


class _OperandCache:
    """Expanded operands of one layer on the CPU, kept until the values or masks differ.

    Neither fused optimizers nor ``.data`` writes bump a tensor's version, so freshness is decided
    by comparing contents, which reads far less than expanding writes. Only where the values are
    frozen (``requires_grad`` False: serving, decoding) and were so at the last comparison, the same
    tensors with the same versions and the same sample of values are trusted: that shows a write to
    all of them through ``.data``, as teachers are averaged, but not one to a few. New operands are
    new tensors, so a backward still reads those of its own forward. Threads see a whole state or
    the one before it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._state: _Prepared | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _OperandCache:
        return _OperandCache()

    def __reduce__(self) -> Any:
        return _OperandCache, ()

    @property
    def filled(self) -> bool:
        return self._state is not None

    def find(self, layer: SlopeLinear, dtype: torch.dtype) -> Operands | None:
        """The operands, if they are those of the layer as it is."""
        state = self._state
        if state is None or state.operands.w_r.dtype != dtype:
            return None
        current = self._of(layer)
        frozen = not layer.values.requires_grad
        if frozen and state.trusted is not None and state.trusted.still(current):
            return state.operands
        if not all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(state.source, current, strict=True)
        ):
            return None
        self._state = state._replace(trusted=_Trusted.of(current) if frozen else None)
        return state.operands

    def store(self, layer: SlopeLinear, operands: Operands) -> None:
        current = self._of(layer)
        trusted = None if layer.values.requires_grad else _Trusted.of(current)
        self._state = _Prepared(operands, tuple(t.detach().clone() for t in current), trusted)

    @staticmethod
    def _of(layer: SlopeLinear) -> tuple[Tensor, ...]:
        return layer.values, layer.metadata, layer.column_mask


class AdaptedLinear(nn.Module):
    """What the sparse layers have in common: shape, pattern, bias, and a low-rank adapter.

    Attributes:
        in_features: I.
        out_features: O.
        pattern: N:M pattern.
        origin: what densify() gives back: "Linear", or "Conv1D" of transformers (transposed
            weight).
        bias: parameter (O,) or None.
        adapter: :class:`slope.Adapter` or None.
    """

    in_features: int
    out_features: int
    pattern: NMPattern
    origin: str
    bias: nn.Parameter | None
    adapter: Adapter | None

    def stored(self) -> nn.Parameter:
        """The parameter that holds the weights."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The forward's weight as a detached (O, I) tensor with zeros; the adapter is not in it."""
        raise NotImplementedError

    def add_adapter(
        self,
        rank: int,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        init: str = "normal",
    ) -> None:
        """Attach a dormant adapter; the arguments are those of :class:`slope.Adapter`.

        Raises:
            ValueError: if the rank does not fit the layer, or the initialisation is unknown.
        """
        stored = self.stored()
        self.adapter = Adapter(
            self.in_features,
            self.out_features,
            rank,
            scale,
            generator,
            device=stored.device,
            dtype=stored.dtype,
            init=init,
        )

    @staticmethod
    def _in_call_dtype(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
        """``x`` in the dtype of the products: autocast's, else the layer's, which it must have."""
        # As autocast does for nn.Linear, which leaves fp64 alone; the meta device has none.
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        if autocast and x.is_floating_point() and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
        if x.dtype != dtype:
            raise RuntimeError(
                f"input is {x.dtype} but {what} are {dtype}; cast one of them or use "
                "torch.autocast."
            )
        return x

    def _with_adapter(self, x: Tensor, y: Tensor) -> Tensor:
        adapter = self.adapter
        return y if adapter is None or not adapter.active else y + adapter(x)

    def extra_repr(self) -> str:
        """Shape and pattern, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, pattern={self.pattern}"
        )


class SlopeLinear(AdaptedLinear):
    """Linear layer with an N:M sparse weight, forward and backward.

    Args:
        in_features: I, divisible by m.
        out_features: O, divisible by m.
        bias: whether there is a bias.
        pattern: N:M pattern or its text.
        column_mask_interval: optimizer steps between column-mask refreshes. 1 refreshes by itself
            when the values have changed; k > 1 is driven by :class:`slope.SlopeSchedule`; 0 never.
        backend: ``"auto"`` or a backend's name.
        device: of parameters and buffers.
        dtype: of ``values`` and ``bias``.
        prune_backward: False leaves W^{R,C} = W^R, so that the input gradient is exact; the column
            mask is all ones and never refreshed.

    Attributes:
        values: parameter (O, K), K = I*n/m: the kept weights, row-major.
        metadata: uint8 buffer (O, ceil(K*log2(m)/8)): their positions.
        column_mask: uint8 buffer (O, ceil(K/8)): one bit per kept value, set if it survives in
            W^{R,C}.
        bias: parameter (O,) or None.
        adapter: :class:`slope.Adapter` or None.
        refreshes_itself: False once :class:`slope.SlopeSchedule` has seen that the values are
            sharded. It then refreshes the column mask of interval 1 from the shards; the forward
            may see gathered values that were rounded.

    Raises:
        ValueError: if the pattern does not divide the layer, or the interval is no such number.
    """

    values: nn.Parameter
    metadata: Tensor
    column_mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pattern: NMPattern | str = "2:4",
        column_mask_interval: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prune_backward: bool = True,
    ) -> None:
        super().__init__()
        if type(column_mask_interval) is not int or column_mask_interval < 0:
            raise ValueError(
                f"column_mask_interval={column_mask_interval!r} must be a whole number of steps, "
                "for example 1, or 0 for never."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = NMPattern.parse(pattern)
        self.column_mask_interval = column_mask_interval
        self.prune_backward = prune_backward
        self._backend: Backend = get_backend(backend, prune_backward)
        self.origin = "Linear"
        check_divides(in_features, out_features, self.pattern)
        kept = self.pattern.kept(in_features)
        self.values = nn.Parameter(torch.empty(out_features, kept, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        metadata_bytes = self.pattern.metadata_bytes(in_features)
        self.register_buffer(
            "metadata",
            torch.empty(out_features, metadata_bytes, dtype=torch.uint8, device=device),
        )
        self.register_buffer(
            "column_mask",
            torch.empty(out_features, -(-kept // 8), dtype=torch.uint8, device=device),
        )
        self.adapter = None
        self.refreshes_itself = True
        self._cache = _OperandCache()
        # Apart, since a compiled graph is made anew where a tuple that it has looked into differs.
        self._operand: Tensor | None = None
        self._operand_of: tuple[Any, ...] | None = None
        self._operand_metadata: Tensor | None = None
        if self.values.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does, keeping the larger part of each group of weights."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        keep_mask = row_keep_mask(dense.weight.detach(), self.pattern)
        self.set_dense(dense.weight.detach(), keep_mask)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(dense.bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        keep_mask: Tensor | None = None,
        pattern: NMPattern | str = "2:4",
        column_mask_interval: int = 1,
        backend: str = "auto",
        prune_backward: bool = True,
    ) -> SlopeLinear:
        """Convert ``nn.Linear``, or ``Conv1D`` of transformers, whose weight is transposed.

        Args:
            linear: the dense layer; on the meta device only shapes are converted.
            keep_mask: row mask (O, I) bool; None takes the largest magnitudes.
            pattern: N:M pattern.
            column_mask_interval: as for the class.
            backend: as for the class.
            prune_backward: as for the class.

        Raises:
            ValueError: if the pattern does not divide the layer, the mask breaks it, or the bias is
                no parameter.
        """
        weight = dense_weight(linear)
        bias = trained_bias(linear)
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias=bias is not None,
            pattern=pattern,
            column_mask_interval=column_mask_interval,
            backend=backend,
            device="meta",
            dtype=weight.dtype,
            prune_backward=prune_backward,
        )
        layer.origin = "Conv1D" if type(linear).__name__ == "Conv1D" else "Linear"
        layer.train(linear.training)
        if bias is not None:
            layer.bias = bias
        if weight.device.type != "meta":
            layer.to_empty_sparse(weight.device)
            layer.set_dense(
                weight, row_keep_mask(weight, layer.pattern) if keep_mask is None else keep_mask
            )
        layer.values.requires_grad_(next(linear.parameters()).requires_grad)
        return layer

    def to_empty_sparse(self, device: torch.device) -> None:
        """Give the sparse tensors storage on ``device``, leaving the bias as it is."""
        self.values = nn.Parameter(torch.empty_like(self.values, device=device))
        self.metadata = torch.empty_like(self.metadata, device=device)
        self.column_mask = torch.empty_like(self.column_mask, device=device)

    @torch.no_grad()
    def set_dense(self, weight: Tensor, keep_mask: Tensor) -> None:
        """Take values and mask from a dense (O, I) weight; the column mask is made anew."""
        device = self.values.device
        values, metadata = compress(weight.to(device), keep_mask.to(device), self.pattern)
        self.values.copy_(values)
        self.metadata.copy_(metadata)
        self.invalidate()
        self.refresh_column_mask()

    @torch.no_grad()
    def refresh_column_mask(self) -> None:
        """Choose W^{R,C} anew from the magnitudes of the present values.

        Call at a step boundary, never between a forward and its backward.
        """
        if not self.prune_backward:
            self.column_mask.copy_(pack_bits(torch.ones(self.values.shape, dtype=torch.bool)))
            return
        if hasattr(self.values, "full_tensor"):
            self._refresh_from_shards(self.values)
        else:
            self._backend.refresh_column_mask(self.compressed_weight())

    def _refresh_from_shards(self, values: Any) -> None:
        """Refresh where FSDP2 has cut the values along d_out; all processes take part.

        Each process chooses for its own rows where no group of m rows is cut, and they exchange
        one bit per value; else they gather the values.
        """
        from torch.distributed.tensor import DTensor, distribute_tensor

        mesh, placements = values.device_mesh, values.placements
        cuts = [mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard(0)]
        others = any(not p.is_shard(0) and not p.is_replicate() for p in placements)
        weight = self.compressed_weight()
        if others or len(cuts) != 1 or -(-self.out_features // cuts[0]) % self.pattern.m:
            self._backend.refresh_column_mask(weight._replace(values=values.full_tensor()))
            return

        def own_rows(buffer: Tensor) -> Tensor:
            # Every process has the whole buffer: nothing is sent.
            part: Any = distribute_tensor(buffer, mesh, placements, src_data_rank=None)
            rows: Tensor = part.to_local().clone()
            return rows

        mask = own_rows(self.column_mask)
        if len(mask):
            self._backend.refresh_column_mask(
                weight._replace(
                    values=values.to_local(), metadata=own_rows(self.metadata), column_mask=mask
                )
            )
        shape, stride = self.column_mask.shape, self.column_mask.stride()
        gathered = DTensor.from_local(mask, mesh, placements, shape=shape, stride=stride)
        self.column_mask.copy_(gathered.full_tensor())

    def compressed_weight(self) -> SparseWeight:
        """The tensors of this layer as a backend reads them."""
        return SparseWeight(
            self.values, self.metadata, self.column_mask, self.pattern, self.in_features
        )

    def keep_mask(self) -> Tensor:
        """Row mask of W^R, (O, I) bool."""
        return keep_mask_from_metadata(self.metadata, self.pattern, self.in_features)

    def column_keep_mask(self) -> Tensor:
        """Mask of W^{R,C}, (O, I) bool: the part of the row mask that the input gradient reads."""
        survives = unpack_bits(self.column_mask, self.values.shape[1])
        return decompress(survives, self.metadata, self.pattern, self.in_features)

    def stored(self) -> nn.Parameter:
        """The kept values."""
        return self.values

    def to_dense(self) -> Tensor:
        """W^R as a detached (O, I) tensor with zeros; the adapter is not in it."""
        return decompress(self.values.detach(), self.metadata, self.pattern, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O); under autocast in its dtype, else x and values share theirs."""
        # Each look-up in a module takes the host a microsecond, for which a small product waits.
        values, bias = self.values, self.bias
        x = self._in_call_dtype(x, values.dtype, "values")
        dtype = x.dtype
        cast = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        # Without gradients the backend may add the adapter while it multiplies.
        adapter = None if torch.is_grad_enabled() else self._adapter_term(dtype)
        operands, packed = self._prepare(values, dtype), self._packed(values, dtype)
        y = slope_linear(
            x,
            values,
            cast,
            self.metadata,
            self.column_mask,
            self.pattern,
            self._backend,
            operands,
            packed,
            adapter,
        )
        return y if adapter is not None else self._with_adapter(x, y)

    def _adapter_term(self, dtype: torch.dtype) -> AdapterTerm | None:
        """The active adapter as a backend reads it."""
        adapter = self.adapter
        if adapter is None or not adapter.active:
            return None
        return AdapterTerm(
            adapter.down.to(dtype), adapter.up.to(dtype), adapter.scale, adapter.corners
        )

    def _packed(self, values: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Operand whose first part the values are, so that serving packs nothing; None elsewhere.

        Only frozen values are moved into it: trained ones would be saved with the whole operand.
        """
        if values.requires_grad or values.dtype != dtype:
            return None
        metadata = self.metadata
        if torch.compiler.is_compiling():
            # A graph takes the one that eager mode has made, which the op drops where the values
            # have moved. It sees no versions: whoever writes positions in place invalidates. What
            # is exported would hold the operand as a constant; torch before 2.13 answers
            # is_exporting() with True in every compilation, so the flag behind it is asked.
            made = metadata is self._operand_metadata and not torch.compiler._is_exporting_flag
            return self._operand if made else None
        if self._operand_of != self._operand_key(values, metadata):
            if _captured(values):
                return None  # a CUDA graph's memory is no place for values
            self.share_operand()
        return self._operand

    def share_operand(self) -> None:
        """Move frozen values into the backend's operand, if it has one.

        The first eager forward does so by itself.
        """
        # Values that move into a tensor of inference mode could never be trained again.
        with torch.inference_mode(self.values.is_inference()), torch.no_grad():
            self._operand = self._backend.share_operand(self.compressed_weight())
        self._operand_metadata = metadata = self.metadata
        self._operand_of = self._operand_key(self.values, metadata)

    @staticmethod
    def _operand_key(values: Tensor, metadata: Tensor) -> tuple[Any, ...]:
        """Where values and positions are, and how often positions were written."""
        version = None if metadata.is_inference() else metadata._version
        return values.data_ptr(), metadata.data_ptr(), version

    def _prepare(self, values: Tensor, dtype: torch.dtype) -> Operands | None:
        """Refresh what has gone stale; the expanded operands on the CPU, None elsewhere.

        On the CPU expanding once per step instead of once per call is what keeps a sparse step near
        a dense one. Elsewhere memory counts more, and a compiled graph expands inside its kernels.
        """
        # Interval 1 makes the column mask a function of the values: chosen again whenever these are
        # expanded anew, in evaluation too, so that no forward finds operands with an older mask.
        # A frozen layer keeps the mask that it came with until its values are written.
        refresh = (
            self.column_mask_interval == 1
            and self.refreshes_itself
            and self.prune_backward
            and (values.requires_grad or self._cache.filled)
        )
        if torch.compiler.is_compiling() or values.device.type != "cpu":
            if refresh and torch.is_grad_enabled():
                self.refresh_column_mask()
            return None
        operands = self._cache.find(self, dtype)
        if operands is None:
            if refresh:
                self.refresh_column_mask()
            operands = self._backend.expand(self.compressed_weight(), dtype)
            self._cache.store(self, operands)
        return operands

    def invalidate(self) -> None:
        """Drop the prepared operands; the next forward makes them again.

        Needed after ``metadata`` of a frozen layer was written in place, if it runs compiled, and
        after a few values of a frozen layer on the CPU were written through ``.data``.
        """
        self._cache.clear()
        self._operand = self._operand_of = self._operand_metadata = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the operand, since its values lie elsewhere."""
        state = super().__getstate__()
        return {**state, "_operand": None, "_operand_of": None, "_operand_metadata": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.invalidate()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> SlopeLinear:
        self.invalidate()
        super()._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "SlopeLinear has no 'weight': the parameter is 'values', and to_dense() gives the "
                "weight with zeros. If torch's fast path for nn.TransformerEncoder asked, call "
                "torch.backends.mha.set_fastpath_enabled(False); if a model reads it itself, as T5 "
                "does, leave that layer dense: skip=['*.wo']."
            )
        return super().__getattr__(name)


def check_divides(in_features: int, out_features: int, pattern: NMPattern, name: str = "") -> None:
    """Check that the pattern divides both dimensions: rows in the forward, columns in the backward.

    Raises:
        ValueError: naming the dimension, the layer if given, and what to do.
    """
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if size % pattern.m:
            padded = size + -size % pattern.m
            where = f" (layer {name!r})" if name else ""
            exclude = (
                f"exclude it with skip=[{name!r}] or rules=[[{name!r}, 'dense']]"
                if name
                else "keep the layer dense"
            )
            raise ValueError(
                f"{what}={size} is not divisible by m={pattern.m} of pattern {pattern}{where}; "
                f"{exclude} or pad to {padded}."
            )


def dense_weight(linear: nn.Module) -> Tensor:
    """Weight of ``nn.Linear`` or transformers' ``Conv1D`` as (O, I), detached.

    Raises:
        ValueError: for another layer.
    """
    weight = linear.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"{type(linear).__name__} is no linear layer; give an nn.Linear, or a Conv1D of "
            "transformers."
        )
    return weight.detach().t() if type(linear).__name__ == "Conv1D" else weight.detach()


def trained_bias(linear: nn.Module) -> nn.Parameter | None:
    """The bias of a dense layer, or None if it has none.

    Raises:
        ValueError: if it is a buffer or computed.
    """
    if linear.bias is not None and not isinstance(linear.bias, nn.Parameter):
        raise ValueError(
            "the layer has a bias that is no Parameter, which nobody could train; make it one, "
            "or call torch.nn.utils.prune.remove(layer, 'bias') first."
        )
    return linear.bias


def _captured(tensor: Tensor) -> bool:
    """Whether what is done now is recorded in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
