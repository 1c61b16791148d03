"""cuSPARSELt through ctypes: descriptors, plans and products, nothing compiled.

torch's own binding makes and destroys every descriptor and the plan in each call, about half a
millisecond of host work. Here they are made once and kept by their owner (:mod:`.plans`); a product
is then one C call. The library is the one that every CUDA build of torch ships.

The operand that is sparse must be A, so a layer is computed as Yᵀ = W Xᵀ; row-major X (T, I) and
Y (T, O) are column-major (I, T) and (O, T) for the library, so nothing is transposed in memory.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

# The opaque structs have 512 bytes in 0.8 and 0.10 and had 11024 in 0.6: room for both, aligned.
STRUCT_BYTES = 16384
ALIGNMENT = 64

STATUS_SUCCESS = 0
ORDER_COL, ORDER_ROW = 1, 2  # cusparseOrder_t
OP_NON_TRANSPOSE = 0  # cusparseOperation_t
SPARSITY_50_PERCENT = 0  # cusparseLtSparsity_t
COMPUTE_32F = 2  # cusparseComputeType
ALG_DEFAULT = 0  # cusparseLtMatmulAlg_t
MATMUL_BIAS_POINTER = 8  # cusparseLtMatmulDescAttribute_t
ALG_CONFIG_ID, ALG_CONFIG_MAX_ID = 0, 1  # cusparseLtMatmulAlgAttribute_t
DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
ADDRESS_ALIGNMENT = 16  # bytes, of every matrix

_FUNCTIONS = (
    "cusparseLtInit",
    "cusparseLtDestroy",
    "cusparseLtGetVersion",
    "cusparseLtDenseDescriptorInit",
    "cusparseLtStructuredDescriptorInit",
    "cusparseLtMatDescriptorDestroy",
    "cusparseLtMatmulDescriptorInit",
    "cusparseLtMatmulDescSetAttribute",
    "cusparseLtMatmulAlgSelectionInit",
    "cusparseLtMatmulAlgSelectionDestroy",
    "cusparseLtMatmulAlgSetAttribute",
    "cusparseLtMatmulAlgGetAttribute",
    "cusparseLtMatmulPlanInit",
    "cusparseLtMatmulPlanDestroy",
    "cusparseLtMatmulGetWorkspace",
    "cusparseLtMatmulSearch",
    "cusparseLtMatmul",
)


class CusparseltError(RuntimeError):
    """A call of the library failed."""


class Struct:
    """Memory of one opaque struct, aligned; its address stays the same while this object lives."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(STRUCT_BYTES + ALIGNMENT)
        self.address = -(-ctypes.addressof(self._memory) // ALIGNMENT) * ALIGNMENT


class Library:
    """The C functions, with their argument types, and errors as exceptions.

    Args:
        functions: an object with the functions of ``cusparseLt.h`` as attributes: a
            :class:`ctypes.CDLL`, or a stand-in in tests.

    Raises:
        CusparseltError: if the library lacks one of the functions.
    """

    def __init__(self, functions: Any) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        signatures: dict[str, list[Any]] = {
            "cusparseLtInit": [pointer],
            "cusparseLtDestroy": [pointer],
            "cusparseLtGetVersion": [pointer, pointer],
            # handle, descriptor, rows, cols, ld, alignment, type, order [, sparsity]
            "cusparseLtDenseDescriptorInit": [pointer] * 2
            + [ctypes.c_int64] * 3
            + [ctypes.c_uint32, number, number],
            "cusparseLtStructuredDescriptorInit": [pointer] * 2
            + [ctypes.c_int64] * 3
            + [ctypes.c_uint32, number, number, number],
            "cusparseLtMatDescriptorDestroy": [pointer],
            # handle, descriptor, opA, opB, A, B, C, D, compute type
            "cusparseLtMatmulDescriptorInit": [pointer] * 2
            + [number] * 2
            + [pointer] * 4
            + [number],
            "cusparseLtMatmulDescSetAttribute": [pointer, pointer, number, pointer, size],
            "cusparseLtMatmulAlgSelectionInit": [pointer] * 3 + [number],
            "cusparseLtMatmulAlgSelectionDestroy": [pointer],
            "cusparseLtMatmulAlgSetAttribute": [pointer, pointer, number, pointer, size],
            "cusparseLtMatmulAlgGetAttribute": [pointer, pointer, number, pointer, size],
            "cusparseLtMatmulPlanInit": [pointer] * 4,
            "cusparseLtMatmulPlanDestroy": [pointer],
            "cusparseLtMatmulGetWorkspace": [pointer] * 3,
            # handle, plan, alpha, A, B, beta, C, D, workspace, streams, number of streams
            "cusparseLtMatmulSearch": [pointer] * 10 + [ctypes.c_int32],
            "cusparseLtMatmul": [pointer] * 10 + [ctypes.c_int32],
        }
        self._functions = {}
        for name in _FUNCTIONS:
            function = getattr(functions, name, None)
            if function is None:
                raise CusparseltError(f"this cuSPARSELt has no function {name}.")
            function.argtypes, function.restype = signatures[name], number
            self._functions[name] = function
        self.matmul = self._functions["cusparseLtMatmul"]

    def call(self, name: str, *arguments: Any) -> None:
        """Call one function.

        Raises:
            CusparseltError: if it does not return success.
        """
        status = self._functions[name](*arguments)
        if status != STATUS_SUCCESS:
            raise CusparseltError(f"{name} returned status {status}.")


class Handle:
    """A library handle; belongs to one device and one thread."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._struct = Struct()
        self.address = self._struct.address
        library.call("cusparseLtInit", self.address)

    def version(self) -> int:
        """The library's version, 800 for 0.8.0."""
        value = ctypes.c_int()
        self.library.call("cusparseLtGetVersion", self.address, ctypes.addressof(value))
        return value.value


class Plan:
    """D (T, O) = X (T, I) · Aᵀ [+ beta · D] [+ bias], A (O, I) compressed; all shapes fixed.

    Args:
        handle: of the thread that will run the plan.
        out_features: O.
        in_features: I.
        tokens: T.
        dtype: bf16 or fp16, of all operands; accumulated in fp32.
        bias: whether a bias (O,) is added in the epilogue.
        algorithm: the library's algorithm id, or None for its default.

    Raises:
        CusparseltError: if the library does not support it.
    """

    def __init__(
        self,
        handle: Handle,
        out_features: int,
        in_features: int,
        tokens: int,
        dtype: torch.dtype,
        bias: bool,
        algorithm: int | None = None,
    ) -> None:
        self._handle, self._library = handle, handle.library
        self._undo: list[tuple[str, Struct]] = []
        call, kind = self._library.call, DATA_TYPES[dtype]
        a, b, d, self._matmul, self._selection, plan = (Struct() for _ in range(6))
        sizes = (out_features, in_features, in_features)
        call(
            "cusparseLtStructuredDescriptorInit", handle.address, a.address, *sizes,
            ADDRESS_ALIGNMENT, kind, ORDER_ROW, SPARSITY_50_PERCENT,
        )  # fmt: skip
        self._undo.append(("cusparseLtMatDescriptorDestroy", a))
        for struct, rows in ((b, in_features), (d, out_features)):
            call(
                "cusparseLtDenseDescriptorInit", handle.address, struct.address, rows, tokens,
                rows, ADDRESS_ALIGNMENT, kind, ORDER_COL,
            )  # fmt: skip
            self._undo.append(("cusparseLtMatDescriptorDestroy", struct))
        call(
            "cusparseLtMatmulDescriptorInit", handle.address, self._matmul.address,
            OP_NON_TRANSPOSE, OP_NON_TRANSPOSE, a.address, b.address, d.address, d.address,
            COMPUTE_32F,
        )  # fmt: skip
        self._bias = ctypes.c_void_p(ADDRESS_ALIGNMENT)  # any address, replaced before each product
        if bias:
            self._set_bias(ADDRESS_ALIGNMENT)
        call(
            "cusparseLtMatmulAlgSelectionInit", handle.address, self._selection.address,
            self._matmul.address, ALG_DEFAULT,
        )  # fmt: skip
        self._undo.append(("cusparseLtMatmulAlgSelectionDestroy", self._selection))
        if algorithm is not None:
            number = ctypes.c_int(algorithm)
            call(
                "cusparseLtMatmulAlgSetAttribute", handle.address, self._selection.address,
                ALG_CONFIG_ID, ctypes.addressof(number), ctypes.sizeof(number),
            )  # fmt: skip
        call(
            "cusparseLtMatmulPlanInit", handle.address, plan.address, self._matmul.address,
            self._selection.address,
        )  # fmt: skip
        self._undo.append(("cusparseLtMatmulPlanDestroy", plan))
        self._structs = (a, b, d, plan)
        self._plan = plan.address
        self._run = self._library.matmul
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._alpha = ctypes.addressof(self._one)
        self._beta = ctypes.addressof(self._zero)
        self._stream = (ctypes.c_void_p * 1)()
        self._streams = ctypes.addressof(self._stream)
        self._read_workspace()

    def _read_workspace(self) -> None:
        size = ctypes.c_size_t()
        self._library.call(
            "cusparseLtMatmulGetWorkspace", self._handle.address, self._plan,
            ctypes.addressof(size),
        )  # fmt: skip
        self.workspace_bytes = size.value

    def _set_bias(self, address: int) -> None:
        # The plan refers to the product's descriptor, so the pointer may change between products.
        self._bias.value = address
        self._library.call(
            "cusparseLtMatmulDescSetAttribute", self._handle.address, self._matmul.address,
            MATMUL_BIAS_POINTER, ctypes.addressof(self._bias), ctypes.sizeof(self._bias),
        )  # fmt: skip

    def run(
        self,
        a: int,
        x: int,
        d: int,
        stream: int,
        workspace: int = 0,
        bias: int = 0,
    ) -> None:
        """One product, asynchronous on ``stream``; all arguments are addresses.

        Raises:
            CusparseltError: if the library reports an error.
        """
        if bias and bias != self._bias.value:
            self._set_bias(bias)
        self._stream[0] = stream
        status = self._run(
            self._handle.address, self._plan, self._alpha, a, x, self._beta, d, d,
            workspace, self._streams, 1,
        )  # fmt: skip
        if status != STATUS_SUCCESS:
            raise CusparseltError(f"cusparseLtMatmul returned status {status}.")

    def search(self, a: int, x: int, d: int, stream: int, workspace: int, bias: int = 0) -> int:
        """Let the library time its algorithms on these operands; synchronises.

        Returns:
            The id of the fastest, which this plan uses from now on.
        """
        if bias:
            self._set_bias(bias)
        self._stream[0] = stream
        self._library.call(
            "cusparseLtMatmulSearch", self._handle.address, self._plan, self._alpha, a, x,
            self._beta, d, d, workspace, self._streams, 1,
        )  # fmt: skip
        self._read_workspace()
        return self._attribute(ALG_CONFIG_ID)

    def algorithms(self) -> int:
        """How many algorithm ids there are for this product."""
        return self._attribute(ALG_CONFIG_MAX_ID)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._library.call(
            "cusparseLtMatmulAlgGetAttribute", self._handle.address, self._selection.address,
            attribute, ctypes.addressof(value), ctypes.sizeof(value),
        )  # fmt: skip
        return value.value

    def close(self) -> None:
        """Free what the library holds for this plan; it cannot be run afterwards."""
        while self._undo:
            name, struct = self._undo.pop()
            self._library.call(name, struct.address)


@functools.cache
def load_library() -> Library:
    """The library that torch has loaded, found once per process.

    Raises:
        OSError: if this torch comes without cuSPARSELt.
    """
    # torch links to it, so the loader returns that very copy.
    return Library(ctypes.CDLL("libcusparseLt.so.0"))
