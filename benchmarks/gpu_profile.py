"""Where the time of a compiled training step goes, on a GPU: dense and SLoPe, by kind of kernel.

    python benchmarks/gpu_profile.py --models opt-6.7b,opt-13b --layers 2,4

Steps are those of ``slope bench train``. From two depths follows what a block costs, of which a
whole model is made; the last lines say how fast a block is, and what bounds it.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

import slope
from slope.bench import models
from slope.bench.models import ModelCase, TrainingStep

# By the names of kernels; the first that fits counts.
KINDS = {
    "sparse product": r"sparse_gemm|spmma|slope_gemm|slope_decode",
    "dense product": r"nvjet|gemm|cutlass.*gemm|splitKreduce",
    "operands and masks": r"^_(pack_rows|pack_columns|gather|column_mask|expand)_kernel",
    "attention": r"sdpa|flash|fmha|attention",
    "optimizer and clipping": r"multi_tensor_apply|FusedOptimizer",
    "rest": "",
}
ACTIVITIES = [torch.profiler.ProfilerActivity.CUDA]
STEPS = 3  # of a round


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="opt-6.7b")
    parser.add_argument("--layers", default="2,4", help="two depths")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken")
    options = parser.parse_args()
    depths = [int(word) for word in options.layers.split(",")]
    if len(set(depths)) < 2:
        parser.error(f"--layers {options.layers} must be two depths, for example --layers 2,4.")
    for model in options.models.split(","):
        shares = {}
        for layers in depths:
            found = profile(ModelCase(model, layers), options.batch, options.seq, options.rounds)
            shares |= {(sparse, layers): kinds for sparse, kinds in found.items()}
        report(model, depths, shares)


def profile(case: ModelCase, batch: int, length: int, rounds: int) -> dict[bool, Counter[str]]:
    """Milliseconds of a dense and of a sparse step by kind of kernel: medians, in turns."""
    torch.compiler.reset()
    device = torch.device("cuda")
    calls = {}
    for sparse in (False, True):
        config = slope.SparsityConfig() if sparse else None
        model = models.build(case, length, device, torch.float32, config)
        tokens = models.random_tokens(model, batch, length, device)
        step, forward = TrainingStep(model, "bf16-mixed", tokens), torch.compile(model)
        calls[sparse] = functools.partial(step.call, forward)
    samples: dict[bool, list[Counter[str]]] = {sparse: [] for sparse in calls}
    for number in range(rounds + 2):
        for sparse, call in calls.items():
            call()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=ACTIVITIES) as profiler:
                for _ in range(STEPS):
                    call()
                torch.cuda.synchronize()
            if number >= 2:  # the chip is warm
                samples[sparse].append(by_kind(profiler.events()))
    torch.cuda.empty_cache()
    return {
        sparse: Counter({kind: statistics.median(one[kind] for one in own) for kind in KINDS})
        for sparse, own in samples.items()
    }


def by_kind(events: Iterable[Any]) -> Counter[str]:
    """Milliseconds of a step."""
    found: Counter[str] = Counter()
    for event in events:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if not on_gpu or re.search("#|CompiledFx|Compiled Region", event.name):  # annotations
            continue
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.name))
        found[kind] += event.time_range.elapsed_us() / 1e3 / STEPS
    return found


def report(model: str, depths: list[int], shares: dict[tuple[bool, int], Counter[str]]) -> None:
    """A table of milliseconds per step and per block."""
    few, many = min(depths), max(depths)
    blocks = many - few
    columns = [f"{name}, {n} blocks" for n in depths for name in ("dense", "SLoPe")]
    print(f"\n## {model}, ms\n\n| | {' | '.join(columns)} | dense, a block | SLoPe, a block |")
    print("|---" * (len(columns) + 3) + "|")
    per_block: dict[tuple[bool, str], float] = {}
    for kind in (*KINDS, "sum"):
        cells = []
        values: dict[tuple[bool, int], float] = {}
        for n in depths:
            for sparse in (False, True):
                found = shares[sparse, n]
                values[sparse, n] = found.total() if kind == "sum" else found[kind]
                cells.append(values[sparse, n])
        for sparse in (False, True):
            per_block[sparse, kind] = (values[sparse, many] - values[sparse, few]) / blocks
            cells.append(per_block[sparse, kind])
        print(f"| {kind} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    dense, sparse = per_block[False, "sum"], per_block[True, "sum"]
    upkeep = per_block[True, "operands and masks"]
    saved = per_block[False, "dense product"] - per_block[True, "dense product"]
    product = per_block[True, "sparse product"]
    print(f"\nA block: {dense / sparse:.3f} times as fast; without operands and masks it would be")
    print(
        f"{dense / (sparse - upkeep):.3f}. The sparse products are {saved / product:.3f} times as"
    )
    print(f"fast as the dense ones in their place; {saved / dense:.3f} of a dense block is those.")


if __name__ == "__main__":
    main()
