"""What masks do to the weights of a model: measured layer by layer, and checked against n:m.

Two masks matter in each sparse layer: that of the forward's weight (W^R for SLoPe) and that of the
input gradient's (W^{R,C}). Everything here only reads: no gradient, no random number, and no more
than one layer's dense tensors at a time. O = d_out, I = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope.adapters import Adapter
from slope.compressed import check_metadata, pack_bits, unpack_bits
from slope.layers import adapted_layers
from slope.linear import AdaptedLinear, SlopeLinear
from slope.masks import column_keep_mask, imposed_sparsity
from slope.methods import PrunedLinear
from slope.methods.dynamic_weight import DynamicWeight
from slope.methods.fst import FST
from slope.methods.inputs import StaticInput
from slope.methods.s_ste import SoftThreshold
from slope.methods.static import StaticWeight
from slope.pattern import NMPattern

COLUMNS = (
    "density",
    "density_backward",
    "imposed_sparsity",
    "lemma",
    "flip_rate",
    "column_flip_rate",
    "kept_energy",
    "kept_energy_backward",
    "adapter_norm",
)


@dataclass(frozen=True)
class LayerDiagnostics:
    """Numbers of one sparse layer, or of all together; shares are of 1, None is not known.

    Attributes:
        numel: weights of the layer, O times I.
        density: share of them that the forward's weight keeps.
        density_backward: share that the input gradient's weight keeps.
        imposed_sparsity: the difference of the two: zeros that the second pruning adds.
        lemma: what Lemma 2.1 expects of that difference for a random mask of the pattern; 0 where
            there is no second pruning, and the input gradient is exact; None without a pattern.
        flip_rate: share of all weights that the forward's mask began to keep or to prune since the
            snapshot; None without one.
        column_flip_rate: likewise of the input gradient's mask.
        kept_energy: share of the squared weight that the forward's mask keeps; None where the
            pruned weights are not there to compare with: SLoPe, and every other static mask.
        kept_energy_backward: share of what the forward's mask keeps that the input gradient's
            keeps.
        adapter_norm: Frobenius norm of the adapter's product, dormant or not, over that of the
            forward's weight; None without an adapter.
    """

    numel: int
    density: float
    density_backward: float
    imposed_sparsity: float
    lemma: float | None
    flip_rate: float | None
    column_flip_rate: float | None
    kept_energy: float | None
    kept_energy_backward: float | None
    adapter_norm: float | None

    def row(self) -> dict[str, float | None]:
        """The numbers by the names of ``COLUMNS``."""
        return {name: getattr(self, name) for name in COLUMNS}


@torch.no_grad()
def masks(layer: AdaptedLinear) -> tuple[Tensor, Tensor]:
    """Masks of the forward's and the input gradient's weight, as the next training forward has.

    Args:
        layer: any sparse layer.

    Returns:
        Two keep_masks (O, I) bool.
    """
    if isinstance(layer, PrunedLinear):
        return layer.masks()
    assert isinstance(layer, SlopeLinear)
    keep_mask = layer.keep_mask()
    if layer.column_mask_interval == 1 and layer.prune_backward and layer.values.requires_grad:
        # The layer chooses this mask anew in its next forward; the stored one is a step behind.
        return keep_mask, column_keep_mask(layer.to_dense(), keep_mask, layer.pattern)
    return keep_mask, layer.column_keep_mask()


class MaskSnapshot:
    """Masks of every sparse layer at one moment, two bits per weight, to count flips against.

    Args:
        model: a model with sparse layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed: dict[str, tuple[Tensor, ...]] = {}
        for name, layer in adapted_layers(model):
            self._packed[name] = tuple(pack_bits(mask) for mask in masks(layer))

    def flips(self, name: str, now: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """How many entries of each mask of one layer differ ``now``, as 0-d int64 tensors."""
        return tuple(
            (unpack_bits(packed, mask.shape[1]) != mask).sum()
            for packed, mask in zip(self._packed[name], now, strict=True)
        )


@torch.no_grad()
def layer_diagnostics(
    model: nn.Module,
    before: MaskSnapshot | None = None,
    upcoming: Callable[[AdaptedLinear], AdaptedLinear] | None = None,
) -> dict[str, LayerDiagnostics]:
    """Measure every sparse layer, one after the other.

    Args:
        model: a model with weights; the meta device has none.
        before: masks at an earlier moment, to count flips.
        upcoming: gives a layer as the next optimizer step will find it, with masks that are
            refreshed by then; None measures the layers as they are.

    Returns:
        One entry per sparse layer, by name, in the model's order.
    """
    measured = {}
    for name, layer in adapted_layers(model):
        seen = layer if upcoming is None else upcoming(layer)
        measured[name] = _measure(name, seen, before)
    return measured


def total(layers: Mapping[str, LayerDiagnostics]) -> LayerDiagnostics:
    """Means over the layers, weighted by their number of weights.

    A layer where a number is not known takes no part in that number's mean.

    Args:
        layers: at least one.
    """
    means: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [(getattr(layer, column), layer.numel) for layer in layers.values()]
        known = [(value, numel) for value, numel in values if value is not None]
        weight = sum(numel for _, numel in known)
        means[column] = sum(value * numel for value, numel in known) / weight if known else None
    numel = sum(layer.numel for layer in layers.values())
    return LayerDiagnostics(numel, **means)  # type: ignore[arg-type]


def _measure(name: str, layer: AdaptedLinear, before: MaskSnapshot | None) -> LayerDiagnostics:
    keep_mask, backward = masks(layer)
    weight = layer.weight.detach() if isinstance(layer, PrunedLinear) else layer.to_dense()
    energy = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
    numbers = [
        keep_mask.sum(),
        backward.sum(),
        energy.sum(dtype=torch.float64),
        (energy * keep_mask).sum(dtype=torch.float64),
        (energy * backward).sum(dtype=torch.float64),
        *(before.flips(name, (keep_mask, backward)) if before is not None else ()),
    ]
    # The only place where a device is waited for.
    read = torch.stack([number.double() for number in numbers]).tolist()
    kept, kept_backward, whole, energy_kept, energy_backward, *flips = read
    numel = keep_mask.numel()
    chosen_once = isinstance(layer, SlopeLinear) or (
        isinstance(layer, PrunedLinear) and isinstance(layer.method, StaticWeight)
    )
    rates = [count / numel for count in flips] or [None, None]
    return LayerDiagnostics(
        numel=numel,
        density=kept / numel,
        density_backward=kept_backward / numel,
        imposed_sparsity=(kept - kept_backward) / numel,
        lemma=_lemma(layer),
        flip_rate=rates[0],
        column_flip_rate=rates[1],
        kept_energy=None if chosen_once else _ratio(energy_kept, whole),
        kept_energy_backward=_ratio(energy_backward, energy_kept),
        adapter_norm=_adapter_norm(layer.adapter, layer) if layer.adapter is not None else None,
    )


def _lemma(layer: AdaptedLinear) -> float | None:
    if isinstance(layer, PrunedLinear):
        if layer.method.sparsity is not None:
            return None
        again = not layer.dense and _pruned_again(layer) is not None
    else:
        assert isinstance(layer, SlopeLinear)
        again = layer.prune_backward
    return imposed_sparsity(layer.pattern) if again else 0.0


def _pruned_again(layer: PrunedLinear) -> int | None:
    """Dimension along which the method prunes the forward's weight again for the backward."""
    method = layer.method
    if isinstance(method, StaticWeight) and method.prune_backward:
        return 1
    if isinstance(method, DynamicWeight) and method.prune_backward:
        return 0
    return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _adapter_norm(adapter: Adapter, layer: AdaptedLinear) -> float | None:
    """‖scale · up · down‖ / ‖W‖; tr((upᵀup)(down downᵀ)) is the square of the first, R x R."""
    up, down = adapter.up.detach().double(), adapter.down.detach().double()
    # Rounding may leave a sum below 0 where the product vanishes.
    square = ((up.t() @ up) * (down @ down.t())).sum().clamp_min(0)
    norm = torch.linalg.vector_norm(layer.to_dense(), dtype=torch.float64)
    return _ratio(abs(adapter.scale) * float(square.sqrt()), float(norm))


# -- the constraints -------------------------------------------------------------------------------


@torch.no_grad()
def violations(model: nn.Module) -> dict[str, list[str]]:
    """What breaks the n:m constraints, layer by layer; empty if everything holds.

    SLoPe: metadata that describes exactly n kept per group of d_in, and a column mask with at most
    n of them per group of d_out. The other methods: the masks that they use now, as they promise.

    Args:
        model: a model with weights.

    Returns:
        For each layer with a broken constraint, by name, one sentence per constraint.
    """
    found = {}
    for name, layer in adapted_layers(model):
        if isinstance(layer, SlopeLinear):
            broken = _broken_compressed(layer)
        else:
            assert isinstance(layer, PrunedLinear)
            broken = [] if layer.dense else _broken_method(layer)
        if broken:
            found[name] = broken
    return found


def _broken_compressed(layer: SlopeLinear) -> list[str]:
    for name in ("metadata", "column_mask"):
        dtype = layer.get_buffer(name).dtype
        if dtype != torch.uint8:
            return [f"{name} is {dtype}, not torch.uint8"]
    try:
        check_metadata(layer.metadata, layer.pattern, layer.in_features)
    except ValueError as error:
        return [str(error).partition(";")[0]]
    keep_mask, backward = layer.keep_mask(), layer.column_keep_mask()
    broken = _wrong_groups("the row mask", keep_mask, 1, layer.pattern)
    if layer.prune_backward:
        broken += _wrong_groups("the column mask", backward, 0, layer.pattern, at_most=True)
    elif not torch.equal(keep_mask, backward):
        broken.append("the column mask drops kept weights, but the input gradient is to be exact")
    return broken


def _broken_method(layer: PrunedLinear) -> list[str]:
    keep_mask, backward = layer.masks()
    method, pattern = layer.method, layer.pattern
    broken: list[str] = []
    if isinstance(method, StaticWeight) and method.sparsity is not None:
        expected = int((100 - method.sparsity) * keep_mask.numel() / 100)
        kept = int(keep_mask.sum())
        if kept != expected:
            broken.append(
                f"the mask keeps {kept} of {keep_mask.numel()} weights, but {method.sparsity:g} % "
                f"zeros leave {expected}"
            )
    elif isinstance(method, StaticWeight):
        broken += _wrong_groups("the mask", keep_mask, 0, pattern)
    elif isinstance(method, DynamicWeight):
        broken += _wrong_groups("the row mask", keep_mask, 1, pattern)
    elif isinstance(method, FST):
        broken += _wrong_groups("the transposable mask", keep_mask, 1, pattern)
        broken += _wrong_groups("the transposable mask", keep_mask, 0, pattern)
    elif isinstance(method, SoftThreshold):
        broken += _wrong_groups("the mask", keep_mask, 1, pattern, at_most=True)
    elif isinstance(method, StaticInput) and bool(layer.get_buffer("chosen")):
        features = layer.get_buffer("feature_keep_mask")[None]
        broken += _wrong_groups("the feature mask", features, 1, pattern)
    again = _pruned_again(layer)
    if again is not None:
        broken += _wrong_groups("the backward's mask", backward, again, pattern, at_most=True)
    if bool((backward & ~keep_mask).any()):
        broken.append("the backward's mask keeps weights that the forward's prunes")
    return broken


def _wrong_groups(
    what: str, keep_mask: Tensor, dim: int, pattern: NMPattern, at_most: bool = False
) -> list[str]:
    """A sentence if some group of m along ``dim`` keeps another number than n."""
    counts = keep_mask.unflatten(dim, (-1, pattern.m)).sum(dim + 1)
    wrong = counts > pattern.n if at_most else counts != pattern.n
    if not bool(wrong.any()):
        return []
    first = torch.nonzero(wrong)[0].tolist()
    line, along = ("column", "d_out") if dim == 0 else ("row", "d_in")
    return [
        f"{what} keeps {int(counts[tuple(first)])} of {pattern.m} along {along} in {line} "
        f"{first[1 - dim]}, group {first[dim]}; {pattern} keeps "
        f"{'at most' if at_most else 'exactly'} {pattern.n} (broken groups: {int(wrong.sum())})"
    ]
