"""A product of many tokens on sparse tensor cores: ``gemm.cu``, compiled when it is first needed.

It takes cuSPARSELt's operand, and adds an adapter with the same sums, which cuSPARSELt cannot. T
tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slope.backends import nvrtc
from slope.backends.cusparselt.layout import TILE_COLUMNS, fits

_SOURCE = "gemm.cu"
_CAPABILITY = (9, 0)  # wgmma of this one alone
_BLOCKS, _ROWS, _THREADS = 2, 128, 384  # of a cluster; outputs and threads of a block
_TOKENS = 256  # of a block
_STAGES, _A_STAGES = 5, 3  # tiles of X and of W^R in flight
_PART, _BUFFERS = 32, 1  # tokens of Y that leave together, and how many of these at once
_BAND = 8  # pairs of tiles of outputs; 16 took as long, 2 up to 9 % longer
_RANK_MULTIPLE = 8  # TMA wants rows of whole 16 bytes
_SHARED = (
    _STAGES * (128 * _TOKENS + 16)
    + _A_STAGES * ((128 + 16) * _ROWS + 16)
    + 2 * _BUFFERS * 128 * _PART
    + 16  # a cluster's number
)
_CORNERS = 3
_NOWHERE = 2**31 - 1
# Behind seven ``CUtensorMap``, a multiple of 64 bytes.
_ARGUMENTS = struct.Struct(f"3Q 5i f {2 * _CORNERS}i 56x")
_RANKS = 64  # of Z that a block makes together
# By which Z can be multiplied: in fp16 it must neither overflow sooner nor lose digits.
_SCALES = {torch.bfloat16: (2.0**-60, 2.0**60), torch.float16: (2.0**-10, 1.0)}
JOINED = "joined"
WAYS = JOINED, "ahead"
"""Where X downᵀ is made: by the same launch, or by a product ahead of it."""
FEWEST_TOKENS = _TOKENS // 2 + 1
LEAST_COLUMNS = TILE_COLUMNS * _TOKENS // _PART
"""Of the operand: parts of Y leave beside a tile's first steps, which must be as many."""


def why_no_gemm(tokens: int, out_features: int, in_features: int, device: int) -> str | None:
    """Reason why :func:`gemm` cannot serve, or None.

    Args:
        tokens: the bucket of T.
        out_features: rows of the operand.
        in_features: its columns, before it was compressed.
        device: index of the GPU.
    """
    if torch.cuda.get_device_capability(device) != _CAPABILITY:
        return "the kernel is made for compute capability 9.0"
    if reason := nvrtc.why_missing():
        return reason
    if not fits(out_features, in_features):
        return f"the operand has whole tiles of 64, the layer is {out_features} x {in_features}"
    if in_features < LEAST_COLUMNS:
        return f"{in_features} columns, the kernel takes {LEAST_COLUMNS} or more"
    if tokens < FEWEST_TOKENS:
        return f"{tokens} tokens would leave half of the kernel's tiles of {_TOKENS} empty"
    return None


def takes_adapter(rank: int) -> bool:
    """Whether :func:`gemm` can add an adapter of this rank."""
    return rank > 0 and rank % _RANK_MULTIPLE == 0


def takes_scale(scale: float, dtype: torch.dtype) -> bool:
    """Whether Z can be rounded when it was multiplied by that scale."""
    low, high = _SCALES[dtype]
    return low <= abs(scale) <= high


def constants(dtype: torch.dtype, adapted: bool) -> dict[str, int | str]:
    """What ``gemm.cu`` is compiled with."""
    tiles = _TOKENS // 8
    half = tiles // 2
    sums, a, x, rest = _operands(tiles)
    half_sums, half_a, half_x, half_rest = _operands(half)
    return {
        "NT": tiles,
        "STAGES": _STAGES,
        "A_STAGES": _A_STAGES,
        "PART": _PART,
        "BUFFERS": _BUFFERS,
        "ADAPTED": int(adapted),
        "BF16": int(dtype == torch.bfloat16),
        "SHAPE": f'"m64n{_TOKENS}"',
        "SUMS": sums,
        "OPERANDS": f'"{a}, {x}"',
        "METADATA": f'"{rest[0]}, {rest[1]}"',
        "ADD": f'"{rest[2]}"',
        "DENSE_ADD": f'"{rest[0]}"',
        "HALF_SHAPE": f'"m64n{_TOKENS // 2}"',
        "HALF_SUMS": half_sums,
        "HALF_OPERANDS": f'"{half_a}, {half_x}"',
        "HALF_ADD": f'"{half_rest[0]}"',
    }


def _operands(tiles: int) -> tuple[str, str, str, list[str]]:
    """Sums of wgmma as operands, their numbers, those of X and of what comes behind."""
    sums = ", ".join(f'"+f"(d[{tile}][{i}])' for tile in range(tiles) for i in range(4))
    given = [f"%{i}" for i in range(4 * tiles + 5)]
    a, x, *rest = given[4 * tiles :]
    return sums, f"{{{', '.join(given[: 4 * tiles])}}}, {a}", x, rest


@functools.cache
def _kernel(dtype: torch.dtype, adapted: bool, device: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(_SOURCE, "slope_gemm", constants(dtype, adapted), _SHARED, suffix="a")


def gemm(
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None,
    out_features: int,
    up: Tensor | None = None,
    z: Tensor | None = None,
    down: Tensor | None = None,
    scale: float = 1.0,
    corners: Sequence[int] = (),
) -> Tensor:
    """``Y = X (W^R)ᵀ + b [+ Z upᵀ]`` in one launch; sums in fp32, rounded once.

    Z is given, or made by the same launch: ``Z = scale * X downᵀ``, summed in fp32 and rounded to
    the dtype of X; a small launch ahead writes zeros to count by. The caller has asked
    :func:`why_no_gemm`, with an adapter :func:`takes_adapter`, and where Z is made
    :func:`takes_scale`; tensors are on the current GPU.

    Args:
        packed: (9/16 * O * I,), cuSPARSELt's operand, bf16 or fp16.
        x: (T, I), dtype of ``packed``. All matrices are copied that are not contiguous or begin at
            no multiple of 16 bytes.
        bias: (O,), likewise, or None.
        out_features: O.
        up: (O, R), likewise, or None without an adapter.
        z: (T, R), likewise, or None where it shall be made.
        down: (R, I), likewise, or None where ``z`` is given.
        scale: of the adapter, where Z is made.
        corners: where ``up`` is blocks on a diagonal with zeros beside them: output and rank at
            which the second begins, the third, and so on. Most of what is zero is not read then.

    Returns:
        (T, O), dtype of ``x``.

    Raises:
        ValueError: if the operand is too narrow or has no whole tiles, what is given of an
            adapter is not ``up`` with one of ``z`` and ``down``, of these shapes and that dtype,
            or the corners do not lie in ``up``, each below and right of the one before.
        RuntimeError: if the kernel cannot be compiled, loaded or launched.
    """
    tokens, in_features = x.shape
    if in_features < LEAST_COLUMNS or not fits(out_features, in_features):
        raise ValueError(
            f"an operand of {out_features} x {in_features} has fewer than {LEAST_COLUMNS} columns "
            "or no whole tiles of 64; use another path"
        )
    rank = 0 if up is None else up.shape[1]
    _check_adapter(x, {"up": up, "z": z, "down": down}, out_features, rank)
    _check_corners(corners, out_features, rank)
    y = x.new_empty((tokens, out_features))
    if not y.numel():
        return y
    device = x.device.index
    packed, x = _readable(packed), _readable(x)
    bias = None if bias is None else bias.contiguous()
    values = packed[: out_features * in_features // 2].view(out_features, in_features // 2)
    up, z, down = (None if each is None else _readable(each) for each in (up, z, down))
    parts, made = -(-tokens // _TOKENS), None
    makings = 0 if down is None else -(-rank // _RANKS) * -(-parts // _BLOCKS)  # a cluster each
    if makings:
        z = x.new_empty((tokens, rank))
        made = x.new_zeros(1 + _BLOCKS * -(-parts // _BLOCKS), dtype=torch.int32)
    share = _TOKENS // _BLOCKS
    boxes = (
        (values, _ROWS), (x, share), (y, _PART), (up, _ROWS), (z, share), (down, _RANKS),
        (None if made is None else z, _PART),
    )  # fmt: skip
    maps = b"".join(bytes(128) if each is None else _map(each, rows) for each, rows in boxes)
    argument = maps + _ARGUMENTS.pack(
        packed.data_ptr() + 2 * values.numel(), 0 if bias is None else bias.data_ptr(),
        0 if made is None else made.data_ptr(), tokens, out_features, in_features, rank, _BAND,
        scale, *_corner_table(corners),
    )  # fmt: skip
    tiles = -(-out_features // (_BLOCKS * _ROWS)) * parts
    gpu: Any = torch.cuda.get_device_properties(device)
    clusters = makings + max(1, min(tiles, gpu.multi_processor_count // _BLOCKS))
    _kernel(x.dtype, up is not None, device)(
        _BLOCKS * clusters, _THREADS, argument, torch._C._cuda_getCurrentRawStream(device),
        cluster=_BLOCKS, early=True,
    )  # fmt: skip
    return y


def gemm_with_adapter(
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None,
    out_features: int,
    down: Tensor,
    up: Tensor,
    scale: float,
    way: str,
    corners: Sequence[int] = (),
) -> Tensor:
    """:func:`gemm` with ``scale * X downᵀ`` made in one of :data:`WAYS`, without gradients.

    The caller has asked what :func:`gemm` wants to be asked.

    Args:
        packed: as there.
        x: (T, I).
        bias: as there.
        out_features: O.
        down: (R, I), dtype of ``x``.
        up: (O, R), dtype of ``x``.
        scale: of the adapter.
        way: where X downᵀ is made.
        corners: as there.

    Returns:
        (T, O), dtype of ``x``.
    """
    if way == JOINED:
        return gemm(packed, x, bias, out_features, up, None, down, scale, corners)
    z = x.new_empty((x.shape[0], up.shape[1]))
    torch.addmm(z, x, down.t(), beta=0, alpha=scale, out=z)
    return gemm(packed, x, bias, out_features, up, z, corners=corners)


def _check_corners(corners: Sequence[int], out_features: int, rank: int) -> None:
    outputs, ranks = list(corners[::2]), list(corners[1::2])
    if not corners:
        return
    for found, most in ((outputs, out_features), (ranks, rank)):
        bounds = [0, *found, most]
        if len(outputs) != len(ranks) or bounds != sorted(set(bounds)):
            raise ValueError(
                f"corners={tuple(corners)} are not outputs and ranks in turns, rising, within "
                f"{out_features} x {rank}; give where each block of up begins but the first"
            )


def _corner_table(corners: Sequence[int]) -> list[int]:
    """The argument of the kernel: outputs, then ranks; more than it takes count as none."""
    outputs, ranks = list(corners[::2]), list(corners[1::2])
    if len(outputs) > _CORNERS:
        outputs, ranks = [], []
    unused = [_NOWHERE] * (_CORNERS - len(outputs))
    return [*outputs, *unused, *ranks, *unused]


def _check_adapter(
    x: Tensor, given: dict[str, Tensor | None], out_features: int, rank: int
) -> None:
    """TMA would read what does not fit as zeros or as other numbers."""
    names = {name for name, each in given.items() if each is not None}
    if names not in (set(), {"up", "z"}, {"up", "down"}):
        raise ValueError(
            f"an adapter is up with z or with down, not {', '.join(sorted(names))}; give it so"
        )
    tokens, in_features = x.shape
    sizes = {"up": (out_features, rank), "z": (tokens, rank), "down": (rank, in_features)}
    for name, each in given.items():
        wanted = sizes[name], x.dtype, x.device
        if each is not None and (each.shape, each.dtype, each.device) != wanted:
            raise ValueError(
                f"{name} is {tuple(each.shape)} in {each.dtype} on {each.device}; give it as "
                f"{wanted[0]} in {x.dtype} on {x.device}"
            )


def _readable(matrix: Tensor) -> Tensor:
    """As the tensor memory accelerator reads it: contiguous, from a multiple of 16 bytes on."""
    if matrix.is_contiguous() and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _map(matrix: Tensor, rows: int) -> bytes:
    """Of boxes of 64 columns."""
    kind = "bf16" if matrix.dtype == torch.bfloat16 else "fp16"
    height, width = matrix.shape
    pitch = width * matrix.itemsize
    return nvrtc.tensor_map(matrix.data_ptr(), kind, width, height, pitch, 64, rows)
