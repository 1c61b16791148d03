"""The 2:4 products as operators: functions for eager mode, custom ops for ``torch.compile``.

Each does one product by the path that :mod:`.tuning` found fastest. Operands are derived from the
values in every call and thrown away: nothing can go stale, whatever an optimizer writes, and no
memory is held between calls. Making one costs a few per cent of a product (``slope bench setup``).

Shape letters: T tokens, I = d_in, O = d_out, R rank of an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slope.backends.base import AdapterTerm, SparseWeight
from slope.backends.choices import ChoiceStore
from slope.backends.cusparselt import layout
from slope.backends.cusparselt.plans import TOKEN_MULTIPLE
from slope.backends.dense import DenseBackend
from slope.backends.support import machine, why_no_cusparselt
from slope.backends.tuning import Choice, ProductKey, Tuner, bucket

_REFERENCE = DenseBackend()


@functools.cache
def tuner() -> Tuner:
    """The choices of this process."""
    return Tuner(ChoiceStore(), machine())


def sparse_linear_forward(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    column_mask: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    only: str,
) -> Tensor:
    """Y = X (W^R)ᵀ + b [+ scale (X downᵀ) upᵀ].

    Args:
        x: (T, I), bf16 or fp16 where kernels shall serve.
        values: (O, I/2), any float dtype.
        metadata: (O, I/8) uint8.
        column_mask: (O, I/16) uint8; read by the backward only.
        packed: cuSPARSELt's operand of these values in the dtype of ``x``, or None.
        bias: (O,), dtype of ``x``, or None.
        down: (R, I), dtype of ``x``, or None.
        up: (O, R), dtype of ``x``, or None.
        scale: of the adapter.
        only: a path's name, or empty for the fastest.

    Returns:
        (T, O), dtype of ``x``.
    """
    out_features, in_features = values.shape[0], x.shape[1]
    adapter = None if down is None or up is None else AdapterTerm(down, up, scale)
    weight = SparseWeight(values, metadata, column_mask, layout.PATTERN, in_features)
    if not x.is_cuda:
        return _REFERENCE.forward(x, weight, bias, None, adapter)
    x = x.contiguous()

    def operand() -> Tensor:
        return _kernels().pack_rows(values, metadata, x.dtype) if packed is None else packed

    def cusparselt(algorithm: int | None) -> Tensor:
        if adapter is None:
            return _products().matmul(operand(), x, bias, out_features, algorithm)
        term = _kernels().low_rank(x, down, up, scale)
        if x.shape[0] % TOKEN_MULTIPLE:
            return term.add_(_products().matmul(operand(), x, bias, out_features, algorithm))
        return _products().matmul(operand(), x, bias, out_features, algorithm, term)

    def dense(algorithm: int | None) -> Tensor:
        w_r = _kernels().expand(values, metadata, None, x.dtype)
        y = torch.nn.functional.linear(x, w_r, bias)
        return y if adapter is None else y.add_(_kernels().low_rank(x, down, up, scale))

    def search() -> int:
        return _products().search(operand(), _padded(x), bias, out_features)

    rank = 0 if up is None else up.shape[1]
    quick = (
        "forward", out_features, in_features, x.shape[0], x.dtype, values.dtype,
        packed is not None, rank, only, x.device,
    )  # fmt: skip
    return _run(quick, {"cusparselt": cusparselt, "dense": dense}, search)


def sparse_input_gradient_forward(
    dy: Tensor, values: Tensor, metadata: Tensor, column_mask: Tensor, only: str
) -> Tensor:
    """∇X = ∇Y W^{R,C}.

    Args:
        dy: (T, O), bf16 or fp16 where kernels shall serve.
        values: (O, I/2), any float dtype.
        metadata: (O, I/8) uint8.
        column_mask: (O, I/16) uint8.
        only: a path's name, or empty for the fastest.

    Returns:
        (T, I), dtype of ``dy``.
    """
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    if not dy.is_cuda:
        weight = SparseWeight(values, metadata, column_mask, layout.PATTERN, in_features)
        return _REFERENCE.input_gradient(dy, weight)
    dy = dy.contiguous()

    def operand() -> Tensor:
        return _kernels().pack_columns(values, metadata, column_mask, dy.dtype)

    def cusparselt(algorithm: int | None) -> Tensor:
        return _products().matmul(operand(), dy, None, in_features, algorithm)

    def dense(algorithm: int | None) -> Tensor:
        return dy @ _kernels().expand(values, metadata, column_mask, dy.dtype)

    def search() -> int:
        return _products().search(operand(), _padded(dy), None, in_features)

    quick = (
        "input_gradient", out_features, in_features, dy.shape[0], dy.dtype, values.dtype,
        False, 0, only, dy.device,
    )  # fmt: skip
    return _run(quick, {"cusparselt": cusparselt, "dense": dense}, search)


def values_gradient_forward(dy: Tensor, x: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """∇values = (∇Yᵀ X)[kept]: a dense product, then one pass that keeps half of it.

    Args:
        dy: (T, O).
        x: (T, I), dtype of ``dy``.
        metadata: (O, I/8) uint8.
        dtype: of the values.

    Returns:
        (O, I/2), ``dtype``.
    """
    if not dy.is_cuda:
        values = torch.empty((dy.shape[1], x.shape[1] // 2), dtype=dtype)
        weight = SparseWeight(values, metadata, metadata, layout.PATTERN, x.shape[1])
        return _REFERENCE.values_gradient(dy, x, weight)
    return _kernels().gather_gradient(dy.t() @ x, metadata, dtype)


def column_mask_forward(values: Tensor, metadata: Tensor, out: Tensor | None = None) -> Tensor:
    """The packed column mask by the magnitudes of the values as they are now.

    Args:
        values: (O, I/2), any float dtype.
        metadata: (O, I/8) uint8.
        out: (O, I/16) uint8 to write to on a GPU, or None.

    Returns:
        (O, I/16) uint8.
    """
    if not values.is_cuda:
        mask = metadata.new_empty((values.shape[0], values.shape[1] // 8))
        _REFERENCE.refresh_column_mask(
            SparseWeight(values, metadata, mask, layout.PATTERN, 2 * values.shape[1])
        )
        return mask
    return _kernels().select_column_mask(values, metadata, out)


def _run(
    product: tuple[Any, ...],
    paths: dict[str, Callable[[int | None], Tensor]],
    search: Callable[[], int],
) -> Tensor:
    """Do a product by the path asked for or by the fastest, known after the first call."""
    choice = _chosen().get(product)
    if choice is None:
        choice = _choose(product, paths, search)
    return paths[choice.path](choice.algorithm)


def _choose(
    product: tuple[Any, ...],
    paths: dict[str, Callable[[int | None], Tensor]],
    search: Callable[[], int],
) -> Choice:
    (
        operation,
        out_features,
        in_features,
        tokens,
        dtype,
        values_dtype,
        aliased,
        rank,
        only,
        device,
    ) = product
    reason = why_no_cusparselt(device.index, dtype)
    if reason is None and not layout.fits(out_features, in_features):
        shape = f"{out_features} x {in_features}"
        reason = f"cuSPARSELt's operands have whole tiles of 64, the layer is {shape}"
    if only not in ("", "dense") and reason is not None:
        raise RuntimeError(
            f"backend={only!r} cannot serve this layer: {reason}; use backend='auto'."
        )
    if only == "dense":
        choice = Choice("dense")
    elif reason is not None:
        choice = Choice("dense", refused={"cusparselt": reason})
    else:
        key = ProductKey(
            operation, out_features, in_features, bucket(tokens), _name(dtype),
            _name(values_dtype), aliased, rank,
        )  # fmt: skip
        wanted = {only: paths[only]} if only else paths
        choice = tuner().choose(key, wanted, search, _can_measure)
        if not _can_measure():
            return choice  # made for want of a measurement; the next call may have one
    _chosen()[product] = choice
    return choice


@functools.cache
def _chosen() -> dict[tuple[Any, ...], Choice]:
    """Choices by the exact product, so that a known one costs one look-up."""
    return {}


def _can_measure() -> bool:
    return not torch.cuda.is_current_stream_capturing()


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TOKEN_MULTIPLE))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _products() -> Any:
    from slope.backends.cusparselt.plans import products

    return products()


@functools.cache
def _kernels() -> Any:
    from slope.backends.cusparselt import kernels

    return kernels


# --- custom ops ----------------------------------------------------------------------------------


@torch.library.custom_op("slope::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    column_mask: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    only: str,
) -> Tensor:
    """:func:`sparse_linear_forward` as an op; its gradients are those of SLoPe."""
    return sparse_linear_forward(
        x, values, metadata, column_mask, packed, bias, down, up, scale, only
    )


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    column_mask: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    only: str,
) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


@torch.library.custom_op("slope::sparse_input_gradient", mutates_args=())
def sparse_input_gradient(
    dy: Tensor, values: Tensor, metadata: Tensor, column_mask: Tensor, only: str
) -> Tensor:
    """:func:`sparse_input_gradient_forward` as an op."""
    return sparse_input_gradient_forward(dy, values, metadata, column_mask, only)


@sparse_input_gradient.register_fake
def _(dy: Tensor, values: Tensor, metadata: Tensor, column_mask: Tensor, only: str) -> Tensor:
    return dy.new_empty((dy.shape[0], 2 * values.shape[1]))


@torch.library.custom_op("slope::values_gradient", mutates_args=())
def values_gradient(dy: Tensor, x: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`values_gradient_forward` as an op."""
    return values_gradient_forward(dy, x, metadata, dtype)


@values_gradient.register_fake
def _(dy: Tensor, x: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[1], x.shape[1] // 2), dtype=dtype)


@torch.library.custom_op("slope::column_mask", mutates_args=())
def column_mask(values: Tensor, metadata: Tensor) -> Tensor:
    """:func:`column_mask_forward` as an op."""
    return column_mask_forward(values, metadata)


@column_mask.register_fake
def _(values: Tensor, metadata: Tensor) -> Tensor:
    return metadata.new_empty((values.shape[0], values.shape[1] // 8))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, metadata, column_mask_, _, bias, down, up, scale, only = inputs
    ctx.save_for_backward(x, values, metadata, column_mask_, down, up)
    ctx.scale, ctx.only, ctx.has_bias = scale, only, bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, metadata, column_mask_, down, up = ctx.saved_tensors
    dx = dvalues = dbias = ddown = dup = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.slope.sparse_input_gradient(dy, values, metadata, column_mask_, ctx.only)
    if ctx.needs_input_grad[1]:
        dvalues = torch.ops.slope.values_gradient(dy, x, metadata, values.dtype)
    if ctx.has_bias and ctx.needs_input_grad[5]:
        dbias = dy.sum(0)
    if down is not None:
        dlow = (dy @ up) * ctx.scale
        ddown, dup = dlow.t() @ x, (dy.t() @ (x @ down.t())) * ctx.scale
        if dx is not None:
            dx = dx + dlow @ down
    return dx, dvalues, None, None, None, dbias, ddown, dup, None, None


sparse_linear.register_autograd(_backward, setup_context=_keep_for_backward)
