"""``slope bench layer``: the products of one linear layer, and the layer as a whole."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slope.bench import operands as shapes
from slope.bench.experiment import TIMES, Experiment, Lab
from slope.bench.operands import LayerCase, Operands
from slope.bench.results import Row, number
from slope.bench.timing import Call, Factory

DENSE, SLOPE, SERVED, TORCH, TORCHAO = "dense", "slope", "slope, frozen", "torch 2:4", "torchao"
_LAYER = "layer"


class LayerBench(Experiment):
    """Products, upkeep and whole layers of SLoPe, cuBLAS, torch and torchao."""

    name = "layer"
    about = "one linear layer: products, upkeep, forward + backward; cuBLAS, SLoPe, torch, torchao"
    case = LayerCase
    columns = ("what", *TIMES, "tflops", "gb_per_s")
    index = ("out_features", "in_features", "tokens", "mode")
    kinds = ("what", "contender", "mode")
    note = (
        "Each cell: median time, how many times as fast as dense (10th–90th percentile), time on "
        "the host; GB/s for upkeep. eager: as a user calls it; graph: kernels alone."
    )
    ylabel = "dense time / time"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Shapes, tokens, dtypes."""
        shapes.add_arguments(parser)
        parser.add_argument(
            "--precision", choices=("pure", "mixed"), default="pure",
            help="mixed: fp32 weights under autocast",
        )  # fmt: skip

    def cases(self) -> Sequence[LayerCase]:
        """Every shape at every token count."""
        tokens = (2048, 16384) if self.options.quick else (512, 2048, 16384)
        return shapes.cases(self.options, self.on_gpu, tokens if self.on_gpu else (32, 64))

    def measure(self, case: LayerCase, lab: Lab) -> Iterator[Row]:
        """The products, the upkeep, and the layer."""
        dtype = shapes.dtype_of(self.options, self.on_gpu)
        mixed = self.options.precision == "mixed"
        operands = Operands.random(case, lab.device, dtype, torch.float32 if mixed else dtype)
        flops = 2.0 * case.out_features * case.in_features * case.tokens
        whole = {_LAYER: _layers(operands, mixed)}
        for what, contenders in (_products(operands) | whole).items():
            work = flops * (3 if what == _LAYER else 1)
            for row in lab.compare(contenders, [DENSE]):
                time = row.get("median_us")
                yield {"what": what} | row | {"tflops": work / time * 1e-6 if time else None}
        for what, upkeep in shapes.upkeep(operands).items():
            for row in lab.compare({SLOPE: upkeep.factory}, []):
                yield {"what": what} | row | {"gb_per_s": upkeep.rate(row)}

    def across(self, row: Row) -> str:
        """The work and who does it."""
        return f"{row['what']}: {row['contender']}"

    def cell(self, row: Row) -> str:
        """Time, speed-up with its spread, host time; rate of bytes for upkeep."""
        text = f"{number(row['median_us'], 0)} µs"
        if row.get("speed_up") is not None and row["contender"] != DENSE:
            low, high = number(row["speed_up_low"]), number(row["speed_up_high"])
            text += f", {number(row['speed_up'])}× ({low}–{high})"
        if row.get("gb_per_s") is not None:
            text += f", {number(row['gb_per_s'], 0)} GB/s"
        return f"{text}, host {number(row['host_us'], 0)}" if row["mode"] == "eager" else text

    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """A panel per product and mode; the speed-up over shapes."""
        line = f"{row['contender']}, {row['tokens']} tokens"
        speed = row.get("speed_up") if row["contender"] != DENSE else None
        return f"{row['what']}, {row['mode']}", line, shapes.label(row), speed


def _products(operands: Operands) -> dict[str, dict[str, Factory]]:
    """The three products alone, without autograd."""
    layer, backend, dy = operands.layer, operands.backend, operands.dy
    x = operands.x.detach()
    weight = layer.compressed_weight()
    weight = weight._replace(values=layer.values.detach())
    dense = operands.linear.weight.detach().to(operands.dtype)

    def torch_sparse() -> Call:
        compressed = torch.sparse.to_sparse_semi_structured(operands.pruned())
        return lambda: nn.functional.linear(x, compressed)

    return {
        "forward": {
            DENSE: lambda: lambda: nn.functional.linear(x, dense),
            SLOPE: lambda: lambda: backend.forward(x, weight, None),
            SERVED: lambda: operands.served(0),
            TORCH: torch_sparse,
        },
        "input gradient": {
            DENSE: lambda: lambda: dy @ dense,
            SLOPE: lambda: lambda: backend.input_gradient(dy, weight),
        },
        "weight gradient": {
            DENSE: lambda: lambda: dy.t() @ x,
            SLOPE: lambda: lambda: backend.values_gradient(dy, x, weight),
        },
    }


def _layers(operands: Operands, mixed: bool) -> dict[str, Factory]:
    """Forward and both gradients through autograd."""
    x, dy = operands.x, operands.dy

    def whole(make: Callable[[], nn.Module]) -> Factory:
        def prepare() -> Call:
            module = make()
            trained = [x, *(p for p in module.parameters() if p.requires_grad)]

            def call() -> tuple[Tensor, ...]:
                with torch.autocast(x.device.type, x.dtype) if mixed else nullcontext():
                    y = module(x)
                return torch.autograd.grad(y, trained, dy)

            return call

        return prepare

    def torch_sparse() -> nn.Module:
        module = nn.Linear(1, 1, bias=False, device=x.device, dtype=x.dtype)
        compressed = torch.sparse.to_sparse_semi_structured(operands.pruned())
        module.weight = nn.Parameter(compressed)
        return module

    def torchao() -> nn.Module:
        from torchao.sparsity.training import SemiSparseLinear

        module: nn.Module = SemiSparseLinear.from_dense(operands.linear)
        return module

    return {
        DENSE: whole(lambda: operands.linear),
        SLOPE: whole(lambda: operands.layer),
        TORCH: whole(torch_sparse),
        TORCHAO: whole(torchao),
    }
