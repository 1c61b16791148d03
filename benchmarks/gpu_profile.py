"""Where the time of a compiled training step goes, on a GPU: dense and SLoPe, by kind of kernel.

    python benchmarks/gpu_profile.py --models opt-6.7b,opt-13b --layers 2,4

Steps are those of ``slope bench train``. From two depths follows what a block costs, of which a
whole model is made; the last lines say how fast a block is, and what bounds it.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

import torch

import slope
from slope.bench import models
from slope.bench.models import ModelCase, TrainingStep

# By the names of kernels; the first that fits counts.
KINDS = {
    "sparse product": r"sparse_gemm|spmma",
    "dense product": r"nvjet|gemm|cutlass.*gemm|splitKreduce",
    "operands and masks": r"^_(pack_rows|pack_columns|gather|column_mask|expand)_kernel",
    "attention": r"sdpa|flash|fmha|attention",
    "optimizer and clipping": r"multi_tensor_apply|FusedOptimizer",
    "rest": "",
}
STEPS = 3


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="opt-6.7b")
    parser.add_argument("--layers", default="2,4", help="two depths")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    options = parser.parse_args()
    depths = [int(word) for word in options.layers.split(",")]
    for model in options.models.split(","):
        shares = {
            (sparse, layers): profile(ModelCase(model, layers), sparse, options.batch, options.seq)
            for layers in depths
            for sparse in (False, True)
        }
        report(model, depths, shares)


def profile(case: ModelCase, sparse: bool, batch: int, length: int) -> Counter[str]:
    """Milliseconds of a step by kind of kernel."""
    torch.compiler.reset()
    device = torch.device("cuda")
    config = slope.SparsityConfig() if sparse else None
    model = models.build(case, length, device, torch.float32, config)
    tokens = models.random_tokens(model, batch, length, device)
    step, forward = TrainingStep(model, "bf16-mixed", tokens), torch.compile(model)
    for _ in range(3):
        step.call(forward)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step.call(forward)
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith(
            "Optimizer"
        ):
            continue
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.name))
        found[kind] += event.time_range.elapsed_us() / 1e3 / STEPS
    del step, forward, model
    torch.cuda.empty_cache()
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
