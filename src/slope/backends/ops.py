"""The 2:4 products as operators: functions for eager mode, custom ops for ``torch.compile``.

Each does one product by the path that :mod:`.tuning` found fastest. Operands are derived from the
values in every call and thrown away: nothing can go stale, whatever an optimizer writes, and no
memory is held between calls. Making one costs a few per cent of a product (``slope bench setup``).
Frozen values alone lie in an operand that is kept.

Shape letters: T tokens, I = d_in, O = d_out, R rank of an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from slope.backends.base import AdapterTerm, SparseWeight
from slope.backends.choices import ChoiceStore
from slope.backends.cusparselt import layout
from slope.backends.cusparselt.plans import TOKEN_MULTIPLE
from slope.backends.decoding import decode, why_no_decode
from slope.backends.decoding_mma import (
    MmaLaunch,
    adds_adapter,
    decode_mma,
    launches,
    why_no_mma,
)
from slope.backends.dense import DenseBackend
from slope.backends.gemm import (
    WAYS,
    gemm,
    gemm_with_adapter,
    takes_adapter,
    takes_scale,
    why_no_gemm,
)
from slope.backends.support import machine, why_no_cusparselt
from slope.backends.tuning import DECODE_PATHS, Choice, ProductKey, Tuner, bucket

_REFERENCE = DenseBackend()
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Product(NamedTuple):
    """A product as it is called; the first call of each decides how all are done.

    Attributes:
        operation: ``"forward"`` or ``"input_gradient"``.
        out_features: O of the layer.
        in_features: I of the layer.
        tokens: T.
        dtype: of the product.
        values_dtype: of the parameter.
        aliased: whether the values lie in the packed operand already.
        rank: of an adapter computed along, 0 without.
        only: the path asked for, empty for the fastest.
        device: of all tensors.
        usual_scale: whether a kernel may multiply X downᵀ by the adapter's scale.
        corners: of the blocks that ``up`` consists of.
    """

    operation: str
    out_features: int
    in_features: int
    tokens: int
    dtype: torch.dtype
    values_dtype: torch.dtype
    aliased: bool
    rank: int
    only: str
    device: torch.device
    usual_scale: bool = True
    corners: tuple[int, ...] = ()


@functools.cache
def tuner() -> Tuner:
    """The choices of this process."""
    return Tuner(ChoiceStore(), machine())


def _on_its_device(product: Callable[_P, _R]) -> Callable[_P, _R]:
    """The product with its first tensor's GPU as the current one, where everything is launched."""

    @functools.wraps(product)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.cuda.device_of(args[0]):
            return product(*args, **kwargs)

    return run


@_on_its_device
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
    corners: Sequence[int] = (),
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
        corners: where ``up`` is blocks on a diagonal; see :class:`AdapterTerm`.

    Returns:
        (T, O), dtype of ``x``.
    """
    if not _on_gpu(x):
        adapter = None if down is None or up is None else AdapterTerm(down, up, scale)
        weight = SparseWeight(values, metadata, column_mask, layout.PATTERN, x.shape[1])
        return _REFERENCE.forward(x, weight, bias, None, adapter)
    rank = 0 if up is None else up.shape[1]
    product = Product(
        "forward", values.shape[0], x.shape[1], x.shape[0], x.dtype, values.dtype,
        packed is not None, rank, only, x.device, not rank or takes_scale(scale, x.dtype),
        tuple(corners),
    )  # fmt: skip
    x = x.contiguous()
    return _run(
        product, _Forward(x, values, metadata, packed, bias, down, up, scale, product.corners)
    )


class _Forward(NamedTuple):
    """A forward on a GPU; each path is a method, which takes one of its algorithms."""

    x: Tensor
    values: Tensor
    metadata: Tensor
    packed: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    scale: float
    corners: tuple[int, ...]

    def paths(self) -> tuple[str, ...]:
        """Names of the methods."""
        return "cusparselt", "gemm", "mma", "triton", "dense"

    def algorithms(self, product: Product) -> dict[str, Callable[[], Sequence[Any]]]:
        """Those that compete, by path."""

        def search() -> list[int | None]:
            x = _padded(self.x)
            return [_products().search(self._operand(), x, self.bias, product.out_features)]

        def ways() -> list[str | None]:
            return list(WAYS) if product.usual_scale and takes_adapter(product.rank) else [None]

        def cuts() -> list[str]:
            sizes = product.out_features, product.in_features, product.rank
            return launches(bucket(product.tokens), *sizes, product.device.index)

        return {"cusparselt": search, "gemm": ways, "mma": cuts}

    def cusparselt(self, algorithm: int | None) -> Tensor:
        out_features = self.values.shape[0]
        given = self._operand(), self.x, self.bias, out_features, algorithm
        return self._with_adapter(_products().matmul(*given))

    def gemm(self, way: str | None) -> Tensor:
        given = self._operand(), self.x, self.bias, self.values.shape[0]
        if self.down is None or self.up is None or way is None:
            return self._with_adapter(gemm(*given))
        return gemm_with_adapter(*given, self.down, self.up, self.scale, way, self.corners)

    def mma(self, algorithm: str) -> Tensor:
        launch, scale = MmaLaunch.parse(algorithm), self.scale
        given = self.x, self.values, self.metadata, self.bias
        if self.up is None or adds_adapter(launch, scale):
            return decode_mma(*given, self.down, self.up, scale, launch)
        return self._with_adapter(decode_mma(*given, None, None, scale, launch))

    def triton(self, _: None) -> Tensor:
        weight = self.values, self.metadata, self.bias
        return decode(self.x, *weight, self.down, self.up, self.scale)

    def dense(self, _: None) -> Tensor:
        w_r = _kernels().expand(self.values, self.metadata, None, self.x.dtype)
        return self._with_adapter(torch.nn.functional.linear(self.x, w_r, self.bias))

    def _operand(self) -> Tensor:
        if self.packed is not None:
            return self.packed
        packed: Tensor = _kernels().pack_rows(self.values, self.metadata, self.x.dtype)
        return packed

    def _with_adapter(self, y: Tensor) -> Tensor:
        if self.down is None or self.up is None:
            return y
        # cuSPARSELt could add it as beta * C, but then takes 1.27 to 1.45 times as long at best.
        return y.addmm_(self.x @ self.down.t(), self.up.t(), alpha=self.scale)


@_on_its_device
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
    if not _on_gpu(dy):
        weight = SparseWeight(values, metadata, column_mask, layout.PATTERN, in_features)
        return _REFERENCE.input_gradient(dy, weight)
    product = Product(
        "input_gradient", out_features, in_features, dy.shape[0], dy.dtype, values.dtype,
        False, 0, only, dy.device,
    )  # fmt: skip
    return _run(product, _InputGradient(dy.contiguous(), values, metadata, column_mask))


class _InputGradient(NamedTuple):
    """An input gradient on a GPU; each path is a method, which takes one of its algorithms."""

    dy: Tensor
    values: Tensor
    metadata: Tensor
    column_mask: Tensor

    def paths(self) -> tuple[str, ...]:
        """Names of the methods."""
        return "cusparselt", "gemm", "dense"

    def algorithms(self, product: Product) -> dict[str, Callable[[], Sequence[Any]]]:
        """Those that compete, by path."""

        def search() -> list[int | None]:
            dy = _padded(self.dy)
            return [_products().search(self._operand(), dy, None, product.in_features)]

        return {"cusparselt": search}

    def cusparselt(self, algorithm: int | None) -> Tensor:
        in_features = 2 * self.values.shape[1]
        given = self._operand(), self.dy, None, in_features, algorithm
        dx: Tensor = _products().matmul(*given)
        return dx

    def gemm(self, _: None) -> Tensor:
        return gemm(self._operand(), self.dy, None, 2 * self.values.shape[1])

    def dense(self, _: None) -> Tensor:
        masks = self.metadata, self.column_mask
        dx: Tensor = self.dy @ _kernels().expand(self.values, *masks, self.dy.dtype)
        return dx

    def _operand(self) -> Tensor:
        masks = self.metadata, self.column_mask
        packed: Tensor = _kernels().pack_columns(self.values, *masks, self.dy.dtype)
        return packed


@_on_its_device
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
    if not _on_gpu(dy):
        values = torch.empty((dy.shape[1], x.shape[1] // 2), dtype=dtype)
        weight = SparseWeight(values, metadata, metadata, layout.PATTERN, x.shape[1])
        return _REFERENCE.values_gradient(dy, x, weight)
    return _kernels().gather_gradient(dy.t() @ x, metadata, dtype)


@_on_its_device
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


@_on_its_device
def packed_operand(values: Tensor, metadata: Tensor) -> Tensor | None:
    """The operand of W^R in cuSPARSELt's layout, or None where that cannot be used.

    Args:
        values: (O, I/2), bf16 or fp16.
        metadata: (O, I/8) uint8.

    Returns:
        (9/16 * O * I,), dtype of ``values``: first the values, then their places.
    """
    out_features, kept = values.shape
    if not values.is_cuda or not _can_measure() or not layout.fits(out_features, 2 * kept):
        return None
    if why_no_cusparselt(values.device.index, values.dtype) is not None:
        return None
    packed: Tensor = _kernels().pack_rows(values, metadata, values.dtype)
    return packed


def _run(product: Product, call: _Forward | _InputGradient) -> Tensor:
    """Do a product by the path asked for or by the fastest, known after the first call."""
    choice = _chosen().get(product)
    if choice is None:
        choice = _choose(product, call)
    y: Tensor = getattr(call, choice.path)(choice.algorithms.get(choice.path))
    return y


def _choose(product: Product, call: _Forward | _InputGradient) -> Choice:
    only = product.only
    if not _can_measure():
        if only not in ("", "dense"):
            raise RuntimeError(
                f"backend={only!r} must see a product once before it is captured in a CUDA graph; "
                "run the model before the capture."
            )
        return Choice("dense")  # not kept: the next call may measure
    names = dict.fromkeys((*call.paths(), only))
    refused = {name: reason for name in names if (reason := _why_not(name, product))}
    if "mma" in call.paths() and not DECODE_PATHS & refused.keys() and only != "triton":
        # It takes seconds to compile for a shape, and was the slower one at every shape measured.
        refused["triton"] = "mma does the same by a faster kernel"
    wanted = {name: getattr(call, name) for name in call.paths() if name not in refused}
    choice = Choice("dense")
    if len(wanted) > 1 and only != "dense":
        key = ProductKey(
            product.operation, product.out_features, product.in_features, bucket(product.tokens),
            _name(product.dtype), _name(product.values_dtype), product.aliased, product.rank,
            product.usual_scale, ",".join(map(str, product.corners)),
        )  # fmt: skip
        choice = tuner().choose(key, wanted, call.algorithms(product))
    choice = replace(choice, path=only or choice.path, refused=refused | dict(choice.refused))
    if choice.path in choice.refused:
        raise RuntimeError(
            f"backend={only!r} cannot serve this layer: {choice.refused[choice.path]}; "
            "use backend='auto'."
        )
    _chosen()[product] = choice
    return choice


def _why_not(path: str, product: Product) -> str | None:
    """Reason why a path cannot do a product, or None."""
    if path in DECODE_PATHS and product.operation != "forward":
        return "the decode kernel does the forward alone"
    if path == "mma":
        return why_no_mma(
            bucket(product.tokens), product.out_features, product.in_features, product.dtype,
            product.values_dtype, product.device.index,
        )  # fmt: skip
    if path == "gemm":
        rows, columns = product.out_features, product.in_features
        if product.operation == "input_gradient":
            rows, columns = columns, rows
        return why_no_gemm(bucket(product.tokens), rows, columns, product.device.index)
    if path == "triton":
        return why_no_decode(product.tokens, product.in_features)
    if path == "cusparselt":
        if not layout.fits(product.out_features, product.in_features):
            shape = f"{product.out_features} x {product.in_features}"
            return f"cuSPARSELt's operands have whole tiles of 64, the layer is {shape}"
        return why_no_cusparselt(product.device.index, product.dtype)
    return None


@functools.cache
def _chosen() -> dict[Product, Choice]:
    """Choices by the exact product, so that a known one costs one look-up."""
    return {}


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _can_measure() -> bool:
    return not torch.cuda.is_current_stream_capturing()


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TOKEN_MULTIPLE))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def explain(
    weight: SparseWeight, tokens: int, dtype: torch.dtype, only: str = ""
) -> dict[str, Choice]:
    """How the forward and the input gradient of a weight on a GPU are done, and why.

    Args:
        weight: on the GPU.
        tokens: T; both products are done once on random operands.
        dtype: of the products.
        only: the path asked for, empty for the fastest.

    Returns:
        The choice of each operation.

    Raises:
        RuntimeError: if the path asked for cannot do it.
    """
    values = weight.values.detach()
    out_features, device = values.shape[0], values.device
    x = torch.randn(tokens, weight.in_features, dtype=dtype, device=device)
    dy = torch.randn(tokens, out_features, dtype=dtype, device=device)
    masks = weight.metadata, weight.column_mask
    sparse_linear_forward(x, values, *masks, None, None, None, None, 1.0, only)
    sparse_input_gradient_forward(dy, values, *masks, only)
    return {
        operation: _chosen()[
            Product(
                operation,
                out_features,
                weight.in_features,
                tokens,
                dtype,
                values.dtype,
                False,
                0,
                only,
                x.device,
            )  # fmt: skip
        ]
        for operation in ("forward", "input_gradient")
    }


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
    corners: list[int] | None = None,
) -> Tensor:
    """:func:`sparse_linear_forward` as an op; its gradients are those of SLoPe."""
    if packed is not None and packed.data_ptr() != values.data_ptr():
        packed = None  # other values since the graph was made
    return sparse_linear_forward(
        x, values, metadata, column_mask, packed, bias, down, up, scale, only, corners or ()
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
    corners: list[int] | None = None,
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
    x, values, metadata, column_mask_, _, bias, down, up, scale, only, _ = inputs
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
    return dx, dvalues, None, None, None, dbias, ddown, dup, None, None, None


sparse_linear.register_autograd(_backward, setup_context=_keep_for_backward)
