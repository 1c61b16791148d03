"""``Y += scale * Z upᵀ`` in place, for a Y whose bytes decide: ``rank_update.cu``.

What an adapter adds behind a product that cannot add it itself. With 16 384 tokens on an H200
cuBLAS takes 1.1 to 2.0 times as long as reading and writing Y, this kernel 1.1 to 1.6 times. T
tokens, O = d_out, R rank.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope.backends import nvrtc

_SOURCE = "rank_update.cu"
_CAPABILITY = (9, 0)  # wgmma of this one alone
_TOKENS, _OUTPUTS, _RANKS = 64, 128, 64  # of a tile, a strip and a chunk
_Y_BYTES = 2 * _TOKENS * _OUTPUTS
_THREADS = 320
_MULTIPLE = 8  # of O and R: TMA wants rows of whole 16 bytes
_BEGINNING = 3  # tiles whose time it takes to begin and to end a block, about
_ARGUMENTS = struct.Struct("3i f 48x")  # behind three ``CUtensorMap``, a multiple of 64 bytes
MAX_RANK = 256
"""Of more, up does not fit into shared memory beside tiles of Y."""


class UpdateLaunch(NamedTuple):
    """How an update is cut up; the constants of ``rank_update.cu``.

    Attributes:
        chunks: of 64 ranks.
        y_stages: tiles of Y in flight.
        z_stages: tiles of Z in flight.
    """

    chunks: int
    y_stages: int
    z_stages: int

    @classmethod
    def of(cls, rank: int, shared: int) -> UpdateLaunch:
        """As many tiles of Y as fit.

        Args:
            rank: R, up to :data:`MAX_RANK`.
            shared: bytes of shared memory that a block may have.
        """
        chunks = -(-rank // _RANKS)
        none = cls(chunks, 0, 3 if chunks < 4 else 2)
        return none._replace(y_stages=(shared - none.shared) // (_Y_BYTES + 16))

    @property
    def shared(self) -> int:
        """Bytes of shared memory: up, the tiles, a barrier for up and two for each tile."""
        up, z = 128 * _OUTPUTS * self.chunks, 128 * _TOKENS * self.chunks
        tiles = self.y_stages * _Y_BYTES + self.z_stages * z
        return up + tiles + 16 * (self.y_stages + self.z_stages) + 8


def why_no_update(out_features: int, rank: int, device: int) -> str | None:
    """Reason why :func:`rank_update` cannot serve, or None.

    Args:
        out_features: O.
        rank: R.
        device: index of the GPU.
    """
    if torch.cuda.get_device_capability(device) != _CAPABILITY:
        return "the kernel is made for compute capability 9.0"
    if reason := nvrtc.why_missing():
        return reason
    if out_features % _MULTIPLE or rank % _MULTIPLE:
        return f"out_features={out_features} and rank={rank} are not divisible by {_MULTIPLE}"
    if rank > MAX_RANK:
        return f"rank {rank}, the kernel takes up to {MAX_RANK}"
    return None


def constants(launch: UpdateLaunch, dtype: torch.dtype) -> dict[str, int | str]:
    """What ``rank_update.cu`` is compiled with."""
    names = ", ".join(f"%{i}" for i in range(32))
    return {
        "CHUNKS": launch.chunks,
        "Y_STAGES": launch.y_stages,
        "Z_STAGES": launch.z_stages,
        "BF16": int(dtype == torch.bfloat16),
        "SUMS": ", ".join(f'"+f"(d[{i}])' for i in range(32)),
        "OPERANDS": f'"{{{names}}}, %32, %33"',
    }


@functools.cache
def _kernel(launch: UpdateLaunch, dtype: torch.dtype, device: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(
        _SOURCE, "slope_rank_update", constants(launch, dtype), launch.shared, suffix="a"
    )


def rank_update(y: Tensor, z: Tensor, up: Tensor, scale: float) -> Tensor:
    """``Y += scale * Z upᵀ``, in place, in one launch; sums in fp32, rounded once.

    The caller has asked :func:`why_no_update`; tensors are on the current GPU.

    Args:
        y: (T, O), bf16 or fp16, contiguous.
        z: (T, R), dtype of ``y``.
        up: (O, R), dtype of ``y``; copied if it is not contiguous or begins at no multiple of 16
            bytes, as ``z`` is.
        scale: factor.

    Returns:
        ``y``. Moves it once in each direction.

    Raises:
        RuntimeError: if the kernel cannot be compiled, loaded or launched.
    """
    (tokens, out_features), rank = y.shape, z.shape[1]
    if not y.numel():
        return y
    device = y.device.index
    gpu: Any = torch.cuda.get_device_properties(device)
    launch = UpdateLaunch.of(rank, gpu.shared_memory_per_block_optin)
    strips, tiles = -(-out_features // _OUTPUTS), -(-tokens // _TOKENS)
    share = _share(strips, tiles, gpu.multi_processor_count)
    z, up = (
        each
        if each.is_contiguous() and each.data_ptr() % 16 == 0
        else each.clone(memory_format=torch.contiguous_format)
        for each in (z, up)
    )
    kind = "bf16" if y.dtype == torch.bfloat16 else "fp16"
    maps = b"".join(
        nvrtc.tensor_map(
            matrix.data_ptr(), kind, matrix.shape[1], matrix.shape[0],
            matrix.stride(0) * matrix.itemsize, 64, rows,
        )
        for matrix, rows in ((y, _TOKENS), (z, _TOKENS), (up, _OUTPUTS))
    )  # fmt: skip
    _kernel(launch, y.dtype, device)(
        strips * -(-tiles // share), _THREADS,
        maps + _ARGUMENTS.pack(strips, tiles, share, scale),
        torch._C._cuda_getCurrentRawStream(device), early=True,
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def _share(strips: int, tiles: int, multiprocessors: int) -> int:
    """Tiles of a block, so that few multiprocessors wait for the last blocks.

    A multiprocessor has room for one block at a time.

    Args:
        strips: of Y.
        tiles: of a strip.
        multiprocessors: of the GPU.
    """

    def time(share: int) -> int:
        waves = -(-strips * -(-tiles // share) // multiprocessors)
        return waves * (share + _BEGINNING)

    return min(range(1, tiles + 1), key=time)
