"""Y for a few tokens, where the bytes of the weight decide: 9/16 of the dense ones at 2:4.

One launch multiplies; a second one adds the splits, the bias and the adapter where there are any.
T tokens, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 64
_FINISH_OUTPUTS = 64


class DecodeLaunch(NamedTuple):
    """How the first launch is cut up.

    Attributes:
        tokens: of a tile, a power of two; all tokens are in one tile.
        outputs: rows of W^R, or of down, of a program, a power of two.
        inputs: columns of a step, a power of two from 32.
        num_warps: per program.
        stages: steps in flight.
        max_splits: along I, at most.
        programs: that fill a GPU of 132 SMs; with far fewer tiles than this, I is split.
        tensor_cores: whether the tile is expanded and goes through them; they take 16 tokens and
            outputs at least.
    """

    tokens: int
    outputs: int
    inputs: int
    num_warps: int
    stages: int
    max_splits: int
    programs: int
    tensor_cores: bool


# Each the fastest of 10 to 30 cuts on an H200, by the sum over 4096 x 4096, 14336 x 4096 and 4096 x
# 14336. Multiplying at the kept places costs instructions per token, expanding costs them once.
# Tensor cores wait for each other's steps, so they want several programs on an SM.
_LAUNCHES = (
    DecodeLaunch(1, 16, 512, 4, 4, 8, 132, tensor_cores=False),
    DecodeLaunch(2, 8, 1024, 4, 4, 8, 132, tensor_cores=False),
    DecodeLaunch(16, 64, 128, 4, 3, 8, 512, tensor_cores=True),
    DecodeLaunch(32, 64, 128, 4, 3, 8, 512, tensor_cores=True),
    DecodeLaunch(64, 64, 128, 4, 3, 8, 256, tensor_cores=True),
)


def launch_for(tokens: int, itemsize: int) -> DecodeLaunch:
    """The cut for 1 to 64 tokens; ``itemsize`` is the larger of the inputs' and the values'.

    Every cut fits into the 99 KiB of shared memory that the smallest GPUs have (sm_86, sm_89).
    """
    launch = next(launch for launch in _LAUNCHES if tokens <= launch.tokens)
    # Steps of fp32 are twice as large; as many as of bf16 would not fit into shared memory.
    return launch._replace(stages=2) if itemsize > 2 else launch


def too_many_tokens(tokens: int) -> str | None:
    """Reason why no kernel of decoding takes so many, or None."""
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens, the decode kernel takes up to {MAX_TOKENS}"
    return None


def why_no_decode(tokens: int, in_features: int) -> str | None:
    """Reason why :func:`decode` cannot serve such a product, or None.

    Args:
        tokens: T.
        in_features: I.
    """
    if reason := too_many_tokens(tokens):
        return reason
    if in_features % 32:
        return f"in_features={in_features} is not divisible by 32, the decode kernel reads words"
    return None


def decode(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    launch: DecodeLaunch | None = None,
) -> Tensor:
    """``Y = X (W^R)ᵀ + b + scale * (X downᵀ) upᵀ`` for up to 64 tokens, in one or two launches.

    W^R is read once, compressed; sums are made in fp32, in an order that depends on shapes alone.
    X downᵀ is rounded to the dtype of X, as two products would. The caller has asked
    :func:`why_no_decode`.

    Args:
        x: (T, I), fp32, bf16 or fp16; rows contiguous, any stride between them.
        values: (O, I/2), any float dtype, contiguous; cast to the dtype of ``x``.
        metadata: (O, I/8) uint8, contiguous.
        bias: (O,), dtype of ``x``, or None.
        down: (R, I), dtype of ``x``, contiguous, or None with ``up``.
        up: (O, R), dtype of ``x``, contiguous.
        scale: factor of the adapter.
        launch: how to cut the work; None takes the table's.

    Returns:
        (T, O), dtype of ``x``. Moves the weight once, and partial sums in fp32 where the work is
        split or an adapter is added.
    """
    from slope.backends import decoding_kernels as device

    (tokens, in_features), out_features = x.shape, values.shape[0]
    y = x.new_empty((tokens, out_features))
    if not y.numel():
        return y
    cut = launch or launch_for(tokens, max(x.itemsize, values.itemsize))
    rank = 0 if up is None else up.shape[1]
    tiles = -(-out_features // cut.outputs) + -(-rank // cut.outputs)
    steps = -(-in_features // cut.inputs)
    wanted = max(1, (cut.programs + tiles // 2) // tiles)
    span = -(-steps // min(steps, cut.max_splits, wanted)) * cut.inputs
    splits = -(-in_features // span)
    final = splits == 1 and rank == 0
    partial = low_partial = None
    if not final:
        partial = x.new_empty((splits, tokens, out_features), dtype=torch.float32)
    if rank:
        low_partial = x.new_empty((splits, tokens, rank), dtype=torch.float32)
    constants = (bias is not None, rank > 0, final, cut.tokens, cut.outputs, cut.inputs, cut.stages)
    multiply = device.many if cut.tensor_cores else device.few
    assembly = (not multiply.interpreted,) if cut.tensor_cores else ()
    multiply(
        (tiles, splits, 1),
        (x, values, metadata, bias, down, y, partial, low_partial),
        (tokens, out_features, in_features, rank, x.stride(0), span),
        constants + assembly,
        num_warps=cut.num_warps,
    )
    if partial is not None:
        finish(partial, low_partial, up, bias, y, scale)
    return y


def finish(
    partial: Tensor,
    low_partial: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    scale: float,
    early: bool = False,
) -> None:
    """Add the splits, the bias and the adapter's second product; one launch.

    Args:
        partial: (splits, T, O) fp32.
        low_partial: (low_splits, T, R) fp32, or None with ``up``.
        up: (O, R), dtype of ``y``.
        bias: (O,), dtype of ``y``, or None.
        y: (T, O), written.
        scale: factor of the adapter.
        early: begin before the kernel that writes the sums has ended, and wait for it; compute
            capability 9.0 and later. A Triton that cannot begins after it.
    """
    from slope.backends import decoding_kernels as device

    early = early and device.CAN_BEGIN_EARLY
    splits, tokens, out_features = partial.shape
    rank = 0 if up is None else up.shape[1]
    block_t = 16 if tokens <= 16 else 32
    low_splits = 0 if low_partial is None else low_partial.shape[0]
    block_r = next((size for size in (16, 32, 64) if rank <= size), 128)
    device.finish(
        (-(-out_features // _FINISH_OUTPUTS), -(-tokens // block_t), 1),
        (partial, low_partial, up, bias, y),
        (tokens, out_features, rank, splits, low_splits, scale),
        (bias is not None, rank > 0, block_t, _FINISH_OUTPUTS, block_r, early),
        early=early,
    )
