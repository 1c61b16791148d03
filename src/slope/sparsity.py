"""Which layers of a model are sparse, how, and what they weigh: a report and its table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slope.layers import adapter_parameters, is_linear_like, linear_shape, obstacle
from slope.linear import AdaptedLinear, SlopeLinear, dense_weight
from slope.methods import PrunedLinear
from slope.pattern import NMPattern

_SLOPE = "slope"  # the method of a layer that is none of `slope.methods`


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        name: module path.
        in_features: d_in.
        out_features: d_out.
        pattern: its N:M pattern, or None if it stayed dense or its mask is unstructured.
        reason: why it stayed dense, or None.
        numel_dense: weights before.
        numel_stored: weights stored now, adapters not counted. The methods that SLoPe is compared
            with store all.
        bytes_dense: bytes of the dense weight in its dtype.
        bytes_stored: bytes of values, metadata and column mask, or of weight and masks.
        rank: of its adapter, 0 without.
        method: what prunes it, or None if it stayed dense.
        sparsity: percent of zeros of an unstructured mask, else None.
    """

    name: str
    in_features: int
    out_features: int
    pattern: NMPattern | None
    reason: str | None
    numel_dense: int
    numel_stored: int
    bytes_dense: int
    bytes_stored: int
    rank: int = 0
    method: str | None = None
    sparsity: float | None = None

    @property
    def kind(self) -> str:
        """``"2:4"``, ``"50%"`` for an unstructured mask, or ``"dense"``."""
        if self.sparsity is not None:
            return f"{self.sparsity:g}%"
        return str(self.pattern or "dense")

    @property
    def note(self) -> str:
        """Why it stayed dense; else its method, if it is not SLoPe, and its adapter."""
        if self.reason:
            return self.reason
        notes = [] if self.method in (None, _SLOPE) else [str(self.method)]
        if self.rank:
            notes.append(f"adapter rank {self.rank}")
        return ", ".join(notes)


@dataclass(frozen=True)
class SparsityReport:
    """What :func:`sparsify` did, layer by layer; ``str`` gives the summary and a table.

    Attributes:
        layers: one report per linear layer, in the model's order.
        parameters_dense: parameters of the dense model, adapters not counted.
        parameters_stored: parameters now, adapters included.
    """

    layers: tuple[LayerReport, ...]
    parameters_dense: int
    parameters_stored: int

    @property
    def sparse(self) -> list[LayerReport]:
        """The sparse layers, of whatever method."""
        return [layer for layer in self.layers if layer.method is not None]

    @property
    def weight_bytes_sparse_layers(self) -> int:
        """Bytes of weights and masks of the sparse layers, in the form they are stored in."""
        return sum(layer.bytes_stored for layer in self.sparse)

    @property
    def weight_bytes_dense_equivalent(self) -> int:
        """Bytes of the same layers' weights, were they dense."""
        return sum(layer.bytes_dense for layer in self.sparse)

    def summary(self) -> str:
        """One line: how many layers, which patterns, how many parameters."""
        kinds = sorted({layer.kind for layer in self.sparse}) or ["none"]
        kinds += sorted({str(layer.method) for layer in self.sparse} - {_SLOPE})
        return (
            f"sparsified {len(self.sparse)} of {len(self.layers)} linear layers "
            f"({', '.join(kinds)}), "
            f"{_count(self.parameters_dense)} -> {_count(self.parameters_stored)} parameters"
        )

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [self.summary(), f"  {'layer':<{width}}  {'d_out x d_in':>14}  pattern  note"]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            row = f"  {layer.name:<{width}}  {shape:>14}  {layer.kind:<7}  {layer.note}"
            lines.append(row.rstrip())
        return "\n".join(lines)


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Report on a model as it is, sparse or dense."""
    return report_with(model, {})


def report_with(model: nn.Module, reasons: dict[str, str | None]) -> SparsityReport:
    """Report on a model; ``reasons`` say by name why a layer stayed dense."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            layers.append(_report_sparse(name, module))
        elif is_linear_like(module):
            layers.append(_report_dense(name, module, reasons.get(name)))
    total = sum(parameter.numel() for parameter in model.parameters())
    adapter_total = sum(parameter.numel() for parameter in adapter_parameters(model))
    saved = sum(layer.numel_dense - layer.numel_stored for layer in layers)
    return SparsityReport(tuple(layers), total - adapter_total + saved, total)


def _report_dense(name: str, module: nn.Module, reason: str | None) -> LayerReport:
    why = obstacle(module)
    out_features, in_features = linear_shape(module) if why else dense_weight(module).shape
    numel = out_features * in_features
    size = numel * next((p.element_size() for p in module.parameters()), 0)
    return LayerReport(
        name=name,
        in_features=in_features,
        out_features=out_features,
        pattern=None,
        reason=reason or why,
        numel_dense=numel,
        numel_stored=numel,
        bytes_dense=size,
        bytes_stored=size,
    )


def _report_sparse(name: str, layer: AdaptedLinear) -> LayerReport:
    stored = layer.stored()
    numel = layer.in_features * layer.out_features
    masks = sum(b.numel() * b.element_size() for b in layer.buffers(recurse=False))
    method = layer.method if isinstance(layer, PrunedLinear) else None
    sparsity = method.sparsity if method is not None else None
    own = _SLOPE if isinstance(layer, SlopeLinear) else None  # a dense layer may have an adapter
    return LayerReport(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        pattern=layer.pattern if sparsity is None else None,
        reason=None,
        numel_dense=numel,
        numel_stored=stored.numel(),
        bytes_dense=numel * stored.element_size(),
        bytes_stored=stored.numel() * stored.element_size() + masks,
        rank=layer.adapter.rank if layer.adapter is not None else 0,
        method=method.note if method is not None else own,
        sparsity=sparsity,
    )


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
