"""Launching a Triton kernel at the price of a CUDA launch.

The JIT inspects every argument in every call, tens of µs on the host. Here the compiled kernel of
one set of dtypes, alignments and numbers is kept and launched directly. The numbers are part of the
key, because the JIT compiles special forms for some of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime import JITFunction


class Launcher:
    """One Triton kernel.

    Args:
        kernel: a ``triton.jit`` function: tensors first, then numbers, then ``tl.constexpr``.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it (TRITON_INTERPRET=1), which knows no assembly."""
        return not isinstance(self._kernel, JITFunction)

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        early: bool = False,
    ) -> None:
        """Launch on the current stream of the tensors' device, which must be the current device.

        Args:
            grid: programs along three dimensions.
            tensors: arguments in order; all on one device.
            numbers: further arguments.
            constants: values of the ``tl.constexpr`` arguments, last in the kernel's signature.
            num_warps: per program.
            early: programs may begin before the kernel ahead of this one has ended, and wait for it
                themselves (programmatic dependent launch, compute capability 9.0 and later).

        Raises:
            RuntimeError: if Triton cannot compile the kernel for this GPU, or has no room there.
        """
        first = tensors[0]
        assert first is not None
        device = first.device
        key = (device, numbers, constants, num_warps, early, *[_form(tensor) for tensor in tensors])
        found = self._compiled.get(key)
        if found is not None:
            run, function, metadata = found
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            # The launcher takes every argument of the signature, and here no hooks.
            run(*grid, stream, function, metadata, None, None, None, *tensors, *numbers, *constants)
            return
        try:
            options = {"num_warps": num_warps} | ({"launch_pdl": True} if early else {})
            compiled = self._kernel[grid](*tensors, *numbers, *constants, **options)
        except TritonError as error:  # which is no RuntimeError, as the lack of memory should be
            raise RuntimeError(f"Triton cannot launch {self._kernel.__name__}: {error}") from error
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)


def _form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)
