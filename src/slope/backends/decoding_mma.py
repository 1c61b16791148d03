"""Y for few tokens on the sparse tensor cores: ``decode.cu``, compiled when it is first needed.

Up to 64 tokens it replaces the kernel of :mod:`.decoding`, which expands the weight and keeps half
of the tensor cores' time for zeros. Where there is wgmma it serves up to 1024 tokens, small layers
up to 4096: :mod:`.gemm` and cuSPARSELt are for more. T tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope.backends import nvrtc
from slope.backends.decoding import MAX_TOKENS, finish

_SOURCE = "decode.cu"
_FIRST_CUDA = (12, 5)  # whose PTX has mma.sp::ordered_metadata
_LOW_COLUMNS = 3584  # of a split of X downᵀ: longer ones outlast the blocks of W^R
_CLUSTERS_FROM = 9  # compute capability
_WGMMA = (9, 0)  # the compute capability that has it; later ones have another instruction
LARGEST_CLUSTER = 8  # blocks; more are not portable
_MOST_BLOCKS = 1300  # of a grid that is split: ten for each multiprocessor of an H200
_MULTIPLE = 64  # of I: a copy moves 8 bytes of metadata
_TMA_MULTIPLE = 128  # of I: with TMA 16
_TMA_ROW = 8  # divides O where TMA writes Y, and a rank: rows have whole 16 bytes
_SCALES = (2.0**-60, 2.0**60)  # by which sums of W^R may be divided


class MmaLaunch(NamedTuple):
    """How the launch is cut up; the constants of ``decode.cu``.

    Attributes:
        token_tiles: tiles of 8 tokens of a block.
        row_tiles: tiles of 16 outputs of a warp.
        row_warps: warps of a block along the outputs.
        column_warps: warps of a block along I, 128 columns each.
        stages: steps in flight.
        splits: blocks that share the columns of one tile; no constant of the source.
        grouped: wgmma, four warps along the outputs sharing X; compute capability 9.0 alone.
        low_splits: blocks that share the columns of one tile of down; 0 without an adapter. With
            ``tma`` in a launch ahead of this one. Also no constant of the source.
        tma: wgmma with tiles that the tensor memory accelerator copies, at the word of one more
            warp; warps along I then take turns.
        stays: the same, and a block makes several tiles one after another.
        x_first: with ``tma``: blocks that begin together share tiles of X, else of W^R. Also no
            constant of the source.

    Example:
        >>> str(MmaLaunch(8, 1, 4, 2, 3, splits=2, grouped=True))
        '8.1.4.2.3g/2'
        >>> MmaLaunch.parse("1.1.1.8.3/1/4").low_splits
        4
    """

    token_tiles: int
    row_tiles: int
    row_warps: int
    column_warps: int
    stages: int
    splits: int = 1
    grouped: bool = False
    low_splits: int = 0
    tma: bool = False
    stays: bool = False
    x_first: bool = False

    def __str__(self) -> str:
        """The name under which it is kept and reported."""
        kind = "p" if self.stays else "t" if self.tma else "g" * self.grouped
        kind += "x" * self.x_first
        name = f"{'.'.join(map(str, self[:5]))}{kind}/{self.splits}"
        return f"{name}/{self.low_splits}" if self.low_splits else name

    @classmethod
    @functools.cache
    def parse(cls, name: str) -> MmaLaunch:
        """The inverse of ``str``; without splits it has one."""
        cut, *rest = name.split("/")
        splits, low_splits = (*map(int, rest), *(1, 0)[len(rest) :])
        sizes = cut.rstrip("gtpx")
        of = [any(kind in cut[len(sizes) :] for kind in kinds) for kinds in ("gtp", "tp", "p", "x")]
        tokens, tiles, rows, columns, stages = map(int, sizes.split("."))
        return cls(tokens, tiles, rows, columns, stages, splits, of[0], low_splits, *of[1:])

    @property
    def rows(self) -> int:
        """Outputs of a block."""
        return 16 * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Of a block."""
        # With 128 sums for each, warps take registers over from a group of four that copies.
        copying = (4 if self.row_tiles * self.token_tiles > 16 else 1) if self.tma else 0
        return 32 * (self.row_warps * self.column_warps + copying)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the steps in flight, then the sums of the warps along I."""
        step, tokens = 128 * (1 if self.tma else self.column_warps), 8 * self.token_tiles
        stage = self.rows * step + 2 * tokens * step + self.rows * step // 8
        most = max(self.stages * stage, 4 * self.column_warps * tokens * (self.rows + 4))
        if self.stays:  # Y has a place of its own
            most = self.stages * stage + 2 * tokens * self.rows
        return most + 16 * self.stages if self.tma else most

    def parts(self, tokens: int) -> int:
        """Blocks that share the tokens."""
        return -(-tokens // (8 * self.token_tiles))


# What competes for up to so many tokens: on an H200 each was the fastest at one of 14 shapes from
# 768 x 768 to 50304 x 4096 (benchmarks/gpu_decode.py --cuts), or serves shapes that TMA does not.
# Of more than 128 tokens those that together were within 3 % of the fastest, timed for themselves.
_CUTS = {
    8: "1.1.1.8.3 1.1.1.4.4 1.1.2.2.3",
    16: "2.1.1.4.4 2.2.1.8.3 2.1.2.2.4 2.2.2.2.3",
    32: "4.1.1.4.4 4.2.1.4.3 4.2.2.2.3",
    64: "8.1.2.4.2 8.2.2.2.3 8.2.2.4.2 8.2.4.2.3",
}
_GROUPED = {
    8: "1.1.4.2.8t",
    16: "2.1.4.2.3g 2.1.4.1.4t 2.1.4.1.8t 2.1.4.2.8t 2.1.4.2.14t 2.1.8.1.5t",
    32: "4.1.4.1.6g 4.1.4.2.4g 4.2.4.2.3g 4.1.4.1.6t 4.1.4.2.6t 4.1.4.2.12t 4.1.8.1.4t",
    64: "8.1.4.1.6g 8.1.4.2.4g 8.1.8.2.3g 2.1.4.2.14t 4.1.4.2.6t 4.1.4.2.12t 8.1.4.1.4t 8.1.4.2.8t "
    "8.1.8.2.6t 8.1.12.1.5t 8.2.8.1.4t",
    128: "8.1.4.2.4g 8.1.8.2.3g 16.1.8.1.4g 2.1.4.2.8t 8.1.4.2.8t 16.1.4.1.5t 16.1.4.2.4t "
    "16.1.8.1.4t 16.1.12.1.3t 16.2.8.1.3t",
    1024: "8.1.4.2.4g 8.1.8.2.3g 16.1.8.1.4g 3.1.4.2.6t 6.1.4.2.4t 8.1.4.1.8t 11.1.4.1.6t "
    "11.1.8.1.4p 12.1.12.1.3p 16.1.4.1.5t 16.1.4.2.4t 16.1.8.1.4t 16.1.12.1.3p 16.2.8.1.3t",
    4096: "8.1.8.2.3g 16.1.8.1.4g 8.1.12.1.4p 12.1.12.1.3p 16.1.8.1.4t 16.1.12.1.3p 16.1.12.1.3t "
    "16.2.8.1.3t",
}
# Tokens. From there on wgmma was the faster one at every shape; with TMA, where I is divisible by
# 128, at all but 768 x 768 with 32 tokens.
_GROUPED_ALONE_FROM = 33
_TMA_ALONE_FROM = 17
# Beyond so many tokens it competes for a small Y alone: at larger ones it was no faster.
_MANY_TOKENS, _MOST_RESULTS = 1024, 6 << 20
# Up to so many weights, and in one part or two, launches were up to 9 % faster where blocks that
# begin together share X.
_X_FIRST_WEIGHTS, _X_FIRST_SPLITS = 6 << 20, 2


# ``struct Arguments`` of the source; with TMA six ``CUtensorMap`` come first.
_ARGUMENTS = struct.Struct("9Q q 6i f 2i 4x")
_FIELDS = (
    "values metadata x bias down y partial low z x_stride tokens outputs inputs rank splits "
    "low_splits scale boxes x_first"
)
_NO_MAP = bytes(128)
_PADDING = bytes(-_ARGUMENTS.size % 64)  # behind them, since maps are aligned so


def cuts_for(tokens: int, device: int) -> list[MmaLaunch]:
    """What may be compiled for a number of tokens, none of it split.

    Args:
        tokens: T.
        device: index of the GPU.
    """
    names = _listed(_CUTS, tokens)
    if _has_wgmma(device):
        names = _listed(_GROUPED, tokens) + (names if tokens < _GROUPED_ALONE_FROM else [])
    cuts = map(MmaLaunch.parse, names)
    return [cut for cut in cuts if cut.shared <= _shared_memory(device)]


def _listed(table: Mapping[int, str], tokens: int) -> list[str]:
    return next((names.split() for most, names in table.items() if tokens <= most), [])


def launches(tokens: int, out_features: int, in_features: int, rank: int, device: int) -> list[str]:
    """Names of the launches that compete for a product.

    With an adapter X downᵀ is split in two ways, whatever the cut; with ``tma`` into as many blocks
    as a cluster holds, which are done soon, or into two, which leave the GPU to the product itself.
    For many tokens the adapter may also be left to two more products, since partial sums in fp32
    are more bytes than Y once more.

    Args:
        tokens: T.
        out_features: O.
        in_features: I.
        rank: R, 0 without an adapter.
        device: index of the GPU.
    """
    cuts = cuts_for(tokens, device)
    if tokens >= _TMA_ALONE_FROM and in_features % _TMA_MULTIPLE == rank % _TMA_ROW == 0:
        cuts = [cut for cut in cuts if cut.tma] or cuts
    found = split(cuts, tokens, out_features, in_features)
    if rank:
        few = max(2, in_features // _LOW_COLUMNS)
        beside = () if tokens <= MAX_TOKENS else (0,)
        steps = in_features // 128
        ahead = {min(2, steps), min(LARGEST_CLUSTER, steps)} if rank % _TMA_ROW == 0 else set()
        found = [
            launch._replace(low_splits=way)
            for launch in found
            for way in (*beside, *(sorted(ahead) if launch.tma else (few, 2 * few)))
        ]
    return [str(launch) for launch in found]


def split(
    cuts: Sequence[MmaLaunch], tokens: int, out_features: int, in_features: int
) -> list[MmaLaunch]:
    """Each cut as it is and split: a step or more for each part, no more than a cluster holds.

    A grid of many more blocks than a GPU has places for is not split. With TMA either operand may
    come first where both are shared and W^R is small.
    """
    found = []
    small = out_features * in_features <= _X_FIRST_WEIGHTS
    for cut in cuts:
        if (cut.tma and in_features % _TMA_MULTIPLE) or (cut.stays and out_features % _TMA_ROW):
            continue
        rows, parts = -(-out_features // cut.rows), cut.parts(tokens)
        most = min(in_features // (128 * cut.column_warps), LARGEST_CLUSTER)
        most = 1 if cut.stays else max(1, min(most, _MOST_BLOCKS // (rows * parts)))
        found += [cut._replace(splits=splits) for splits in range(1, most + 1)]
        if cut.tma and small and min(rows, parts) > 1:
            most, cut = min(most, _X_FIRST_SPLITS), cut._replace(x_first=True)
            found += [cut._replace(splits=splits) for splits in range(1, most + 1)]
    return found


@functools.cache
def _shared_memory(device: int) -> int:
    gpu: Any = torch.cuda.get_device_properties(device)
    return int(gpu.shared_memory_per_block_optin)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_clusters(device: int) -> bool:
    gpu: Any = torch.cuda.get_device_properties(device)
    return bool(gpu.major >= _CLUSTERS_FROM)


@functools.cache
def _has_wgmma(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == _WGMMA


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
        tokens: T, or the bucket of T.
        out_features: O.
        in_features: I.
        dtype: of the product.
        values_dtype: of the values.
        device: index of the GPU.
    """
    if reason := _why_no_compiler():
        return reason
    most = max(_GROUPED if _has_wgmma(device) else _CUTS)
    if tokens > most:
        return f"{tokens} tokens, the decode kernel takes up to {most}"
    if tokens > _MANY_TOKENS and tokens * out_features > _MOST_RESULTS:
        few = _MANY_TOKENS
        while 2 * few * out_features <= _MOST_RESULTS:
            few *= 2
        return f"{tokens} tokens, the decode kernel takes up to {few} of {out_features} outputs"
    if in_features % _MULTIPLE:
        return f"in_features={in_features} is not divisible by {_MULTIPLE}"
    if out_features % 4:
        return f"out_features={out_features} is not divisible by 4"
    if values_dtype != dtype:
        names = (str(each).removeprefix("torch.") for each in (values_dtype, dtype))
        return "the kernel casts nothing, and {} values are needed as {}".format(*names)
    if not cuts_for(tokens, device):
        memory = f"the GPU's {_shared_memory(device)} bytes of shared memory"
        return f"{tokens} tokens take more than {memory}"
    return None


@functools.cache
def _why_no_compiler() -> str | None:
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if version < _FIRST_CUDA:
        return f"CUDA {torch.version.cuda} compiles no mma.sp::ordered_metadata, CUDA 12.5 does"
    return nvrtc.why_missing()


def constants(launch: MmaLaunch, dtype: torch.dtype) -> dict[str, int | str]:
    """What ``decode.cu`` is compiled with."""
    names = ("NT", "MT", "WM", "WK", "STAGES")
    return (
        dict(zip(names, launch, strict=False))
        | _operands(launch.token_tiles)
        | {
            "BF16": int(dtype == torch.bfloat16),
            "GROUPED": int(launch.grouped),
            "TMA": int(launch.tma),
            "ADAPTED": int(launch.tma and launch.low_splits > 0),
            "STAYS": int(launch.stays),
        }
    )


def _operands(token_tiles: int) -> dict[str, str]:
    """How wgmma is written for a number of sums."""
    sums, tiles = 4 * token_tiles, range(token_tiles)
    given = [f"%{i}" for i in range(sums + 7)]
    a, x, metadata, pair = given[sums : sums + 4], *given[sums + 4 :]
    return {
        "SHAPE": f'"m64n{8 * token_tiles}"',
        "SUMS": ", ".join(f'"+f"(d[{tile}][{i}])' for tile in tiles for i in range(4)),
        "OPERANDS": f'"{{{", ".join(given[:sums])}}}, {{{", ".join(a)}}}, {x}"',
        "METADATA": f'"{metadata}, {pair}"',
    }


@functools.cache
def _kernel(launch: MmaLaunch, dtype: torch.dtype, device: int) -> nvrtc.Kernel:
    own = "a" if launch.grouped else ""  # instructions of this architecture alone
    return nvrtc.Kernel(_SOURCE, "slope_decode", constants(launch, dtype), launch.shared, own)


def decode_mma(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    launch: MmaLaunch,
) -> Tensor:
    """``Y = X (W^R)ᵀ + b + scale * (X downᵀ) upᵀ`` for few tokens, in one or two launches.

    Blocks that share the columns of a tile form a cluster and add their sums themselves; GPUs
    without clusters (before compute capability 9.0), and more splits than a cluster may have, take
    a second launch for that, as an adapter always does. Where there are clusters, a launch may
    begin before the kernel ahead of it in the stream has ended, and waits for it before it reads.
    Sums are made in fp32, in an order that depends on shapes and the launch alone. X downᵀ is
    rounded to the dtype of X, as two products would. The caller has asked :func:`why_no_mma`;
    tensors are on the current GPU.

    Args:
        x: (T, I), bf16 or fp16; rows contiguous, any stride between them.
        values: (O, I/2), dtype of ``x``, contiguous.
        metadata: (O, I/8) uint8, contiguous.
        bias: (O,), dtype of ``x``, or None.
        down: (R, I), dtype of ``x``, contiguous, or None with ``up``.
        up: (O, R), dtype of ``x``, contiguous.
        scale: factor of the adapter, one that :func:`adds_adapter` allows.
        launch: how to cut the work, one of :func:`launches` for such shapes and rank; with an
            adapter it splits down.

    Returns:
        (T, O), dtype of ``x``. Moves the weight once for the tokens of a block, and partial sums in
        fp32 where the work is split or an adapter is added. An operand that begins at no multiple
        of 16 bytes is copied.

    Raises:
        RuntimeError: if the kernel cannot be compiled, loaded or launched.
    """
    (tokens, in_features), out_features = x.shape, values.shape[0]
    y = x.new_empty((tokens, out_features))
    if not tokens or not out_features:
        return y
    rank, device = 0 if up is None else up.shape[1], x.get_device()
    plan = _plan(launch, tokens, out_features, in_features, rank, x.dtype, device)
    partial = low_partial = z = None
    if plan.slabs:
        partial = x.new_empty((plan.slabs, tokens, out_features), dtype=torch.float32)
    x = x if x.stride(0) % 8 == 0 else x.contiguous()
    x, values, metadata = _aligned(x), _aligned(values), _aligned(metadata)
    stream = torch._C._cuda_getCurrentRawStream(device)
    if up is not None and down is not None:
        down, up = _aligned(down), _aligned(up)
        if plan.ahead is not None:
            z = x.new_empty((tokens, rank))
            alone = 0, 0, x.data_ptr(), 0, down.data_ptr(), 0, 0, 0, z.data_ptr()
            plan.ahead.launch(alone, x, 1.0, stream)
        else:
            low_partial = x.new_empty((launch.low_splits, tokens, rank), dtype=torch.float32)
    pointers = (
        values.data_ptr(), metadata.data_ptr(), x.data_ptr(), _pointer(bias), _pointer(down),
        y.data_ptr() if partial is None else 0, _pointer(partial), _pointer(low_partial), 0,
    )  # fmt: skip
    maps = b""
    if launch.tma:
        maps = _maps(launch, x, values, metadata, up, z, y if plan.boxes else None)
    plan.launch(pointers, x, scale, stream, maps)
    if partial is not None:
        left = (low_partial, up) if plan.ahead is None else (None, None)
        finish(partial, *left, bias, y, scale, early=plan.early)
    return y


class _Plan(NamedTuple):
    """What does not depend on addresses.

    Attributes:
        kernel: compiled.
        blocks: of the grid.
        threads: of a block.
        cluster: blocks of a cluster.
        early: whether it may begin before the kernel ahead of it has ended.
        sizes: tokens to low_splits of the arguments.
        slabs: of partial sums, 0 where Y is written at once.
        ahead: the launch that makes X downᵀ for this one.
        boxes: whether TMA writes Y.
        x_first: as that of the launch.
    """

    kernel: nvrtc.Kernel
    blocks: int
    threads: int
    cluster: int
    early: bool
    sizes: tuple[int, int, int, int, int, int]
    slabs: int
    ahead: _Plan | None
    boxes: bool = False
    x_first: bool = False

    def launch(
        self, pointers: Sequence[int], x: Tensor, scale: float, stream: int, maps: bytes = b""
    ) -> None:
        """Of operands at addresses."""
        row = x.stride(0) * x.itemsize
        argument = _ARGUMENTS.pack(*pointers, row, *self.sizes, scale, self.boxes, self.x_first)
        if maps:
            argument = maps + argument + _PADDING
        self.kernel(self.blocks, self.threads, argument, stream, self.cluster, self.early)


@functools.lru_cache(maxsize=4096)
def _plan(
    launch: MmaLaunch,
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    device: int,
) -> _Plan:
    ahead, clusters = None, _has_clusters(device)
    low_splits, parts = launch.low_splits if rank else 0, launch.parts(tokens)
    if launch.tma and rank:
        cut = MmaLaunch(min(8, launch.token_tiles), 1, 4, 2, 3, grouped=True)
        kernel = _kernel(cut, dtype, device)
        together = 1 < low_splits <= LARGEST_CLUSTER and kernel.holds(cut.threads, low_splits)
        cluster = low_splits if together else 1
        blocks = -(-rank // cut.rows) * cut.parts(tokens) * cluster
        sizes = tokens, rank, in_features, rank, cluster, 0
        ahead = _Plan(kernel, blocks, cut.threads, cluster, True, sizes, 0, None)
        low_splits = 0
    cut = launch._replace(splits=1, low_splits=int(ahead is not None), x_first=False)
    kernel = _kernel(cut, dtype, device)
    splits = launch.splits
    together = clusters and 1 < splits <= LARGEST_CLUSTER and kernel.holds(launch.threads, splits)
    cluster = splits if together else 1
    final = splits == cluster and (rank == 0 or ahead is not None)
    low_blocks = -(-rank // launch.rows) * parts * low_splits
    blocks = -(-out_features // launch.rows) * parts * splits + -(-low_blocks // cluster) * cluster
    if launch.stays:
        blocks = min(blocks, _multiprocessors(device))
    sizes = tokens, out_features, in_features, rank, splits, low_splits
    slabs = 0 if final else splits // cluster
    boxes = launch.tma and final and cluster == 1 and out_features % _TMA_ROW == 0
    if launch.stays and not boxes:
        raise ValueError(
            f"{launch} cannot make {out_features} outputs: blocks that stay take all columns and a "
            f"multiple of {_TMA_ROW} outputs; take a launch without p."
        )
    how = slabs, ahead, boxes, launch.x_first
    return _Plan(kernel, blocks, launch.threads, cluster, clusters, sizes, *how)


def adds_adapter(launch: MmaLaunch, scale: float) -> bool:
    """Whether :func:`decode_mma` adds an adapter by such a launch; else two products are to."""
    return launch.low_splits > 0 and (not launch.tma or _SCALES[0] <= abs(scale) <= _SCALES[1])


def _maps(
    launch: MmaLaunch,
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    up: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
) -> bytes:
    """How the tensor memory accelerator finds tiles, in the order of the source."""
    kind = "bf16" if x.dtype == torch.bfloat16 else "fp16"

    def made(matrix: Tensor | None, rows: int) -> bytes:
        if matrix is None:
            return _NO_MAP
        height, width = matrix.shape
        # The stride of a single row may be anything, and contiguous() leaves it so.
        pitch = (matrix.stride(0) if height > 1 else width) * matrix.itemsize
        return nvrtc.tensor_map(matrix.data_ptr(), kind, width, height, pitch, 64, rows)

    rows, tokens = launch.rows, 8 * launch.token_tiles
    height, pitch = metadata.shape
    maps = made(values, rows)
    maps += nvrtc.tensor_map(metadata.data_ptr(), "u8", pitch, height, pitch, 16, rows)
    for matrix, of_box in ((x, tokens), (up, rows), (z, tokens), (y, tokens)):
        maps += made(matrix, of_box)
    return maps


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
