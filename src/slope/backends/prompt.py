"""Y for many tokens on the sparse tensor cores: ``prompt.cu``, compiled when it is first needed.

It takes cuSPARSELt's operand and adds an adapter with the same sums, which cuSPARSELt cannot. T
tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope.backends import nvrtc

_SOURCE = "prompt.cu"
_CAPABILITY = (9, 0)  # wgmma of this one alone
_BLOCKS, _ROWS, _THREADS = 2, 128, 384  # of a cluster; outputs and threads of a block
_PART = 64  # tokens of Y that leave shared memory together
_BAND = 8  # pairs of tiles of outputs
_ARGUMENTS = struct.Struct("2Q 5i f 24x")  # behind five ``CUtensorMap``


class PromptLaunch(NamedTuple):
    """How a product is cut up; the constants of ``prompt.cu``."""

    token_tiles: int = 32
    stages: int = 4
    a_stages: int = 3
    part: int = 64
    buffers: int = 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        x, a = 128 * 8 * self.token_tiles, (128 + 16) * _ROWS
        y = 2 * self.buffers * 128 * self.part
        return self.stages * (x + 16) + self.a_stages * (a + 16) + y


def constants(launch: PromptLaunch, dtype: torch.dtype, adapted: bool) -> dict[str, int | str]:
    """What ``prompt.cu`` is compiled with."""
    sums, tiles = 4 * launch.token_tiles, range(launch.token_tiles)
    given = [f"%{i}" for i in range(sums + 5)]
    return {
        "NT": launch.token_tiles,
        "STAGES": launch.stages,
        "A_STAGES": launch.a_stages,
        "PART": launch.part,
        "BUFFERS": launch.buffers,
        "ADAPTED": int(adapted),
        "BF16": int(dtype == torch.bfloat16),
        "SHAPE": f'"m64n{8 * launch.token_tiles}"',
        "SUMS": ", ".join(f'"+f"(d[{tile}][{i}])' for tile in tiles for i in range(4)),
        "OPERANDS": f'"{{{", ".join(given[:sums])}}}, {given[sums]}, {given[sums + 1]}"',
        "METADATA": f'"{given[sums + 2]}, {given[sums + 3]}"',
        "ADD": f'"{given[sums + 4]}"',
        "DENSE_ADD": f'"{given[sums + 2]}"',
    }


@functools.cache
def _kernel(launch: PromptLaunch, dtype: torch.dtype, adapted: bool, device: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(
        _SOURCE, "slope_prompt", constants(launch, dtype, adapted), launch.shared, suffix="a"
    )


def prompt_product(
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    scale: float,
    out_features: int,
    launch: PromptLaunch = PromptLaunch(),
    band: int = _BAND,
) -> Tensor:
    """Y = X (W^R)ᵀ + b [+ scale Z upᵀ]."""
    tokens, in_features = x.shape
    rank = 0 if up is None else up.shape[1]
    device = x.device.index
    y = x.new_empty((tokens, out_features))
    if not y.numel():
        return y
    gpu: Any = torch.cuda.get_device_properties(device)
    kind = "bf16" if x.dtype == torch.bfloat16 else "fp16"

    def made(matrix: Tensor | None, columns: int, width: int, height: int) -> bytes:
        if matrix is None:
            return bytes(128)
        rows, pitch = matrix.shape[0], matrix.stride(0) * matrix.itemsize
        return nvrtc.tensor_map(matrix.data_ptr(), kind, columns, rows, pitch, width, height)

    values = packed[: out_features * in_features // 2].view(out_features, in_features // 2)
    share = 8 * launch.token_tiles // _BLOCKS
    maps = (
        made(values, in_features // 2, 64, _ROWS)
        + made(x, in_features, 64, share)
        + made(y, out_features, 64, launch.part)
        + made(up, rank, 64, _ROWS)
        + made(z, rank, 64, share)
    )
    places = packed.data_ptr() + out_features * in_features
    argument = maps + _ARGUMENTS.pack(
        places, 0 if bias is None else bias.data_ptr(),
        tokens, out_features, in_features, rank, band, scale,
    )  # fmt: skip
    tiles = -(-out_features // (_BLOCKS * _ROWS)) * -(-tokens // (8 * launch.token_tiles))
    clusters = min(tiles, gpu.multi_processor_count // _BLOCKS)
    _kernel(launch, x.dtype, up is not None, device)(
        _BLOCKS * clusters, _THREADS, argument,
        torch._C._cuda_getCurrentRawStream(device), _BLOCKS, True,
    )  # fmt: skip
    return y
