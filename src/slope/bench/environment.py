"""What a number depends on: device, clocks, power, driver, libraries; and a GPU watched."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = (
    "torch", "triton", "transformers", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13",
    "nvmath-python", "torchao", "numpy",
)  # fmt: skip
_WATCHED = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"

_IDENTITY = re.compile(
    r"serial|uuid|bus.?id|board id|GPU [0-9A-F]{8}:|part number|process", re.IGNORECASE
)


def environment(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that ``env.json`` holds.

    Args:
        device: measured.
        settings: options of the command.
    """
    import slope

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "slope": slope.__version__,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "device": str(device),
        "settings": {key: value for key, value in settings.items() if key != "output"},
    }
    if device.type == "cuda":
        from slope.backends.support import machine

        properties = torch.cuda.get_device_properties(device)
        shown = _output(["nvidia-smi", "-q", "-i", _index(device)])
        found["gpu"] = {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            **machine(),
            # driver, clocks, power limits, MIG: a list of lines stays readable in JSON
            "nvidia-smi": anonymous(shown.splitlines()) if shown else None,
        }
    return found


def anonymous(lines: Sequence[str]) -> list[str]:
    """What nvidia-smi says, without what tells one GPU or its machine from another."""
    return [line for line in lines if not _IDENTITY.search(line)]


@contextmanager
def watched(device: torch.device, path: Path) -> Iterator[None]:
    """Write clocks, power and temperature twice a second while a measurement runs.

    Args:
        device: on a CPU nothing is written.
        path: of the CSV.
    """
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield
        return
    query = ["nvidia-smi", "-i", _index(device), f"--query-gpu={_WATCHED}", "--format=csv"]
    with path.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([*query, "-lms", "500"], stdout=file, stderr=file)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def _index(device: torch.device) -> str:
    # nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES names.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    return visible[index] if index < len(visible) and visible[index] else str(index)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def _output(command: Sequence[str]) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
