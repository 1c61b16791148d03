"""What a product needs beside its operands, made once: handles and plans.

A handle belongs to one device and one thread (autograd runs the backward in a thread of its own),
so everything here is kept per thread. A plan serves all layers of one shape: the bias is the only
pointer in it and is set before each product.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slope.backends.cusparselt.binding import (
    DATA_TYPES,
    CusparseltError,
    Handle,
    Library,
    Plan,
    load_library,
)

PLANS_PER_THREAD = 1024
"""Plans kept: the least recently used goes first. A plan holds well under 1 MB of host memory."""

TOKEN_MULTIPLE = 8
"""The library wants whole 16-byte lines; other token counts are padded with rows of zeros."""

SEARCH_WORKSPACE_BYTES = 1 << 27


class PlanKey(NamedTuple):
    """What makes two products share a plan."""

    device: int
    out_features: int
    in_features: int
    tokens: int
    dtype: torch.dtype
    bias: bool
    algorithm: int | None


@dataclass
class PlanCounts:
    """How often a plan was found, and how often it had to be made."""

    hits: int = 0
    misses: int = 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.handles: dict[int, Handle] = {}
        self.plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self.counts = PlanCounts()


class Products:
    """Products of compressed by dense matrices.

    Args:
        library: the C functions.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._thread = _Thread()

    @property
    def counts(self) -> PlanCounts:
        """Plan look-ups of this thread."""
        return self._thread.counts

    def version(self, device: int = 0) -> int:
        """The library's version, 800 for 0.8.0."""
        return self._handle(device).version()

    def matmul(
        self,
        packed: Tensor,
        x: Tensor,
        bias: Tensor | None,
        out_features: int,
        algorithm: int | None = None,
    ) -> Tensor:
        """Y = X Wᵀ [+ b], asynchronous on the current stream.

        Args:
            packed: compressed W (O, I), 9/16 · O · I elements, 16-byte aligned.
            x: (T, I), contiguous, dtype of ``packed``.
            bias: (O,) of that dtype, or None.
            out_features: O.
            algorithm: the library's algorithm id; None for its default, up to 1.9 x slower.

        Returns:
            (T, O).

        Raises:
            CusparseltError: if the library does not support the product.
        """
        tokens, in_features = x.shape
        ragged = tokens % TOKEN_MULTIPLE
        if ragged:
            x = torch.nn.functional.pad(x, (0, 0, 0, TOKEN_MULTIPLE - ragged))
        y = torch.empty((x.shape[0], out_features), dtype=x.dtype, device=x.device)
        device = _device_index(x)
        plan = self.plan(
            PlanKey(
                device, out_features, in_features, x.shape[0], x.dtype, bias is not None, algorithm
            )
        )
        # Given back after the launch: what takes it next on this stream runs after the product. A
        # block of ours would be an alien in the memory of a CUDA graph.
        size = plan.workspace_bytes
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
        plan.run(
            packed.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            _stream(device),
            0 if workspace is None else workspace.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        return y[:tokens] if ragged else y

    def search(
        self, packed: Tensor, x: Tensor, bias: Tensor | None, out_features: int
    ) -> int | None:
        """The library's fastest algorithm id for such a product; synchronises.

        Returns:
            The id, or None for the library's default in fp16: there the search of 0.8.0 runs into
            an illegal instruction on an H200, which ends every later use of the GPU.

        Raises:
            CusparseltError: if the library does not support the product.
            torch.OutOfMemoryError: if there is no room for its workspace.
        """
        if x.dtype is torch.float16:
            return None
        tokens, in_features = x.shape
        device = _device_index(x)
        y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
        workspace = torch.empty(SEARCH_WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
        plan = Plan(
            self._handle(device), out_features, in_features, tokens, x.dtype, bias is not None
        )
        try:
            return plan.search(
                packed.data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                _stream(device),
                workspace.data_ptr(),
                0 if bias is None else bias.data_ptr(),
            )
        finally:
            plan.close()

    def plan(self, key: PlanKey) -> Plan:
        """The plan of that key, made at its first use in this thread."""
        mine = self._thread
        found = mine.plans.get(key)
        if found is not None:
            mine.plans.move_to_end(key)
            mine.counts.hits += 1
            return found
        mine.counts.misses += 1
        if key.dtype not in DATA_TYPES:
            raise CusparseltError(f"dtype {key.dtype} has no 2:4 kernels; use bf16 or fp16.")
        made = Plan(
            self._handle(key.device),
            key.out_features,
            key.in_features,
            key.tokens,
            key.dtype,
            key.bias,
            key.algorithm,
        )
        mine.plans[key] = made
        while len(mine.plans) > PLANS_PER_THREAD:
            mine.plans.popitem(last=False)[1].close()
        return made

    def _handle(self, device: int) -> Handle:
        handles = self._thread.handles
        if device not in handles:
            handles[device] = Handle(self._library)
        return handles[device]


def _device_index(tensor: Tensor) -> int:
    # -1 is the CPU, where a stand-in for the library multiplies in tests.
    return tensor.device.index if tensor.is_cuda else -1


def _stream(device: int) -> int:
    # The public torch.cuda.current_stream() makes an object and costs 7 µs.
    return int(torch._C._cuda_getCurrentRawStream(device)) if device >= 0 else 0


@functools.cache
def products() -> Products:
    """The products of this process.

    Raises:
        OSError: if this torch comes without cuSPARSELt.
    """
    return Products(load_library())
