"""``slope bench setup``: what a sparse weight costs beside its products, against copy speed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slope.bench import operands as shapes
from slope.bench.experiment import TIMES, Experiment, Lab
from slope.bench.operands import LayerCase, Operands, Upkeep
from slope.bench.results import Row, number
from slope.compressed import compress

_PRODUCT, _COPY = "dense product", "copy"


class SetupBench(Experiment):
    """Compressing, packing, refreshing and gathering against one dense product and a copy."""

    name = "setup"
    about = "cost of compressing, packing and refreshing a weight, against one product and a copy"
    case = LayerCase
    columns = (*TIMES, "moved_bytes", "gb_per_s", "of_copy")
    index = ("out_features", "in_features", "tokens", "mode")
    note = "Each cell: median time, in products of the first column, share of copy speed."
    ylabel = "dense products that take as long"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Shapes, tokens of the product, dtype."""
        shapes.add_arguments(parser)

    def cases(self) -> Sequence[LayerCase]:
        """Every shape, with a product of 2048 tokens, as in the paper."""
        return shapes.cases(self.options, self.on_gpu, (2048,) if self.on_gpu else (32,))

    def measure(self, case: LayerCase, lab: Lab) -> Iterator[Row]:
        """All in turns; the speed-up column is product time / own time."""
        dtype = shapes.dtype_of(self.options, self.on_gpu)
        operands = Operands.random(case, lab.device, dtype, dtype)
        x, weight = operands.x.detach(), operands.linear.weight.detach()
        works = {_PRODUCT: Upkeep(lambda: nn.functional.linear(x, weight), 0), **_works(operands)}
        rows = lab.compare({name: work.factory for name, work in works.items()}, [_PRODUCT])
        copies = {row["mode"]: row.get("median_us") for row in rows if row["contender"] == _COPY}
        for row in rows:
            moved, copy = works[row["contender"]].moved, copies[row["mode"]]
            if moved and "median_us" in row:
                row["moved_bytes"], row["gb_per_s"] = moved, moved / row["median_us"] * 1e-3
                if copy:
                    row["of_copy"] = row["gb_per_s"] / (works[_COPY].moved / copy * 1e-3)
            yield row

    def cell(self, row: Row) -> str:
        """Time, products, share of copy speed."""
        text = f"{number(row['median_us'], 0)} µs"
        if row.get("of_copy") is not None and row.get("speed_up"):
            text += f", {number(1 / row['speed_up'])} products, {number(row['of_copy'])} of copy"
        return text

    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """Cost in products over shapes."""
        speed = row.get("speed_up")
        return row["mode"], row["contender"], shapes.label(row), 1 / speed if speed else None


def _works(operands: Operands) -> dict[str, Upkeep]:
    layer, dtype = operands.layer, operands.dtype
    source, target = operands.pruned(), torch.empty_like(operands.pruned())
    keep_mask = layer.keep_mask()
    size, stored = source.nbytes, layer.values.nbytes + layer.metadata.nbytes
    found = {
        _COPY: Upkeep(lambda: target.copy_(source), 2 * size),
        "compress": Upkeep(
            lambda: compress(source, keep_mask, layer.pattern), size + keep_mask.nbytes + stored
        ),
        **shapes.upkeep(operands),
    }
    if not source.is_cuda:
        return found
    from slope.backends.cusparselt import kernels

    values, metadata, column_mask = layer.values.detach(), layer.metadata, layer.column_mask
    packed = size // 16 * 9
    return found | {
        "gather": Upkeep(lambda: kernels.gather_gradient(source, metadata, dtype), size + stored),
        "expand": Upkeep(
            lambda: kernels.expand(values, metadata, column_mask, dtype),
            stored + column_mask.nbytes + size,
        ),
        "cuSPARSELt compress": Upkeep(lambda: torch._cslt_compress(source), size + packed),
        "torch to_sparse": Upkeep(
            lambda: torch.sparse.to_sparse_semi_structured(source), size + packed
        ),
    }
