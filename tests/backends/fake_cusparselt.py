"""A stand-in for libcusparseLt on the CPU: same functions, same memory, products in plain torch.

It reads operands from the addresses that it is given, in the library's own layout, so a wrong
pointer, order or lifetime shows as a wrong number or an error status. Every call is recorded.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

INVALID_VALUE = 3
DTYPES = {2: torch.float16, 14: torch.bfloat16}


def tensor_at(address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    size = numel * torch.empty((), dtype=dtype).element_size()
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def unpack(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Dense operand from the library's layout, written without the package's own code."""
    half = rows * columns // 2
    values = packed[:half].view(rows, columns // 4, 2)
    tail = packed[half:].view(torch.uint8)
    dense = torch.zeros(rows, columns // 4, 4, dtype=packed.dtype)
    groups = columns // 4
    place = torch.arange(rows * groups)
    inside, tile = place % 1024, place // 1024
    bit = [(inside >> k) & 1 for k in range(10)]
    row = 8 * bit[0] + bit[4] + 2 * bit[5] + 4 * bit[6] + 16 * bit[7] + 32 * bit[8]
    group = 4 * bit[1] + bit[2] + 2 * bit[3] + 8 * bit[9]
    row = row + 64 * (tile // (groups // 16))
    group = group + 16 * (tile % (groups // 16))
    nibble = (tail[place // 2] >> (4 * (place % 2)).to(torch.uint8)) & 15
    for slot in range(2):
        at = ((nibble >> (2 * slot)) & 3).long()
        dense[row, group, at] = values[row, group, slot]
    return dense.view(rows, columns)


class FakeLibrary:
    """The C functions; ``calls`` lists (name, arguments) in order."""

    def __init__(self, version: int = 800, algorithms: int = 5, best: int = 3) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.live: dict[int, str] = {}
        self._facts: dict[int, dict[str, Any]] = {}
        self._version, self._algorithms, self._best = version, algorithms, best
        self.fail: dict[str, int] = {}
        for name in [n for n in dir(self) if n.startswith("_cusparseLt")]:
            setattr(self, name[1:], self._recorded(name[1:], getattr(self, name)))

    def _recorded(self, name, function):
        def recorded(*arguments):
            self.calls.append((name, arguments))
            if name in self.fail:
                return self.fail[name]
            return function(*arguments) or 0

        return recorded

    def names(self) -> list[str]:
        return [name.removeprefix("cusparseLt") for name, _ in self.calls]

    def _begin(self, address: int, kind: str, **facts: Any) -> int:
        # A product's descriptor has no call that ends it, so its memory may come again.
        if address % 16 or self.live.get(address, "matmul") != "matmul":
            return INVALID_VALUE
        self.live[address], self._facts[address] = kind, facts
        return 0

    def _end(self, address: int, kind: str) -> int:
        if self.live.pop(address, None) != kind:
            return INVALID_VALUE
        return 0

    def _of(self, address: int, kind: str) -> dict[str, Any]:
        assert self.live.get(address) == kind, f"{kind} expected, {self.live.get(address)} found"
        return self._facts[address]

    def _cusparseLtInit(self, handle):
        return self._begin(handle, "handle")

    def _cusparseLtDestroy(self, handle):
        return self._end(handle, "handle")

    def _cusparseLtGetVersion(self, handle, out):
        ctypes.c_int.from_address(out).value = self._version

    def _cusparseLtDenseDescriptorInit(self, handle, at, rows, cols, ld, alignment, kind, order):
        self._of(handle, "handle")
        if rows % 8 or cols % 8 or ld != rows or order != 1:
            return INVALID_VALUE
        return self._begin(at, "matrix", rows=rows, cols=cols, dtype=DTYPES[kind])

    def _cusparseLtStructuredDescriptorInit(
        self, handle, at, rows, cols, ld, alignment, kind, order, sparsity
    ):
        self._of(handle, "handle")
        if ld != cols or order != 2 or sparsity != 0:
            return INVALID_VALUE
        return self._begin(at, "matrix", rows=rows, cols=cols, dtype=DTYPES[kind])

    def _cusparseLtMatDescriptorDestroy(self, at):
        return self._end(at, "matrix")

    def _cusparseLtMatmulDescriptorInit(self, handle, at, op_a, op_b, a, b, c, d, compute):
        sizes = [self._of(matrix, "matrix") for matrix in (a, b, c, d)]
        if op_a or op_b or compute != 2 or sizes[0]["cols"] != sizes[1]["rows"]:
            return INVALID_VALUE
        return self._begin(at, "matmul", sizes=sizes, bias=None)

    def _cusparseLtMatmulDescSetAttribute(self, handle, at, attribute, data, size):
        assert (attribute, size) == (8, 8)
        self._of(at, "matmul")["bias"] = ctypes.c_void_p.from_address(data).value

    def _cusparseLtMatmulAlgSelectionInit(self, handle, at, matmul, algorithm):
        self._of(matmul, "matmul")
        return self._begin(at, "selection", algorithm=algorithm)

    def _cusparseLtMatmulAlgSelectionDestroy(self, at):
        return self._end(at, "selection")

    def _cusparseLtMatmulAlgSetAttribute(self, handle, at, attribute, data, size):
        assert (attribute, size) == (0, 4)
        number = ctypes.c_int.from_address(data).value
        if number >= self._algorithms:
            return INVALID_VALUE
        self._of(at, "selection")["algorithm"] = number
        return 0

    def _cusparseLtMatmulAlgGetAttribute(self, handle, at, attribute, data, size):
        assert size == 4
        chosen = self._of(at, "selection")["algorithm"]
        ctypes.c_int.from_address(data).value = self._algorithms if attribute == 1 else chosen

    def _cusparseLtMatmulPlanInit(self, handle, at, matmul, selection):
        facts = self._of(matmul, "matmul")
        return self._begin(at, "plan", matmul=facts, selection=self._of(selection, "selection"))

    def _cusparseLtMatmulPlanDestroy(self, at):
        return self._end(at, "plan")

    def _cusparseLtMatmulGetWorkspace(self, handle, plan, out):
        self._of(plan, "plan")
        ctypes.c_size_t.from_address(out).value = 447

    def _cusparseLtMatmulSearch(self, handle, plan, *rest):
        self._of(plan, "plan")["selection"]["algorithm"] = self._best

    def _cusparseLtMatmul(self, handle, plan, alpha, a, b, beta, c, d, workspace, streams, count):
        self._of(handle, "handle")
        facts = self._of(plan, "plan")["matmul"]
        left, right = facts["sizes"][:2]
        rows, inner, cols, dtype = left["rows"], left["cols"], right["cols"], left["dtype"]
        if not workspace or count != 1 or c != d or any(p % 16 for p in (a, b, d)):
            return INVALID_VALUE
        weight = unpack(tensor_at(a, rows * inner // 16 * 9, dtype), rows, inner)
        x = tensor_at(b, inner * cols, dtype).view(cols, inner)
        y = tensor_at(d, rows * cols, dtype).view(cols, rows)
        result = ctypes.c_float.from_address(alpha).value * (x.float() @ weight.float().t())
        if ctypes.c_float.from_address(beta).value:
            result += ctypes.c_float.from_address(beta).value * y.float()
        if facts["bias"] is not None:
            result += tensor_at(facts["bias"], rows, dtype).float()
        y.copy_(result)
        return 0
