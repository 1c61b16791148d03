"""Measured rates of dense and 2:4 products, and how they are carried over to other shapes.

Shape letters: T tokens, I = d_in, O = d_out.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slope.spelling import did_you_mean

_FILE = Path(__file__).with_name("rates.yaml")


@dataclass(frozen=True)
class Gpu:
    """What ``rates.yaml`` says of a GPU.

    Attributes:
        key: its name on the command line.
        name: its full name.
        memory: bytes.
        bandwidth: peak bytes of memory per second.
        dense_flops: peak of dense bf16 tensor products per second.
        link: bytes per second and direction to the other GPUs of a host.
        measured: whether the rates were measured on this GPU; else they are scaled by peak.
        source: of the peaks.
        attention_share: share of the dense peak that fused attention reaches.
        attention_source: of ``attention_share``.
    """

    key: str
    name: str
    memory: float
    bandwidth: float
    dense_flops: float
    link: float
    measured: bool
    source: str
    attention_share: float
    attention_source: str


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU.

    Attributes:
        gpu: which.
        measured_on: the GPU of the measurements.
        measurement: where, when, with what and how.
        bandwidth: bytes per second that a copy reads and writes.
        usable_memory: bytes that a run may plan with.
        tokens: T of each speed-up in ``layers``.
        layers: rows of the table that was measured.
    """

    gpu: Gpu
    measured_on: Gpu
    measurement: str
    bandwidth: float
    usable_memory: float
    tokens: Sequence[int]
    layers: Sequence[dict[str, Any]]

    def is_measured(self, out_features: int, in_features: int) -> bool:
        """Whether this very shape is in the table."""
        return len(self._rows(out_features, in_features)) == 1

    def dense_flops(self, out_features: int, in_features: int) -> float:
        """FLOPs per second of a dense product of many tokens.

        That of the layer if it was measured, else interpolated over log(O I).
        """
        rates = (
            (
                row["out"] * row["in"],
                2e6 * row["out"] * row["in"] * self.tokens[-1] / row["dense_us"],
            )
            for row in self._rows(out_features, in_features)
        )
        scale = self.gpu.dense_flops / self.measured_on.dense_flops
        return scale * _interpolate(out_features * in_features, rates)

    def speed_up(self, product: str, out_features: int, in_features: int, tokens: int) -> float:
        """Dense time / time of the 2:4 kernel.

        That of the layer if it was measured, else interpolated over log(min(O, I)); over log(T) in
        any case.

        Args:
            product: ``"forward"`` or ``"input_gradient"``.
            out_features: O.
            in_features: I.
            tokens: T.
        """
        ratios = (
            (
                min(row["out"], row["in"]),
                _interpolate(tokens, zip(self.tokens, row[product], strict=True)),
            )
            for row in self._rows(out_features, in_features)
        )
        return _interpolate(min(out_features, in_features), ratios)

    def _rows(self, out_features: int, in_features: int) -> Sequence[dict[str, Any]]:
        """The row of a shape that was measured, or all."""
        shape = out_features, in_features
        return [row for row in self.layers if (row["out"], row["in"]) == shape] or self.layers


def _interpolate(x: float, points: Iterable[tuple[int, float]]) -> float:
    """Linear over log(x) between the means of points of equal x, constant beyond the ends."""
    groups = defaultdict(list)
    for at, value in points:
        groups[at].append(value)
    known = sorted(groups)
    means = [np.mean(groups[at]) for at in known]
    return float(np.interp(np.log(x), np.log(known), means))


def gpus() -> list[str]:
    """Names of the GPUs that are known."""
    return list(_table()["gpus"])


def rates_of(name: str) -> Rates:
    """Rates of a GPU.

    Args:
        name: as on the command line, in any case.

    Raises:
        ValueError: for a GPU that is not known.
    """
    table = _table()
    made = {key: Gpu(key, **row) for key, row in table["gpus"].items()}
    if name.lower() not in made:
        raise ValueError(
            f"gpu={name!r} is unknown{did_you_mean(name, made, 'gpu={}')} Known: {', '.join(made)}."
        )
    gpu = made[name.lower()]
    measured_on = next(other for other in made.values() if other.measured)
    return Rates(
        gpu=gpu,
        measured_on=measured_on,
        measurement=table["measurement"],
        bandwidth=table["copy"] * gpu.bandwidth / measured_on.bandwidth,
        usable_memory=table["usable_memory"] * gpu.memory,
        tokens=table["tokens"],
        layers=table["layers"],
    )


@functools.cache
def _table() -> dict[str, Any]:
    from omegaconf import OmegaConf

    table: Any = OmegaConf.to_container(OmegaConf.load(_FILE))
    return {str(key): value for key, value in table.items()}
