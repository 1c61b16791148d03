"""Which kernels a model's forward consists of, on a GPU: replays of CUDA graphs, dense and SLoPe.

    python benchmarks/gpu_trace.py --models opt-66b --layers 8 --compile --ranks 0 --tokens 1,16

Takes the options of ``slope bench infer``. For each contender and number of tokens: microseconds
of a replay, of 20 one after another; then of one, by torch's profiler, those of each kind of
kernel and those between kernels. Time that two kernels share counts for the one that began first.
``--output DIR`` names a new folder for every kernel in order: begin, duration, name.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slope.bench.timing import Clock
from slope.cli.bench import prepared

REPLAYS, PROFILED, WARM = 20, 4, 3
SHOWN, WIDTH = 14, 70  # kinds of kernels, and letters of a name


class Kernel(NamedTuple):
    """A kernel of a replay; microseconds."""

    begin: float
    duration: float
    name: str


def main() -> int:
    """Command line."""
    try:
        bench: Any = prepared(["infer", *sys.argv[1:]])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    device, folder = bench.options.device, bench.options.output
    if folder is not None and folder.exists():
        print(f"--output {folder} is there already; name a new folder.", file=sys.stderr)
        return 2
    if not bench.on_gpu:
        print("it traces kernels of an NVIDIA GPU; leave --device cpu out.", file=sys.stderr)
        return 2
    if folder is not None:
        folder.mkdir(parents=True)
    for case in bench.cases():
        for name, rank in bench.contenders.items():
            model = bench._build(case, device, rank)
            for phase, tokens in bench.sizes:
                torch.compiler.reset()  # a graph is for one number of tokens
                title = f"{case.model}, {case.layers} blocks, {name}, {phase}, {tokens} tokens"
                kernels = trace(title, bench._call(model, phase, tokens), Clock(device))
                if folder is not None:
                    save(folder / f"{title.replace(', ', '_').replace(' ', '')}.txt", kernels)
            del model
            torch.cuda.empty_cache()
    return 0


def trace(title: str, call: Callable[[], object], clock: Clock) -> list[Kernel]:
    """Print what a call consists of."""
    for _ in range(WARM):
        call()
    replay = clock.captured(call)
    seconds, _ = clock.run(replay, REPLAYS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            replay()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    spans = [
        (event.time_range, event.name) for event in profiler.events() if event.device_type == on_gpu
    ]
    kernels = sorted(Kernel(span.start, span.end - span.start, name) for span, name in spans)
    kernels = kernels[-(len(kernels) // PROFILED) :]  # those of the last
    kinds, between = covered(kernels)
    many = f"{len(kernels)} kernels, {between:.0f} us between them"
    print(f"\n{title}: {seconds * 1e6:.0f} us, {many}")
    numbers = Counter(kernel.name for kernel in kernels)
    for name, time in kinds.most_common(SHOWN):
        print(f"{time:9.1f} us {numbers[name]:4d} x {name[:WIDTH]}", flush=True)
    return kernels


def covered(kernels: Sequence[Kernel]) -> tuple[Counter[str], float]:
    """Microseconds by name, and those between kernels, which are sorted by their begin."""
    kinds: Counter[str] = Counter()
    between, end = 0.0, kernels[0].begin
    for begin, duration, name in kernels:
        between += max(0.0, begin - end)
        kinds[name] += max(0.0, begin + duration - max(begin, end))
        end = max(end, begin + duration)
    return kinds, between


def save(path: Path, kernels: Sequence[Kernel]) -> None:
    """A line for each kernel."""
    first = kernels[0].begin
    lines = [f"{k.begin - first:9.1f} {k.duration:8.1f} {k.name[:WIDTH]}\n" for k in kernels]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
