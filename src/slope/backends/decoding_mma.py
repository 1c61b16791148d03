"""Y for a few tokens on the sparse tensor cores: ``decode.cu``, compiled when it is first needed.

Where it can be used it replaces the kernel of :mod:`.decoding`, which expands the weight and keeps
half of the tensor cores' time for zeros. T tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope.backends import nvrtc
from slope.backends.decoding import finish, too_many_tokens

_SOURCE = "decode.cu"
_FIRST_CUDA = (12, 5)  # whose PTX has mma.sp::ordered_metadata
_LOW_COLUMNS = 3584  # of a split of X downᵀ: longer ones outlast the blocks of W^R
_CLUSTERS_FROM = 9  # compute capability
LARGEST_CLUSTER = 8  # blocks; more are not portable
_MULTIPLE = 64  # of I: a copy moves 8 bytes of metadata


class MmaLaunch(NamedTuple):
    """How the launch is cut up; the constants of ``decode.cu``.

    Attributes:
        token_tiles: tiles of 8 tokens; all tokens are in one block.
        row_tiles: tiles of 16 outputs of a warp.
        row_warps: warps of a block along the outputs.
        column_warps: warps of a block along I, 128 columns each.
        stages: steps in flight.
        blocks: that I is split for where there are fewer tiles; 0 never splits it.
        grouped: wgmma, four warps along the outputs sharing X; compute capability 9.0 alone.
    """

    token_tiles: int
    row_tiles: int
    row_warps: int
    column_warps: int
    stages: int
    blocks: int
    grouped: bool = False

    @property
    def rows(self) -> int:
        """Outputs of a block."""
        return 16 * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.row_warps * self.column_warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the steps in flight, then the sums of the warps along I."""
        step, tokens = 128 * self.column_warps, 8 * self.token_tiles
        stage = self.rows * step + 2 * tokens * step + self.rows * step // 8
        return max(self.stages * stage, 4 * self.column_warps * tokens * (self.rows + 4))

    def splits(self, out_features: int, in_features: int, clusters: bool) -> int:
        """Blocks that share the columns of one tile.

        A cluster adds their sums for little; without one a second launch does, which pays from four
        steps of each on, not from two.
        """
        tiles = -(-out_features // self.rows)
        enough = in_features // ((256 if clusters else 512) * self.column_warps)
        return max(1, min(self.blocks // tiles, enough, LARGEST_CLUSTER))

    def low_splits(self, in_features: int) -> int:
        """Blocks that share the columns of one tile of down."""
        most = max(2, in_features // _LOW_COLUMNS)
        return max(1, min(most, in_features // (64 * self.column_warps) // 2))


class _Best(NamedTuple):
    """A cut and the products that it is for: the first of a list whose bounds hold."""

    outputs: float
    inputs: float
    cut: MmaLaunch


# For up to 8, 16, 32 and 64 tokens the fastest on an H200 of about ten cuts, split up to 8 times,
# by 14 shapes from 768 x 768 to 50304 x 4096 (benchmarks/gpu_decode.py --cuts).
_ANY = math.inf
_LAUNCHES = {
    8: (
        _Best(2048, _ANY, MmaLaunch(1, 1, 1, 8, 3, 0)),
        _Best(8192, _ANY, MmaLaunch(1, 1, 1, 4, 4, 0)),
        _Best(_ANY, _ANY, MmaLaunch(1, 1, 2, 2, 3, 0)),
    ),
    16: (
        _Best(2048, _ANY, MmaLaunch(2, 1, 1, 4, 4, 144)),
        _Best(4608, 8192, MmaLaunch(2, 2, 1, 8, 3, 0)),
        _Best(4608, _ANY, MmaLaunch(2, 1, 2, 2, 4, 256)),
        _Best(8192, _ANY, MmaLaunch(2, 2, 2, 2, 3, 224)),
        _Best(_ANY, 8192, MmaLaunch(2, 2, 2, 2, 3, 0)),
        _Best(_ANY, _ANY, MmaLaunch(2, 1, 2, 2, 4, 0)),
    ),
    32: (
        _Best(2048, _ANY, MmaLaunch(4, 1, 1, 4, 4, 128)),
        _Best(4608, _ANY, MmaLaunch(4, 2, 1, 4, 3, 0)),
        _Best(8192, _ANY, MmaLaunch(4, 2, 2, 2, 3, 224)),
        _Best(_ANY, 8192, MmaLaunch(4, 2, 2, 2, 3, 0)),
        _Best(16384, _ANY, MmaLaunch(4, 4, 4, 2, 2, 132)),
        _Best(_ANY, _ANY, MmaLaunch(4, 2, 2, 2, 3, 0)),
    ),
    64: (
        _Best(4608, 1024, MmaLaunch(8, 1, 2, 4, 2, 0)),
        _Best(2048, _ANY, MmaLaunch(8, 2, 2, 2, 3, 96)),
        _Best(4608, _ANY, MmaLaunch(8, 2, 2, 4, 2, 132)),
        _Best(6144, _ANY, MmaLaunch(8, 2, 2, 4, 2, 0)),
        _Best(8192, _ANY, MmaLaunch(8, 2, 4, 2, 3, 112)),
        _Best(_ANY, 8192, MmaLaunch(8, 2, 4, 2, 3, 0)),
        _Best(16384, _ANY, MmaLaunch(8, 2, 4, 2, 3, 216)),
        _Best(_ANY, _ANY, MmaLaunch(8, 2, 2, 4, 2, 0)),
    ),
}


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "values", "metadata", "x", "bias", "down", "y", "partial", "low",
        )),
        ("x_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in (
            "tokens", "outputs", "inputs", "rank", "splits", "low_splits",
        )),
    )  # fmt: skip


def launch_for(
    tokens: int, out_features: int, in_features: int, shared_memory: int
) -> MmaLaunch | None:
    """The cut for 1 to 64 tokens.

    Args:
        tokens: T.
        out_features: O.
        in_features: I.
        shared_memory: bytes that a block may have.

    Returns:
        The table's, or another that fits into less memory; None if none does.
    """
    rows = next(rows for most, rows in _LAUNCHES.items() if tokens <= most)
    best = [row for row in rows if out_features <= row.outputs and in_features <= row.inputs]
    return next((row.cut for row in (*best, *rows) if row.cut.shared <= shared_memory), None)


@functools.cache
def _shared_memory(device: int) -> int:
    gpu: Any = torch.cuda.get_device_properties(device)
    return int(gpu.shared_memory_per_block_optin)


@functools.cache
def _has_clusters(device: int) -> bool:
    gpu: Any = torch.cuda.get_device_properties(device)
    return bool(gpu.major >= _CLUSTERS_FROM)


def why_no_mma(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    values_dtype: torch.dtype,
    device: int,
) -> str | None:
    """Reason why :func:`decode_mma` cannot serve such a product on a GPU, or None.

    Args:
        tokens: T.
        out_features: O.
        in_features: I.
        dtype: of the product.
        values_dtype: of the values.
        device: index of the GPU.
    """
    if reason := too_many_tokens(tokens) or _why_no_compiler():
        return reason
    if in_features % _MULTIPLE:
        return f"in_features={in_features} is not divisible by {_MULTIPLE}"
    if out_features % 4:
        return f"out_features={out_features} is not divisible by 4"
    if values_dtype != dtype:
        names = (str(each).removeprefix("torch.") for each in (values_dtype, dtype))
        return "the kernel casts nothing, and {} values are needed as {}".format(*names)
    if launch_for(tokens, out_features, in_features, _shared_memory(device)) is None:
        memory = f"the GPU's {_shared_memory(device)} bytes of shared memory"
        return f"{tokens} tokens take more than {memory}"
    return None


@functools.cache
def _why_no_compiler() -> str | None:
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if version < _FIRST_CUDA:
        return f"CUDA {torch.version.cuda} compiles no mma.sp::ordered_metadata, CUDA 12.5 does"
    return nvrtc.why_missing()


def constants(launch: MmaLaunch, dtype: torch.dtype) -> dict[str, int]:
    """What ``decode.cu`` is compiled with."""
    names = ("NT", "MT", "WM", "WK", "STAGES")
    return dict(zip(names, launch, strict=False)) | {
        "BF16": int(dtype == torch.bfloat16),
        "GROUPED": int(launch.grouped),
    }


@functools.cache
def _kernel(launch: MmaLaunch, dtype: torch.dtype, device: int) -> nvrtc.Kernel:
    own = "a" if launch.grouped else ""  # instructions of this architecture alone
    return nvrtc.Kernel(_SOURCE, "slope_decode", constants(launch, dtype), launch.shared, own)


def decode_mma(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    launch: MmaLaunch | None = None,
    splits: int | None = None,
    low_splits: int | None = None,
) -> Tensor:
    """``Y = X (W^R)ᵀ + b + scale * (X downᵀ) upᵀ`` for up to 64 tokens, in one or two launches.

    Blocks that share the columns of a tile form a cluster and add their sums themselves; GPUs
    without clusters (before compute capability 9.0), and more splits than a cluster may have, take
    a second launch for that, as an adapter always does. Sums are made in fp32, in an order that
    depends on shapes alone. X downᵀ is rounded to the dtype
    of X, as two products would. The caller has asked :func:`why_no_mma`; tensors are on the current
    GPU.

    Args:
        x: (T, I), bf16 or fp16; rows contiguous, any stride between them.
        values: (O, I/2), dtype of ``x``, contiguous.
        metadata: (O, I/8) uint8, contiguous.
        bias: (O,), dtype of ``x``, or None.
        down: (R, I), dtype of ``x``, contiguous, or None with ``up``.
        up: (O, R), dtype of ``x``, contiguous.
        scale: factor of the adapter.
        launch: how to cut the work; None takes the table's.
        splits: of I; None takes the launch's.
        low_splits: of I for X downᵀ; None takes the launch's.

    Returns:
        (T, O), dtype of ``x``. Moves the weight once, and partial sums in fp32 where the work is
        split or an adapter is added. An operand that begins at no multiple of 16 bytes is copied.

    Raises:
        RuntimeError: if the kernel cannot be compiled, loaded or launched.
    """
    (tokens, in_features), out_features = x.shape, values.shape[0]
    y = x.new_empty((tokens, out_features))
    if not y.numel():
        return y
    device = x.device.index
    cut = launch or launch_for(tokens, out_features, in_features, _shared_memory(device))
    if cut is None:
        raise RuntimeError("no cut fits into the GPU's shared memory; ask why_no_mma first.")
    kernel = _kernel(cut._replace(blocks=0), x.dtype, device)  # blocks are no constant of it
    clusters = _has_clusters(device)
    splits = splits or cut.splits(out_features, in_features, clusters)
    rank = 0 if up is None else up.shape[1]
    together = clusters and 1 < splits <= LARGEST_CLUSTER and kernel.holds(cut.threads, splits)
    cluster = splits if together else 1
    final = splits == cluster and rank == 0
    partial = low_partial = None
    if not final:
        partial = x.new_empty((splits // cluster, tokens, out_features), dtype=torch.float32)
    low_splits = (low_splits or cut.low_splits(in_features)) if rank else 0
    if rank:
        low_partial = x.new_empty((low_splits, tokens, rank), dtype=torch.float32)
    x = x if x.stride(0) % 8 == 0 else x.contiguous()
    x, values, metadata = _aligned(x), _aligned(values), _aligned(metadata)
    down = None if down is None else _aligned(down)
    written = y if final else None, partial, low_partial
    argument = _Arguments(
        *map(_pointer, (values, metadata, x, bias, down, *written)),
        x.stride(0) * x.itemsize, tokens, out_features, in_features, rank, splits,
        low_splits,
    )  # fmt: skip
    parts = -(-tokens // (8 * cut.token_tiles))
    low_blocks = -(-rank // cut.rows) * parts * low_splits
    blocks = -(-out_features // cut.rows) * parts * splits + -(-low_blocks // cluster) * cluster
    stream = torch._C._cuda_getCurrentRawStream(device)
    kernel(blocks, cut.threads, argument, stream, cluster)
    if partial is not None:
        finish(partial, low_partial, up, bias, y, scale, early=clusters)
    return y


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
