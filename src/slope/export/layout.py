"""How one sparse layer lies in the file: the sparse-24-bitmask layout, for any n:m.

For a layer named L of shape (O, I), with K = I*n/m values kept per row:

| tensor              | shape            | dtype | meaning                                    |
|---------------------|------------------|-------|--------------------------------------------|
| L.compressed        | (O, K)           | float | kept weights, row-major                    |
| L.bitmask           | (O, ceil(I / 8)) | uint8 | row mask, little-endian bits, 1 = kept     |
| L.shape             | (2, 1)           | int64 | O, I                                       |
| L.column_mask       | (O, ceil(K / 8)) | uint8 | which kept weights the input gradient uses |
| L.bias              | (O,)             | float | as the layer has it                        |
| L.adapter.down, .up | (R, I), (O, R)   | float | as the layer has it                        |

2:4 in bf16 takes 0.5625 of the dense bytes, plus 1/32 for the column mask, which only training
reads. The first three names and layouts are those of compressed-tensors; a reader of that format
finds what it expects for 2:4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slope.compressed import compress, decompress, pack_bits, unpack_bits
from slope.linear import SlopeLinear
from slope.pattern import NMPattern

FORMAT = "slope"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
SLOPE_FILE = "slope.json"
CONFIG_FILE = "config.json"


def join(name: str, leaf: str) -> str:
    """Name of a tensor of the module ``name``; the root module has an empty name."""
    return f"{name}.{leaf}" if name else leaf


def describe(layer: SlopeLinear) -> dict[str, Any]:
    """The entry of one layer in `slope.json`."""
    adapter = layer.adapter
    return {
        "pattern": str(layer.pattern),
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "column_mask_interval": layer.column_mask_interval,
        "prune_backward": layer.prune_backward,
        "origin": layer.origin,
        "adapter": None
        if adapter is None
        else {"rank": adapter.rank, "scale": adapter.scale, "active": adapter.active},
    }


def layer_from(entry: dict[str, Any], dtype: torch.dtype, backend: str) -> SlopeLinear:
    """A layer without storage (meta device) as an entry of `slope.json` describes it."""
    layer = SlopeLinear(
        int(entry["in_features"]),
        int(entry["out_features"]),
        bias=bool(entry["bias"]),
        pattern=NMPattern.parse(entry["pattern"]),
        column_mask_interval=int(entry["column_mask_interval"]),
        backend=backend,
        device="meta",
        dtype=dtype,
        # Not in files written before the option was there.
        prune_backward=bool(entry.get("prune_backward", True)),
    )
    layer.origin = str(entry["origin"])
    if entry["adapter"] is not None:
        layer.add_adapter(int(entry["adapter"]["rank"]), float(entry["adapter"]["scale"]))
        assert layer.adapter is not None
        layer.adapter.active = bool(entry["adapter"]["active"])
    return layer


def expected_shapes(layer: SlopeLinear) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape of every tensor that the layer has in the file."""
    shapes: dict[str, tuple[int, ...]] = {
        "compressed": tuple(layer.values.shape),
        "bitmask": (layer.out_features, -(-layer.in_features // 8)),
        "shape": (2, 1),
        "column_mask": tuple(layer.column_mask.shape),
    }
    for leaf, parameter in layer.named_parameters():
        if leaf != "values":
            shapes[leaf] = tuple(parameter.shape)
    return shapes


def encode(layer: SlopeLinear) -> dict[str, Tensor]:
    """Leaf name -> tensor for the file."""
    tensors = {
        "compressed": layer.values.detach(),
        "bitmask": pack_bits(layer.keep_mask()),
        "shape": torch.tensor([[layer.out_features], [layer.in_features]]),
        "column_mask": layer.column_mask,
    }
    for leaf, parameter in layer.named_parameters():
        if leaf != "values":
            tensors[leaf] = parameter.detach()
    return tensors


def decode(name: str, layer: SlopeLinear, tensors: dict[str, Tensor]) -> None:
    """Fill a layer of :func:`layer_from` with the tensors of the file.

    Raises:
        ValueError: if a mask breaks the layer's pattern.
    """
    pattern = layer.pattern
    shape = tensors["shape"].flatten().tolist()
    if shape != [layer.out_features, layer.in_features]:
        raise ValueError(
            f"layer {name!r} is {layer.out_features} x {layer.in_features}, but the shape stored "
            f"beside its values is {shape}; the file is damaged, export it again."
        )
    keep_mask = unpack_bits(tensors["bitmask"], layer.in_features)
    kept = keep_mask.unflatten(1, (-1, pattern.m)).sum(-1)
    if not bool((kept == pattern.n).all()):
        row, group = torch.nonzero(kept != pattern.n)[0].tolist()
        raise ValueError(
            f"the bitmask of layer {name!r} keeps {int(kept[row, group])} of {pattern.m} in row "
            f"{row}, group {group}, but its pattern is {pattern}; the file is damaged, export it "
            "again."
        )
    metadata = compress(keep_mask, keep_mask, pattern).metadata
    survives = unpack_bits(tensors["column_mask"], layer.values.shape[1])
    columns = decompress(survives, metadata, pattern, layer.in_features)
    crowded = (columns.unflatten(0, (-1, pattern.m)).sum(1) > pattern.n).any()
    if layer.prune_backward and bool(crowded):
        raise ValueError(
            f"the column mask of layer {name!r} keeps more than {pattern.n} of {pattern.m} along "
            "d_out; the file is damaged, export it again."
        )
    layer.values = nn.Parameter(tensors["compressed"])
    layer.metadata = metadata
    layer.column_mask = tensors["column_mask"]
    if layer.bias is not None:
        layer.bias = nn.Parameter(tensors["bias"])
    if layer.adapter is not None:
        layer.adapter.down = nn.Parameter(tensors["adapter.down"])
        layer.adapter.up = nn.Parameter(tensors["adapter.up"])
