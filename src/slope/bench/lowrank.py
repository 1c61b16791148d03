"""``slope bench lowrank``: how far a thin product is from the time that its FLOPs would take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slope.bench import operands as shapes
from slope.bench.experiment import TIMES, Experiment, Lab
from slope.bench.operands import LayerCase, Operands
from slope.bench.options import ratios
from slope.bench.results import Row, number
from slope.bench.timing import Call, Factory

DOWN, ADAPTER, LAYER = "down product", "adapter", "layer with adapter"
_PAPER_SHAPES = tuple(f"{d}x{d}" for d in (768, 1024, 2048, 2560, 4096, 5120, 7168, 9216))


class LowrankBench(Experiment):
    """A thin product, a whole adapter, and a layer with an adapter, over ranks."""

    name = "lowrank"
    about = "time of a low-rank adapter against its rank: how little of a device thin products use"
    case = LayerCase
    columns = ("what", "rank_ratio", "rank", *TIMES, "ideal")
    index = ("out_features", "in_features", "tokens", "mode", "what")
    kinds = ("what", "contender", "mode")
    note = (
        "Each cell: median time, speed-up over the full product and, in brackets, the one that "
        "FLOPs alone would give; of the layer: over the sparse layer without adapter."
    )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        default = (0.01, 0.02, 0.05, 0.1) if self.on_gpu else (0.0625, 0.25)
        self.ratios = ratios(options.ranks, default)
        if 0 in self.ratios:
            raise ValueError(f"--ranks {options.ranks}: a rank of 0 has no product; leave it out.")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Shapes, tokens, dtype, ranks."""
        shapes.add_arguments(parser)
        parser.add_argument("--ranks", metavar="R,…", help="as ratios of d_in")

    def cases(self) -> Sequence[LayerCase]:
        """Square layers of the paper's widths at 2048 tokens."""
        tokens = (2048,) if self.on_gpu else (32,)
        return shapes.cases(self.options, self.on_gpu, tokens, _PAPER_SHAPES)

    def measure(self, case: LayerCase, lab: Lab) -> Iterator[Row]:
        """Speed-ups against the full product, and of the layer against the one without adapter."""
        dtype = shapes.dtype_of(self.options, self.on_gpu)
        operands = Operands.random(case, lab.device, dtype, dtype)
        out, in_ = case.out_features, case.in_features
        full, works = _full(operands), _works(operands)
        by_flops: dict[str, Callable[[int], float]] = {
            DOWN: lambda rank: out / rank, ADAPTER: lambda rank: out * in_ / (rank * (out + in_))
        }  # fmt: skip
        named = {f"r={ratio:g}": max(1, round(ratio * in_)) for ratio in self.ratios}
        chosen = dict(zip(named, self.ratios, strict=True))
        for what, make in works.items():
            base = "without" if what == LAYER else "full product"
            factories: dict[str, Factory] = {base: lambda: operands.served(0)}
            if what != LAYER:
                factories[base] = lambda: full
            for name, rank in named.items():
                factories[name] = lambda make=make, rank=rank: make(rank)  # type: ignore[misc]
            for row in lab.compare(factories, [base]):
                name = row["contender"]
                ideal = by_flops[what](named[name]) if name in named and what != LAYER else None
                where = {"rank_ratio": chosen.get(name), "rank": named.get(name), "ideal": ideal}
                yield {"what": what} | row | where

    def cell(self, row: Row) -> str:
        """Time, measured and ideal speed-up."""
        ideal = row.get("ideal")
        return super().cell(row) + (f" ({number(ideal, 1)}×)" if ideal else "")

    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """Speed-up over the rank's ratio, a line per width."""
        speed = row.get("speed_up") if row["rank"] else None
        return f"{row['what']}, {row['mode']}", shapes.label(row), row["rank_ratio"], speed


def _full(operands: Operands) -> Call:
    x, weight = operands.x.detach(), operands.linear.weight.detach()
    return lambda: nn.functional.linear(x, weight)


def _works(operands: Operands) -> dict[str, Callable[[int], Call]]:
    """What is done with a rank: the down-projection, the adapter as torch does it, the layer."""
    x, out_features = operands.x.detach(), operands.layer.out_features
    linear = nn.functional.linear

    def down(rank: int) -> Call:
        thin = torch.randn(rank, x.shape[1], device=x.device, dtype=x.dtype)
        return lambda: linear(x, thin)

    def adapter(rank: int) -> Call:
        thin = torch.randn(rank, x.shape[1], device=x.device, dtype=x.dtype)
        up = torch.randn(out_features, rank, device=x.device, dtype=x.dtype)
        return lambda: linear(linear(x, thin), up)

    return {DOWN: down, ADAPTER: adapter, LAYER: operands.served}
