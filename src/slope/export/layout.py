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

2:4 in bf16 takes 0.5625 of the dense bytes. The column mask, which only training reads, costs
another 1/32 and is left out where the values give it. The first three names and layouts are those
of compressed-tensors; a reader of that format finds what it expects for 2:4.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from slope.compressed import compress, pack_bits, unpack_bits
from slope.linear import SlopeLinear
from slope.pattern import NMPattern

FORMAT = "slope"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1: one file, every column mask stored
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
        "column_mask": _keeps_column_mask(layer),
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


def _keeps_column_mask(layer: SlopeLinear) -> bool:
    """Whether the file has to hold the column mask: it may be older than the values.

    A mask that breaks the pattern was never chosen: :func:`decode` leaves it so for inference.
    """
    if layer.prune_backward and _crowded(layer):
        return False
    fresh = copy.copy(layer)
    fresh._buffers = dict(layer._buffers)
    fresh.column_mask = layer.column_mask.clone()
    fresh.refresh_column_mask()
    return not torch.equal(fresh.column_mask, layer.column_mask)


def _crowded(layer: SlopeLinear) -> bool:
    kept = layer.column_keep_mask().unflatten(0, (-1, layer.pattern.m)).sum(1)
    return bool((kept > layer.pattern.n).any())


def expected_shapes(layer: SlopeLinear, entry: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape of every tensor that the layer has in the file."""
    shapes: dict[str, tuple[int, ...]] = {
        "compressed": tuple(layer.values.shape),
        "bitmask": (layer.out_features, -(-layer.in_features // 8)),
        "shape": (2, 1),
    }
    if entry.get("column_mask", True):
        shapes["column_mask"] = tuple(layer.column_mask.shape)
    for leaf, parameter in layer.named_parameters():
        if leaf != "values":
            shapes[leaf] = tuple(parameter.shape)
    return shapes


def encode(layer: SlopeLinear, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Leaf name -> tensor for the file; ``entry`` is what :func:`describe` gave."""
    tensors = {
        "compressed": layer.values.detach(),
        "bitmask": pack_bits(layer.keep_mask()),
        "shape": torch.tensor([[layer.out_features], [layer.in_features]]),
    }
    if entry["column_mask"]:
        tensors["column_mask"] = layer.column_mask
    for leaf, parameter in layer.named_parameters():
        if leaf != "values":
            tensors[leaf] = parameter.detach()
    return tensors


@functools.cache
def _metadata_of_bytes() -> tuple[Tensor, Tensor]:
    """For 2:4: metadata of each byte of a bitmask (256,) uint8, and which bytes are legal."""
    keep_masks = unpack_bits(torch.arange(256, dtype=torch.uint8).unsqueeze(1), 8)
    legal = (keep_masks.unflatten(1, (2, 4)).sum(-1) == 2).all(-1)
    metadata = torch.zeros(256, dtype=torch.uint8)
    allowed = keep_masks[legal]
    metadata[legal] = compress(allowed, allowed, NMPattern(2, 4)).metadata.flatten()
    return metadata, legal


def _metadata(name: str, layer: SlopeLinear, bitmask: Tensor) -> Tensor:
    """Positions of the kept values, checked against the layer's pattern."""
    pattern = layer.pattern
    if pattern == NMPattern(2, 4) and layer.in_features % 8 == 0:
        # A byte of the one is a byte of the other: a table is what makes large models load fast.
        metadata, legal = (table.to(bitmask.device) for table in _metadata_of_bytes())
        index = bitmask.int()
        if bool(legal[index].all()):
            return metadata[index]
    keep_mask = unpack_bits(bitmask, layer.in_features)
    kept = keep_mask.unflatten(1, (-1, pattern.m)).sum(-1)
    if not bool((kept == pattern.n).all()):
        row, group = torch.nonzero(kept != pattern.n)[0].tolist()
        raise ValueError(
            f"the bitmask of layer {name!r} keeps {int(kept[row, group])} of {pattern.m} in row "
            f"{row}, group {group}, but its pattern is {pattern}; the file is damaged, export it "
            "again."
        )
    return compress(keep_mask, keep_mask, pattern).metadata


def decode(name: str, layer: SlopeLinear, tensors: dict[str, Tensor], training: bool) -> None:
    """Fill a layer of :func:`layer_from` with the tensors of the file.

    Args:
        name: of the layer, for errors.
        layer: the layer.
        tensors: leaf name -> tensor.
        training: False leaves a column mask that is not in the file out: all values survive.

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
    layer.values = nn.Parameter(tensors["compressed"])
    layer.metadata = _metadata(name, layer, tensors["bitmask"])
    if "column_mask" in tensors:
        layer.column_mask = tensors["column_mask"]
        if layer.prune_backward and _crowded(layer):
            raise ValueError(
                f"the column mask of layer {name!r} keeps more than {pattern.n} of {pattern.m} "
                "along d_out; the file is damaged, export it again."
            )
    else:
        device = layer.values.device
        layer.column_mask = torch.full_like(layer.column_mask, 255, device=device)
        if training:
            layer.refresh_column_mask()
    if layer.bias is not None:
        layer.bias = nn.Parameter(tensors["bias"])
    if layer.adapter is not None:
        layer.adapter.down = nn.Parameter(tensors["adapter.down"])
        layer.adapter.up = nn.Parameter(tensors["adapter.up"])
