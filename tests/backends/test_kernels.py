"""The Triton kernels in Triton's interpreter, each in a process of its own.

The variable that switches the interpreter on must be set before triton is imported, and compiled
models in this process would find it switched on too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

KERNELS = [
    "pack_rows",
    "pack_columns",
    "select_column_mask",
    "expand",
    "gather_gradient",
    "decode",
    "decode_bf16",
    "serve",
    "select",
]


LOOPS = {"decode", "decode_bf16", "serve"}


def _loops_fail() -> bool:
    # https://github.com/triton-lang/triton/issues/9171
    numpy, triton = (Version(version(name)) for name in ("numpy", "triton"))
    return numpy >= Version("2.4") and triton < Version("3.7")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_its_reference(kernel):
    if kernel in LOOPS and _loops_fail():
        pytest.skip("the interpreter of Triton before 3.7 cannot loop with numpy from 2.4 on")
    script = Path(__file__).parent / "interpreted_kernels.py"
    done = subprocess.run(
        [sys.executable, script, kernel],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
