"""What is launched compiles for the GPUs that it is meant for; that needs Triton, and no GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from slope import selection
from slope.backends import decoding
from slope.backends.cusparselt import kernels
from slope.backends.launch import Launcher

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
    torch.int8: "*i8",
}  # fmt: skip
SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024}  # bytes that one program may have
ROWS, COLUMNS, RANK = 192, 1088, 40


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


VALUES = {
    dtype: empty(ROWS, COLUMNS // 2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
}
METADATA = empty(ROWS, COLUMNS // 8, dtype=torch.uint8)
COLUMN_MASK = empty(ROWS, COLUMNS // 16, dtype=torch.uint8)
DENSE = empty(ROWS, COLUMNS)
DOWN, UP, BIAS = empty(RANK, COLUMNS), empty(ROWS, RANK), empty(ROWS)


def decode(tokens, dtype, adapter=True):
    pair = (DOWN, UP) if adapter else (None, None)
    x = empty(tokens, COLUMNS)
    return lambda: decoding.decode(x, VALUES[dtype], METADATA, BIAS, *pair, 0.5)


def whole(tokens):
    cut = decoding.launch_for(tokens, 2)._replace(max_splits=1)
    x = empty(tokens, COLUMNS)
    return lambda: decoding.decode(x, VALUES[torch.bfloat16], METADATA, BIAS, launch=cut)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS = {
    "pack rows": lambda: kernels.pack_rows(VALUES[FP32], METADATA, BF16),
    "pack columns": lambda: kernels.pack_columns(VALUES[FP32], METADATA, COLUMN_MASK, BF16),
    "expand": lambda: kernels.expand(VALUES[BF16], METADATA, None, FP16),
    "expand survivors": lambda: kernels.expand(VALUES[FP32], METADATA, COLUMN_MASK, BF16),
    "column mask": lambda: kernels.select_column_mask(VALUES[FP32], METADATA),
    "gather": lambda: kernels.gather_gradient(DENSE, METADATA, FP32),
    "gather, added": lambda: kernels.gather_gradient(DENSE, METADATA, FP32, VALUES[FP32]),
    "select": lambda: selection.select(VALUES[FP32], 2, 4, 1),
    "select 7:32": lambda: selection.select(DENSE, 7, 32, 0),
    **{f"decode {tokens}, one split": whole(tokens) for tokens in (1, 2, 16, 32, 64)},
    **{f"decode {tokens}, adapter": decode(tokens, BF16) for tokens in (1, 2, 16, 32, 64)},
    **{f"decode {tokens}, fp32 values": decode(tokens, FP32) for tokens in (16, 64)},
}
LARGEST = ["decode 16, fp32 values", "decode 64, fp32 values", "decode 64, adapter"]


@pytest.fixture(scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
        yield


@pytest.fixture
def launches(monkeypatch):
    """Kernels with their arguments, numbers told from constants, instead of being launched."""
    recorded = []

    def record(launcher, grid, tensors, numbers, constants, num_warps=4, early=False):
        options = {"num_warps": num_warps} | ({"launch_pdl": True} if early else {})
        recorded.append((launcher._kernel, tensors, numbers, constants, options))

    class Select:
        fn = selection.select_kernel

        def __getitem__(self, grid):
            return lambda scores, keep, groups, inner, *constants: recorded.append(
                (self.fn, (scores, keep), (groups, inner), constants, {"num_warps": 4})
            )

    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setattr(selection, "select_kernel", Select())
    return recorded


def compiled(launch, capability):
    """As Triton's JIT would do for a launch: what is None, or the number 1, becomes a constant."""
    kernel, tensors, numbers, constants, options = launch
    signature, fixed, aligned = {}, {}, {}
    arguments = zip(kernel.arg_names, (*tensors, *numbers, *constants), strict=True)
    for place, (name, value) in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value is None or value == 1 or place >= len(tensors) + len(numbers):
            signature[name], fixed[name] = "constexpr", value
            continue
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


@pytest.mark.parametrize(
    ("name", "capability"),
    [*[(name, 90) for name in CALLS], *[(name, 89) for name in LARGEST]],
)
@pytest.mark.usefixtures("_cache")
def test_what_is_launched_compiles_and_has_room(launches, name, capability):
    CALLS[name]()
    assert 1 <= len(launches) <= 2
    for launch in launches:
        binary = compiled(launch, capability)
        assert f"sm_{capability}" in binary.asm["ptx"]
        assert binary.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.usefixtures("_cache")
def test_a_second_launch_that_begins_early_waits_for_the_first(launches):
    partial, y = torch.empty(2, 4, 192), torch.empty(4, 192, dtype=torch.bfloat16)
    for early in (True, False):
        decoding.finish(partial, None, None, None, y, 1.0, early=early)
    (first, second) = (compiled(launch, 90) for launch in launches)
    assert "griddepcontrol.wait" in first.asm["ptx"] and first.metadata.launch_pdl
    assert "griddepcontrol" not in second.asm["ptx"] and not second.metadata.launch_pdl


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_a_layer_takes_one_launch_and_two_where_sums_or_an_adapter_are_added(launches, tokens):
    whole(tokens)()
    assert len(launches) == 1
    decode(tokens, BF16, adapter=False)()  # 192 rows alone leave most of a GPU idle: I is split
    assert len(launches) == 1 + 2
    decode(tokens, BF16)()
    assert len(launches) == 1 + 2 + 2


def test_a_kernel_that_finds_no_room_is_an_error_that_leaves_a_path_out():
    class Kernel:
        __name__ = "_large_kernel"

        def __getitem__(self, grid):
            def launch(*arguments, num_warps):
                raise OutOfResources(118784, 101376, "shared memory")

            return launch

    with pytest.raises(RuntimeError, match="cannot launch _large_kernel: out of resource: shared"):
        Launcher(Kernel())((1, 1, 1), (METADATA,), (), ())
