"""CUDA C++ compiled at run time, for instructions that Triton does not have.

NVRTC comes with every CUDA build of torch, and the driver launches what it made: no toolchain, no
headers. A function is made once for each GPU and choice of constants.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that need not be asked for
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class NvrtcError(RuntimeError):
    """A kernel could not be compiled, loaded or launched."""


def why_missing() -> str | None:
    """Reason why nothing can be compiled, or None."""
    try:
        _compiler()
    except NvrtcError as error:
        return str(error)
    return None


@functools.cache
def _compiler() -> Any:
    """The library that torch was built with.

    Raises:
        NvrtcError: if there is none.
    """
    if torch.version.cuda is None:
        raise NvrtcError("this torch was built without CUDA, so it has no NVRTC")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NvrtcError(f"cannot load {name}: {error}") from None


def compile_source(name: str, constants: Mapping[str, int | str], architecture: str) -> bytes:
    """Machine code of a source file beside this module, and of those there that it includes.

    Args:
        name: of the file.
        constants: macros.
        architecture: for example ``"sm_90"``.

    Raises:
        NvrtcError: with the compiler's log, or if there is no compiler.
    """
    library = _compiler()
    macros = "".join(f"#define {macro} {value}\n" for macro, value in constants.items())
    text = _text(name)
    included = [file.encode() for file in re.findall(r'^#include "(.+)"$', text, re.MULTILINE)]
    names = (ctypes.c_char_p * len(included))(*included)
    headers = (ctypes.c_char_p * len(included))(
        *[_text(file.decode()).encode() for file in included]
    )
    source = f"{macros}#line 1\n{text}".encode()
    program = ctypes.c_void_p()

    def call(function: str, *arguments: Any) -> None:
        status = getattr(library, function)(*arguments)
        if status:
            raise NvrtcError(f"{function} returned {status} for {name}")

    def read(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, text)
        return text.raw

    call(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source,
        name.encode(),
        len(included),
        headers,
        names,
    )
    try:
        options = [f"--gpu-architecture={architecture}", "--std=c++17"]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if library.nvrtcCompileProgram(program, len(options), array):
            log = read("ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise NvrtcError(f"NVRTC cannot compile {name} for {architecture}: {log}")
        return read("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


_Bytes = ctypes.c_char_p * 1  # an array of a pointer to them


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``; its value takes 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


class Kernel:
    """A compiled function on the current GPU; launched with one struct.

    Args:
        source: file beside this module.
        function: ``extern "C"`` name.
        constants: macros.
        shared: bytes of dynamic shared memory.
        suffix: of the architecture, "a" for instructions that later ones need not have.

    Raises:
        NvrtcError: if it cannot be compiled or loaded, or needs more shared memory than there is.
    """

    def __init__(
        self,
        source: str,
        function: str,
        constants: Mapping[str, int | str],
        shared: int,
        suffix: str = "",
    ) -> None:
        major, minor = torch.cuda.get_device_capability()
        binary = compile_source(source, constants, f"sm_{major}{minor}{suffix}")
        self._driver = _driver()
        self._shared = shared
        self._holds: dict[tuple[int, int], bool] = {}
        self._configs: dict[tuple[int, int, int, int, bool], Any] = {}
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), binary)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, function.encode())
        if shared > _DEFAULT_SHARED:
            self._call(
                "cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, ctypes.c_int(shared)
            )

    def __call__(
        self,
        blocks: int,
        threads: int,
        argument: bytes,
        stream: int,
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        """Launch.

        Args:
            blocks: of the grid.
            threads: of a block.
            argument: the kernel's only parameter, as it stands in memory.
            stream: a CUDA stream's address.
            cluster: blocks that run together and read each other's shared memory; divides
                ``blocks``, compute capability 9.0 and later.
            early: blocks may begin before the kernel ahead of this one has ended, and wait for it
                themselves; compute capability 9.0 and later.

        Raises:
            NvrtcError: if the driver refuses.
        """
        pointers = _Bytes(argument)
        config = self._config(blocks, threads, cluster, stream, early)
        self._call("cuLaunchKernelEx", config, self._function, pointers, None)

    def holds(self, threads: int, cluster: int) -> bool:
        """Whether the GPU, or the part of it that is visible, has room for such a cluster."""
        key = threads, cluster
        if key not in self._holds:
            config, found = self._config(cluster, threads, cluster), ctypes.c_int()
            self._call("cuOccupancyMaxActiveClusters", ctypes.byref(found), self._function, config)
            self._holds[key] = found.value > 0
        return self._holds[key]

    def _config(
        self, blocks: int, threads: int, cluster: int, stream: int = 0, early: bool = False
    ) -> Any:
        """A reference to a ``CUlaunchConfig``, made once."""
        key = blocks, threads, cluster, stream, early
        if key not in self._configs:
            wanted: list[tuple[int, tuple[int, ...]]] = []
            if cluster > 1:
                wanted.append((_CLUSTER_DIMENSION, (cluster, 1, 1)))
            if early:
                wanted.append((_EARLY, (1,)))
            made = [_Attribute(name, b"", value) for name, value in wanted]
            attributes = (_Attribute * len(made))(*made)
            self._configs[key] = ctypes.byref(
                _LaunchConfig(
                    (blocks, 1, 1), (threads, 1, 1), self._shared, stream, attributes, len(made)
                )
            )
        return self._configs[key]

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status == _NO_CONTEXT:  # of a thread that has not asked the runtime for anything yet
            torch.cuda.set_device(torch.cuda.current_device())
            status = getattr(self._driver, function)(*arguments)
        if status:
            raise NvrtcError(f"{function} returned CUDA error {status}")


_KINDS = {"u8": 0, "fp16": 6, "bf16": 9}  # CUtensorMapDataType
_SWIZZLES = {"u8": 0, "fp16": 3, "bf16": 3}  # CUtensorMapSwizzle: none, of 128 bytes
_PROMOTE_128 = 2


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, kind: str, columns: int, rows: int, pitch: int, box_columns: int, box_rows: int
) -> bytes:
    """``CUtensorMap`` of a matrix: what the tensor memory accelerator reads boxes by.

    In shared memory the chunks of 16 bytes of 8 rows of 128 bytes are swapped, but not those of
    ``"u8"``; zeros stand for what lies outside.

    Args:
        address: of the first element, a multiple of 16.
        kind: ``"bf16"``, ``"fp16"`` or ``"u8"``.
        columns: of the matrix.
        rows: of the matrix.
        pitch: bytes from a row to the next, a multiple of 16.
        box_columns: of a box, 64 at most, whole 16 bytes.
        box_rows: of a box, 256 at most.

    Raises:
        NvrtcError: if the driver refuses.
    """
    room = ctypes.create_string_buffer(128 + 64)
    begin = -ctypes.addressof(room) % 64
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + begin), _KINDS[kind], 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(pitch),
        (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1),
        0, _SWIZZLES[kind], _PROMOTE_128, 0,
    )  # fmt: skip
    if status:
        raise NvrtcError(f"cuTensorMapEncodeTiled returned CUDA error {status}")
    return room.raw[begin : begin + 128]


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
