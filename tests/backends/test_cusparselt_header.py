"""The binding against the C header: sizes, enum values, argument lists.

Read from ``$CUSPARSELT_HEADER`` (several joined by ``:``) or from the installed wheel, which comes
with a CUDA build of torch.
"""

from __future__ import annotations

import ctypes
import os
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from slope.backends.cusparselt import binding


def headers():
    named = os.environ.get("CUSPARSELT_HEADER")
    if named:
        return [Path(name) for name in named.split(":")]
    spec = find_spec("nvidia")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return sorted(path for place in places for path in place.rglob("include/cusparseLt.h"))


HEADERS = headers()
pytestmark = pytest.mark.skipif(
    not HEADERS, reason="needs cusparseLt.h, from the wheel nvidia-cusparselt-cu13 or -cu12"
)

ENUMS = {
    "CUSPARSELT_SPARSITY_50_PERCENT": binding.SPARSITY_50_PERCENT,
    "CUSPARSE_COMPUTE_32F": binding.COMPUTE_32F,
    "CUSPARSELT_MATMUL_ALG_DEFAULT": binding.ALG_DEFAULT,
    "CUSPARSELT_MATMUL_BIAS_POINTER": binding.MATMUL_BIAS_POINTER,
    "CUSPARSELT_MATMUL_ALG_CONFIG_ID": binding.ALG_CONFIG_ID,
    "CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID": binding.ALG_CONFIG_MAX_ID,
}
C_TYPES = {"int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32,
           "size_t": ctypes.c_size_t}  # fmt: skip


@pytest.fixture(params=HEADERS, ids=lambda path: path.parent.parent.name)
def text(request):
    return re.sub(r"//[^\n]*", "", request.param.read_text(encoding="utf-8"))


def enum_values(text):
    values = {}
    for body in re.findall(r"typedef enum \{([^}]*)\}", text):
        number = -1
        for entry in filter(None, (part.strip() for part in body.split(","))):
            name, _, given = (part.strip() for part in entry.partition("="))
            number = int(given) if given else number + 1
            values[name] = number
    return values


def arguments(text, function):
    (body,) = re.findall(rf"\b{function}\(([^)]*)\);", text)
    types = []
    for argument in body.split(","):
        kind = re.sub(r"\bconst\b", "", argument).split()[0]
        types.append(ctypes.c_void_p if "*" in argument else C_TYPES.get(kind, ctypes.c_int))
    return types


def test_structs_are_over_allocated_and_aligned(text):
    structs = re.findall(r"alignas\((\d+)\) uint8_t data\[(\d+)\]", text)
    assert structs
    for alignment, size in structs:
        assert int(size) <= binding.STRUCT_BYTES
        assert binding.ALIGNMENT % int(alignment) == 0


@pytest.mark.parametrize("name", ENUMS)
def test_enum_values(text, name):
    assert enum_values(text)[name] == ENUMS[name]


def test_every_function_takes_what_the_binding_gives(text):
    functions = SimpleNamespace()
    for name in re.findall(r"\b(cusparseLt\w+)\(", text):
        setattr(functions, name, SimpleNamespace())
    binding.Library(functions)
    bound = {name: f.argtypes for name, f in vars(functions).items() if hasattr(f, "argtypes")}
    assert len(bound) == 17
    for name, types in bound.items():
        assert types == arguments(text, name), name
