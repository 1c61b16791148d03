"""The Triton kernels in Triton's interpreter, each in a process of its own.

The variable that switches the interpreter on must be set before triton is imported, and compiled
models in this process would find it switched on too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = [
    "pack_rows",
    "pack_columns",
    "select_column_mask",
    "expand",
    "gather_gradient",
    "low_rank",
    "decode",
    "decode_bf16",
    "serve",
    "select",
]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_its_reference(kernel):
    script = Path(__file__).parent / "interpreted_kernels.py"
    done = subprocess.run(
        [sys.executable, script, kernel],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
