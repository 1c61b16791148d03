"""cuSPARSELt's compressed tensor on sm_90: kept values row-major, then metadata in tiles.

For a (O, I) operand that is 2:4 along I the tensor has 9/16 · O · I elements: first the O·I/2 kept
values in natural order, which is our ``values``; then O·I/8 bytes of metadata. Each group of four
has one nibble, the two positions as we store them (``first | second << 2``), and the nibbles are in
tiles of 64 rows by 16 groups. Inside a tile the bits of a nibble's place are, lowest first,

    row 8 · group 4, 1, 2 · row 1, 2, 4, 16, 32 · group 8

found by compressing matrices that spell out the number of each group; one device and library
version is trusted only after :func:`matches_library` has compared it with the library's own result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope.compressed import compress
from slope.masks import row_keep_mask
from slope.pattern import NMPattern

TILE_ROWS = 64
TILE_COLUMNS = 64
PATTERN = NMPattern(2, 4)


def fits(out_features: int, in_features: int) -> bool:
    """Whether an operand of this shape consists of whole tiles."""
    return out_features % TILE_ROWS == 0 and in_features % TILE_COLUMNS == 0


def packed_numel(out_features: int, in_features: int) -> int:
    """Elements (of two bytes) of the compressed tensor."""
    return out_features * in_features // 16 * 9


def arrange_metadata(metadata: Tensor) -> Tensor:
    """Our metadata in the library's order: the reference of the kernel that does it.

    Args:
        metadata: (O, I/8) uint8 of a 2:4 operand made of whole tiles.

    Returns:
        (O * I/8,) uint8.
    """
    rows, width = metadata.shape
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).view(rows, 2 * width)
    # (row tile, row bits 5..0, group tile, group bits 3..0)
    split = nibbles.view(rows // 64, 2, 2, 2, 2, 2, 2, 2 * width // 16, 2, 2, 2, 2)
    order = (0, 7, 8, 1, 2, 4, 5, 6, 10, 11, 9, 3)
    arranged = split.permute(order).reshape(-1, 2)
    return arranged[:, 0] | (arranged[:, 1] << 4)


def pack(values: Tensor, metadata: Tensor) -> Tensor:
    """The library's compressed tensor from ours: the reference of the kernel that does it.

    Args:
        values: (O, I/2) bf16 or fp16.
        metadata: (O, I/8) uint8.

    Returns:
        (9/16 * O * I,), dtype of ``values``.
    """
    tail = arrange_metadata(metadata).view(values.dtype)
    return torch.cat((values.reshape(-1), tail))


def matches_library(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library on this device lays a compressed tensor out as :func:`pack` does."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 128), (192, 320)):
        weight = torch.randn(shape, generator=generator).to(device, dtype)
        keep_mask = row_keep_mask(weight, PATTERN)
        ours = pack(*compress(weight, keep_mask, PATTERN))
        theirs = torch._cslt_compress(torch.where(keep_mask, weight, 0)).reshape(-1)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            return False
    return True
