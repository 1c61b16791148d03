"""What tests of kernels share."""

from __future__ import annotations

import ctypes

import pytest
from machine_code import libraries

from slope.backends import nvrtc


@pytest.fixture
def compiler(monkeypatch):
    files = [path for path in libraries() if "alt" not in path.name]
    if not files:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in files]
    monkeypatch.setattr(nvrtc, "_compiler", lambda: loaded[-1])
