"""An adapter behind a product of many tokens, on a GPU: by cuBLAS, and by the kernel for it.

    python benchmarks/gpu_rank_update.py
    python benchmarks/gpu_rank_update.py --shapes 14336x4096 --tokens 16384,2048 --rank 0.015625

Microseconds, from CUDA graphs whose contenders take turns: X downᵀ; the update Y += Z upᵀ by each;
Y read and written once by an elementwise kernel, the floor of that; cuSPARSELt's product alone and
with an adapter by each; the dense product. Weights are multiplied again and again, so small ones
come out of the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from slope.backends import ops
from slope.backends.cusparselt.plans import TOKEN_MULTIPLE, products
from slope.backends.rank_update import rank_update, why_no_update
from slope.bench.timing import Clock, Deadline, Effort, Spread, interleave
from slope.linear import SlopeLinear

EFFORT = Effort(rounds=9, window=1e-3, warmup=1, limit=3.0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = "14336x4096,4096x4096,4096x14336,1024x4096,36864x9216,9216x9216"
    parser.add_argument("--shapes", default=shapes, help="d_out x d_in, comma separated")
    parser.add_argument("--tokens", default="16384,2048,256")
    parser.add_argument("--rank", type=float, default=0.015625, help="as a share of d_in")
    parser.add_argument("--seconds", type=float, help="begin no case after this time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it times kernels of an NVIDIA GPU, and torch finds none")
    deadline = Deadline(options.seconds)
    for tokens in map(int, options.tokens.split(",")):
        for shape in options.shapes.split(","):
            if deadline.passed:
                print(f"{shape}, {tokens} tokens: no time left")
                continue
            out_features, in_features = map(int, shape.split("x"))
            rank = round(options.rank * in_features)
            line = measure(out_features, in_features, tokens, rank)
            print(f"{shape}, {tokens} tokens, rank {rank}: {line}", flush=True)


@torch.no_grad()
def measure(out_features: int, in_features: int, tokens: int, rank: int) -> str:
    """One line of the table."""
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    layer = SlopeLinear(in_features, out_features, bias=False, **settings)
    dense, packed = layer.to_dense(), ops.packed_operand(layer.values, layer.metadata)
    x = torch.randn(tokens, in_features, **settings)
    down = torch.randn(rank, in_features, **settings) / in_features**0.5
    up = torch.randn(out_features, rank, **settings)
    z, y = x @ down.t(), torch.zeros(tokens, out_features, **settings)
    if packed is None:
        return "cuSPARSELt cannot serve it"
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TOKEN_MULTIPLE))
    algorithm = products().search(packed, padded, None, out_features)
    updates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cuBLAS": lambda y, z: y.addmm_(z, up.t())
    }
    if reason := why_no_update(out_features, rank, 0):
        print(f"without our kernel: {reason}")
    else:
        updates["ours"] = lambda y, z: rank_update(y, z, up, 1.0)

    def product() -> Tensor:
        return products().matmul(packed, x, None, out_features, algorithm)

    calls: dict[str, Callable[[], Tensor]] = {"X down": lambda: x @ down.t()}
    for name, update in updates.items():
        calls[f"update by {name}"] = lambda update=update: update(y, z)
    calls |= {"in place": lambda: y.neg_(), "product": product}
    for name, update in updates.items():
        calls[f"with adapter by {name}"] = lambda update=update: update(product(), x @ down.t())
    calls["dense"] = lambda: torch.nn.functional.linear(x, dense)
    clock, graphs = Clock(settings["device"]), {}
    for name, call in calls.items():
        call()
        graphs[name] = clock.captured(call)
    timings = interleave(graphs, clock, EFFORT, Deadline())
    medians = {name: Spread.of(timing.seconds).median for name, timing in timings.items()}
    parts = []
    for name, median in medians.items():
        over = (
            f" ({medians['dense'] / median:.3f} x)"
            if name.split()[0] in ("product", "with")
            else ""
        )
        parts.append(f"{name} {median * 1e6:.1f} us{over}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
