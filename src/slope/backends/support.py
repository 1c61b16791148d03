"""What this machine can do: the reasons why 2:4 kernels cannot serve a layer, each in one line."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from slope.pattern import NMPattern

KERNEL_PATTERN = NMPattern(2, 4)
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def why_not_sparse_kernels(pattern: NMPattern | str, device_type: str) -> str | None:
    """Why no sparse tensor core can run the products of SLoPe; None if one can.

    Args:
        pattern: of the weights.
        device_type: of the tensors, as ``torch.device`` has it: ``"cpu"``, ``"cuda"``.

    Returns:
        The reason, as the end of a sentence.
    """
    if str(pattern) != "2:4":
        return f"sparse tensor cores run the pattern 2:4 alone, not {pattern}"
    if device_type != "cuda":
        return f"device type {device_type!r} has no sparse tensor cores"
    return why_no_gpu_kernels(0)


def why_no_kernels(
    pattern: NMPattern, dtype: torch.dtype, device: torch.device | str
) -> str | None:
    """Reason why a layer gets dense products, or None if sparse kernels serve it.

    Args:
        pattern: of the layer.
        dtype: of the product: the autocast dtype, else that of the values.
        device: of the layer.
    """
    if pattern != KERNEL_PATTERN:
        return f"pattern {pattern} has no sparse kernels, only 2:4 has"
    if torch.device(device).type != "cuda":
        return f"the layer is on {torch.device(device).type}, sparse kernels need a CUDA GPU"
    if dtype not in KERNEL_DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} has no sparse kernels; use bf16 or fp16"
    index = torch.device(device).index
    return why_no_gpu_kernels(torch.cuda.current_device() if index is None else index)


@functools.cache
def why_no_gpu_kernels(device: int) -> str | None:
    """Reason why no 2:4 kernel runs on a GPU with this torch, or None."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is sm_{capability[0]}{capability[1]}, sparse tensor cores begin with sm_80"
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


@functools.cache
def why_no_cusparselt(device: int, dtype: torch.dtype) -> str | None:
    """Reason why cuSPARSELt cannot be used on a GPU, or None; compares the layout it stores.

    Raises:
        RuntimeError: never; a library that fails is a reason.
    """
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} comes without cuSPARSELt"
    from slope.backends.cusparselt.layout import matches_library
    from slope.backends.cusparselt.plans import products

    try:
        with torch.cuda.device(device):
            version = products().version(device)
            if not matches_library(torch.device("cuda", device), dtype):
                return (
                    f"cuSPARSELt {version} on {torch.cuda.get_device_name(device)} stores a "
                    "compressed matrix in a layout that this version does not know"
                )
    except (OSError, RuntimeError) as error:
        return f"cuSPARSELt cannot be used: {(str(error).splitlines() or ['unknown error'])[0]}"
    return None


@functools.cache
def machine() -> dict[str, str]:
    """GPU and library versions: choices measured on one machine hold for its equals."""
    if not torch.cuda.is_available():
        return {"gpu": "none", "torch": torch.__version__}
    from slope.backends.cusparselt.plans import products

    try:
        cusparselt = str(products().version(torch.cuda.current_device()))
    except (OSError, RuntimeError):
        cusparselt = "none"
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cusparselt": cusparselt,
        "triton": triton.__version__,
    }
