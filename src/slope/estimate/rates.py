"""Measured rates of dense and 2:4 products, and how they are carried over to other shapes.

Shape letters: T tokens, I = d_in, O = d_out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope.configs import nearest

_FILE = Path(__file__).with_name("rates.yaml")


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet, and what is assumed of it.

    Attributes:
        key: its name on the command line.
        name: its full name.
        memory: bytes.
        bandwidth: peak bytes of memory per second.
        dense_flops: peak of dense bf16 tensor products per second.
        link: bytes per second and direction to the other GPUs of a host.
        attention_share: share of the dense peak that fused attention reaches.
        measured: whether the rates were measured on this GPU; else they are scaled by peak.
        source: of the peaks.
        attention_source: of ``attention_share``.
    """

    key: str
    name: str
    memory: float
    bandwidth: float
    dense_flops: float
    link: float
    attention_share: float
    measured: bool
    source: str
    attention_source: str

    @property
    def caveat(self) -> str | None:
        """What to think of times for a GPU that was not measured."""
        if self.measured:
            return None
        return (
            f"{self.name}: not measured by us: scaled by peak from one H200, with that one's 2:4 "
            "speed-ups."
        )


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU.

    Attributes:
        gpu: which.
        bandwidth: bytes per second that elementwise work moves.
        usable_memory: bytes that a run may plan with.
        measurement: device, date, software and method of what was measured.
    """

    gpu: Gpu
    bandwidth: float
    usable_memory: float
    measurement: Mapping[str, str]
    _scale: float
    _tokens: Sequence[int]
    _layers: Sequence[Mapping[str, Any]]

    def dense_flops(self, out_features: int, in_features: int) -> float:
        """FLOPs per second of a dense product.

        That of the measured layer, or interpolated in log(O I) between the sizes measured; beyond
        the ends that of the end. Measured at 16 384 tokens, used at any number.
        """
        sizes: dict[int, list[float]] = {}
        for layer in self._layers:
            size = layer["out"] * layer["in"]
            rate = 2.0 * size * self._tokens[-1] / (layer["dense_us"] * 1e-6)
            if (layer["out"], layer["in"]) == (out_features, in_features):
                return rate * self._scale
            sizes.setdefault(size, []).append(rate)
        curve = {size: math.fsum(rates) / len(rates) for size, rates in sizes.items()}
        return interpolate(out_features * in_features, curve) * self._scale

    def speed_up(self, product: str, out_features: int, in_features: int, tokens: int) -> float:
        """Dense time / time of the 2:4 kernel.

        That of the measured layer, or interpolated in log(min(O, I)) between the means of the
        layers measured; in log(T) between the token counts measured. Constant beyond the ends.

        Args:
            product: ``"forward"`` or ``"input_gradient"``.
            out_features: O.
            in_features: I.
            tokens: T.
        """
        widths: dict[int, list[float]] = {}
        for layer in self._layers:
            curve = dict(zip(self._tokens, layer[product], strict=True))
            ratio = interpolate(tokens, curve)
            if (layer["out"], layer["in"]) == (out_features, in_features):
                return ratio
            widths.setdefault(min(layer["out"], layer["in"]), []).append(ratio)
        means = {width: math.fsum(ratios) / len(ratios) for width, ratios in widths.items()}
        return interpolate(min(out_features, in_features), means)

    def is_measured(self, out_features: int, in_features: int) -> bool:
        """Whether this very shape is in the table."""
        return any((row["out"], row["in"]) == (out_features, in_features) for row in self._layers)


def interpolate(x: float, curve: Mapping[int, float]) -> float:
    """The curve at ``x``, linear in log(x) between its points, constant beyond its ends.

    Example:
        >>> interpolate(1024, {512: 1.0, 2048: 2.0})
        1.5
    """
    points = sorted(curve)
    if x <= points[0]:
        return curve[points[0]]
    if x >= points[-1]:
        return curve[points[-1]]
    right = next(index for index, point in enumerate(points) if point >= x)
    if points[right] == x:
        return curve[points[right]]
    low, high = points[right - 1], points[right]
    share = math.log(x / low) / math.log(high / low)
    return curve[low] + share * (curve[high] - curve[low])


def gpus() -> list[str]:
    """Names of the GPUs that are known."""
    return list(_table()["gpus"])


def rates_of(name: str) -> Rates:
    """Rates of a GPU.

    Args:
        name: as on the command line, in any case; ``a100`` is the one with 80 GB.

    Raises:
        ValueError: for a GPU that is not known.
    """
    table = _table()
    wanted = str(name).lower()
    key = table["aliases"].get(wanted, wanted)
    if key not in table["gpus"]:
        known = [*table["gpus"], *table["aliases"]]
        raise ValueError(
            f"gpu={name!r} is unknown; did you mean gpu={nearest(wanted, known)}? Known: "
            f"{', '.join(known)}."
        )
    row = table["gpus"][key]
    gpu = Gpu(
        key=key,
        name=row["name"],
        memory=row["memory_gb"] * 1e9,
        bandwidth=row["bandwidth_tbs"] * 1e12,
        dense_flops=row["dense_tflops"] * 1e12,
        link=row["link_gbs"] * 1e9,
        attention_share=row["attention_share"],
        measured=row["measured"],
        source=row["source"],
        attention_source=row["attention_source"],
    )
    reference = next(other for other in table["gpus"].values() if other["measured"])
    copy_share = table["copy_tbs"] / reference["bandwidth_tbs"]
    return Rates(
        gpu=gpu,
        bandwidth=gpu.bandwidth * copy_share,
        usable_memory=gpu.memory * table["usable_memory"],
        measurement=table["measurement"],
        _scale=row["dense_tflops"] / reference["dense_tflops"],
        _tokens=table["tokens"],
        _layers=table["layers"],
    )


@functools.cache
def _table() -> dict[str, Any]:
    from omegaconf import OmegaConf

    table: Any = OmegaConf.to_container(OmegaConf.load(_FILE))
    return {str(key): value for key, value in table.items()}
