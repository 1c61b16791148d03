"""What the compilers of CUDA made, read without a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest


def libraries():
    """NVRTC of the package nvidia-cuda-nvrtc, builtins first."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc*.so*")]
    return sorted(found, key=lambda path: "builtins" not in path.name)


def told_of(path, tool, *options):
    """What a tool of NVIDIA's says of machine code."""
    triton = pytest.importorskip("triton", reason="its package has the disassembler")
    command = Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *options, path
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stack_of(path):
    """Bytes that a function of machine code spills."""
    return int(re.search(r"STACK:(\d+)", told_of(path, "cuobjdump", "-res-usage"))[1])


def instructions_of(path):
    """Machine code as text, an instruction each."""
    return re.findall(r"/\*[0-9a-f]+\*/\s+(.*?) ;", told_of(path, "nvdisasm", "-c"))


def touching_sums_in_flight(instructions):
    """What reads or writes registers that a wgmma still adds to; ptxas may add moves."""
    in_flight, found = set(), []
    for text in instructions:
        named = {int(number) for number in re.findall(r"\bR(\d+)\b", text)}
        if product := re.search(r"HGMMA\S*64x(\d+)x\d+\S* R(\d+),", text):
            tokens, first = map(int, product.groups())
            in_flight |= set(range(first, first + tokens // 2))
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in text:  # of 1 the last group is still at work
            in_flight = set()
        elif named & in_flight:
            found.append(text)
    return found
