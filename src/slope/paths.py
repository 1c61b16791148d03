"""Who would multiply each layer of a model here, and why: ``slope inspect --backend``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from slope.backends import ops
from slope.backends.support import why_no_kernels
from slope.linear import SlopeLinear
from slope.pattern import NMPattern
from slope.sparsity import LayerReport


@dataclass(frozen=True)
class PathReport:
    """How the sparse layers of one shape are multiplied.

    Attributes:
        shape: ``"d_out x d_in"``.
        pattern: their N:M pattern.
        layers: how many there are.
        forward: path of the forward.
        input_gradient: path of the input gradient.
        reason: why, in one line.
    """

    shape: str
    pattern: str
    layers: int
    forward: str
    input_gradient: str
    reason: str

    def row(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def explain(
    layers: Sequence[LayerReport], tokens: int, dtype: torch.dtype = torch.bfloat16
) -> list[PathReport]:
    """What ``backend="auto"`` does with sparse layers, a line per shape and pattern.

    On a GPU each product is measured once if nobody has done so before; elsewhere the reason says
    why there is no choice.

    Args:
        layers: of a report; dense ones and those of other methods are left out.
        tokens: per micro-batch.
        dtype: of the products.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = Counter(
        (layer.out_features, layer.in_features, layer.pattern)
        for layer in layers
        if layer.pattern is not None and layer.method == "slope"
    )
    return [
        _explain(out_features, in_features, pattern, count, tokens, dtype, device)
        for (out_features, in_features, pattern), count in counts.items()
        if pattern is not None
    ]


def _explain(
    out_features: int,
    in_features: int,
    pattern: NMPattern,
    count: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PathReport:
    names = f"{out_features} x {in_features}", str(pattern), count
    reason = why_no_kernels(pattern, dtype, device)
    if reason is not None:
        return PathReport(*names, "dense", "dense", reason)
    layer = SlopeLinear(
        in_features, out_features, pattern=pattern, bias=False, device=device, dtype=dtype
    )
    choices = ops.explain(layer.compressed_weight(), tokens, dtype)
    forward, gradient = choices["forward"], choices["input_gradient"]
    reason = f"forward: {forward.reason()}; input gradient: {gradient.reason()}"
    return PathReport(*names, forward.path, gradient.path, reason)
