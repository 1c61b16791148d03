"""Each kernel compiles for the GPUs that it is meant for; that needs Triton, and no GPU."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slope import selection
from slope.backends import decoding, decoding_kernels
from slope.backends.cusparselt import kernels

BF16, FP16, FP32, U8, I8, I32 = "*bf16", "*fp16", "*fp32", "*u8", "*i8", "i32"


def _decode(rank, splits, cut):
    """Signature of the first launch; tensors that are not there are None, as when launching."""
    final = splits == 1 and not rank
    return [
        BF16, BF16, U8, BF16, BF16 if rank else None, BF16, None if final else FP32,
        FP32 if rank else None, *[I32] * 6, True, bool(rank), final, cut.tokens, cut.outputs,
        cut.inputs, cut.stages,
    ]  # fmt: skip


KERNELS = {
    "pack rows": (kernels._pack_rows_kernel, [FP32, U8, BF16, I32, I32, 4], 4),
    "pack columns": (kernels._pack_columns_kernel, [FP32, U8, U8, BF16, I32, I32, 8], 2),
    "expand": (kernels._expand_kernel, [BF16, U8, None, FP16, I32, False, 256], 4),
    "expand survivors": (kernels._expand_kernel, [FP32, U8, U8, BF16, I32, True, 256], 4),
    "column mask": (kernels._column_mask_kernel, [FP32, U8, U8, I32, 4, 32], 4),
    "gather": (kernels._gather_kernel, [BF16, U8, FP32, I32, False, 1024], 4),
    "gather, added": (kernels._gather_kernel, [BF16, U8, FP32, I32, True, 1024], 4),
    "low rank": (
        kernels._low_rank_kernel, [BF16] * 4 + ["fp32"] + [I32] * 4 + [64, 128, 128, 64], 4,
    ),
    "select": (selection.select_kernel, [FP32, I8, I32, I32, 2, 4, 512], 4),
    "select 7:32": (selection.select_kernel, [BF16, I8, I32, I32, 7, 32, 8], 4),
    "finish": (
        decoding_kernels._finish_kernel,
        [FP32, FP32, BF16, BF16, BF16, I32, I32, I32, I32, "fp32", True, True, 32, 64, 64], 4,
    ),
}  # fmt: skip
for cut in decoding._LAUNCHES:
    kernel = decoding_kernels._many_kernel if cut.tensor_cores else decoding_kernels._few_kernel
    for rank, splits in ((0, 1), (0, 4), (8, 4)):
        name = f"decode {cut.tokens} tokens, rank {rank}, {splits} splits"
        KERNELS[name] = (kernel, _decode(rank, splits, cut), cut.num_warps)


@pytest.mark.parametrize("capability", [90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    kernel, arguments, num_warps = KERNELS[name]
    names = list(inspect.signature(kernel.fn).parameters)
    assert len(names) == len(arguments)
    pairs = dict(zip(names, arguments, strict=True))
    constants = {key: value for key, value in pairs.items() if not isinstance(value, str)}
    signature = {key: "constexpr" if key in constants else pairs[key] for key in names}
    # As in every call: addresses and sizes are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, key in enumerate(names)
        if signature[key].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    assert f"sm_{capability}" in compiled.asm["ptx"]
    # What an H100 has for one program; more would fail at launch.
    assert compiled.metadata.shared <= 232448
