"""Single linear layers to measure: shapes, random operands, and work beside the products.

Shape letters: T tokens, I = d_in, O = d_out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import slope
from slope.backends import Backend, get_backend
from slope.bench.experiment import Case
from slope.bench.options import counts
from slope.bench.results import Row
from slope.bench.timing import Call

# O x I of attention, up and down projections of the paper's models.
SHAPES = (
    "3072x768", "768x3072", "2304x768",  # GPT-2 small
    "6400x1600",  # GPT-2 XL
    "2560x2560",  # OPT-2.7B
    "4096x4096", "16384x4096", "4096x16384",  # OPT-6.7B
    "14336x4096", "4096x14336",  # LLaMA-3-8B, Mistral-7B
    "20480x5120",  # OPT-13B
    "28672x7168",  # OPT-30B
    "9216x9216", "36864x9216",  # OPT-66B
)  # fmt: skip
_QUICK_SHAPES = ("3072x768", "4096x4096", "14336x4096", "4096x14336")
_CPU_SHAPES = ("64x64", "128x64")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LayerCase(Case):
    """A shape and a number of tokens."""

    out_features: int
    in_features: int
    tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose single layers."""
    parser.add_argument("--shapes", metavar="OxI,…", help="d_out x d_in, comma-separated")
    parser.add_argument("--tokens", metavar="T,…", help="token counts, comma-separated")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="of the products")


def dtype_of(options: argparse.Namespace, on_gpu: bool) -> torch.dtype:
    """The dtype asked for, else the one that the device is used with."""
    return _DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]


def cases(
    options: argparse.Namespace,
    on_gpu: bool,
    tokens: Sequence[int],
    default: Sequence[str] = SHAPES,
) -> list[LayerCase]:
    """Every shape at every token count.

    Args:
        options: of the command.
        on_gpu: whether the defaults are a GPU's.
        tokens: counts if none are asked for.
        default: a GPU's shapes if none are asked for.

    Raises:
        ValueError: for a shape or count that cannot be read.
    """
    if not on_gpu:
        default = _CPU_SHAPES
    elif options.quick:
        default = _QUICK_SHAPES
    chosen = options.shapes.split(",") if options.shapes else default
    wanted = counts(options.tokens, tokens, "tokens")
    return [LayerCase(*parse_shape(shape), count) for shape in chosen for count in wanted]


def parse_shape(text: str) -> tuple[int, int]:
    """``"O x I"`` as numbers.

    Raises:
        ValueError: if it is not of that form, or not divisible by 16, which 2:4 metadata needs.

    Example:
        >>> parse_shape("4096x1024")
        (4096, 1024)
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if found is None or int(found[1]) % 16 or int(found[2]) % 16:
        raise ValueError(
            f"shape {text!r} is not d_out x d_in, both multiples of 16; write for example "
            "4096x4096."
        )
    return int(found[1]), int(found[2])


def label(row: Row) -> str:
    """A row's shape, for an axis."""
    return f"{row['out_features']}x{row['in_features']}"


@dataclass
class Operands:
    """A dense layer, the sparse layer with the same kept weights, and tensors to multiply.

    Attributes:
        linear: dense, no bias.
        layer: SLoPe's.
        x: (T, I).
        dy: (T, O).
        backend: ``"auto"``.
        dtype: of the products.
    """

    linear: nn.Linear
    layer: slope.SlopeLinear
    x: Tensor
    dy: Tensor
    backend: Backend
    dtype: torch.dtype

    @classmethod
    def random(
        cls, case: LayerCase, device: torch.device, dtype: torch.dtype, values_dtype: torch.dtype
    ) -> Operands:
        """Normal random numbers, which a chip draws power for, unlike zeros.

        Args:
            case: O, I and T.
            device: of all.
            dtype: of the products.
            values_dtype: of the parameters of both layers.
        """
        torch.manual_seed(0)
        out_features, in_features = case.out_features, case.in_features
        linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=values_dtype)
        x = torch.randn(case.tokens, in_features, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(case.tokens, out_features, device=device, dtype=dtype)
        layer = slope.SlopeLinear.from_linear(linear)
        return cls(linear, layer, x, dy, get_backend("auto"), dtype)

    def pruned(self) -> Tensor:
        """W^R with its zeros in the dtype of the products, (O, I)."""
        return self.layer.to_dense().to(self.dtype)

    def served(self, rank: int) -> Call:
        """The forward of a frozen layer, with an active adapter unless the rank is 0."""
        x = self.x.detach()
        layer = slope.SlopeLinear.from_linear(self.linear).to(self.dtype).eval()
        if rank:
            layer.add_adapter(rank)
            slope.activate_adapters(layer)
        layer.requires_grad_(False)
        return torch.inference_mode()(lambda: layer(x))


@dataclass(frozen=True)
class Upkeep:
    """Work of a sparse layer that no dense one has.

    Attributes:
        call: does it once.
        moved: bytes read and written, the least that it can cost.
    """

    call: Call
    moved: int

    def factory(self) -> Call:
        """The call, for :meth:`slope.bench.experiment.Lab.compare`."""
        return self.call

    def rate(self, row: Row) -> float | None:
        """GB/s in a timed row."""
        return self.moved / row["median_us"] * 1e-3 if "median_us" in row else None


def upkeep(operands: Operands) -> Mapping[str, Upkeep]:
    """The column mask's refresh and the packing of both operands, by name.

    On a GPU the packing kernels; elsewhere the expansion that the reference multiplies with.
    """
    layer, dtype, backend = operands.layer, operands.dtype, operands.backend
    weight = layer.compressed_weight()
    weight = weight._replace(values=layer.values.detach())
    values, metadata, column_mask = weight.values, weight.metadata, weight.column_mask
    stored = values.nbytes + metadata.nbytes
    masked = stored + column_mask.nbytes
    size = layer.out_features * layer.in_features * dtype.itemsize
    refresh = {"column mask": Upkeep(lambda: backend.refresh_column_mask(weight), masked)}
    if not values.is_cuda:
        return refresh | {
            "expand": Upkeep(lambda: backend.expand(weight, dtype), masked + 2 * size)
        }
    from slope.backends.cusparselt import kernels

    packed = size // 16 * 9
    return refresh | {
        "pack rows": Upkeep(lambda: kernels.pack_rows(values, metadata, dtype), stored + packed),
        "pack columns": Upkeep(
            lambda: kernels.pack_columns(values, metadata, column_mask, dtype), masked + packed
        ),
    }
