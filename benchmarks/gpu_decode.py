"""The decode kernels alone, on a GPU: microseconds per product, and over the dense product.

    python benchmarks/gpu_decode.py                        # the shapes of the committed log
    python benchmarks/gpu_decode.py --rank 0.015625        # with an adapter of that share of d_in

Each contender is one CUDA graph over as many layers as do not fit into the L2 cache, so that
weights come from memory as in a model. Contenders take turns; a line has medians and the 10th to
90th percentile of each speed-up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slope.backends.decoding import decode
from slope.backends.decoding_mma import decode_mma
from slope.bench.timing import Call, Clock, Deadline, Effort, Spread, interleave
from slope.linear import SlopeLinear

SHAPES = (
    "4096x4096,14336x4096,4096x14336,1024x4096,5120x5120,2560x2560,10240x2560,9216x9216,36864x9216,"
    "7168x7168,768x768,3072x768,768x3072,50304x4096"
)
EFFORT = Effort(rounds=15, window=2e-3, warmup=2, limit=5.0)
BEYOND_CACHE = 120 << 20  # bytes of compressed weights: twice the L2 cache of an H200


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="d_out x d_in, comma separated")
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--rank", type=float, default=0.0, help="of an adapter, as a share of d_in")
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        out_features, in_features = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            line = measure(out_features, in_features, tokens, round(options.rank * in_features))
            print(f"{shape}, {tokens} tokens: {line}", flush=True)


@torch.no_grad()
def measure(out_features: int, in_features: int, tokens: int, rank: int) -> str:
    """One line of the table."""
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    compressed = out_features * in_features * 9 // 8
    layers = [
        SlopeLinear(in_features, out_features, bias=False, **settings)
        for _ in range(min(60, max(2, BEYOND_CACHE // compressed)))
    ]
    dense = [layer.to_dense() for layer in layers]
    x = torch.randn(tokens, in_features, **settings)
    down = torch.randn(rank, in_features, **settings) if rank else None
    up = torch.randn(out_features, rank, **settings) if rank else None

    def product(w: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, w)
        return y if down is None or up is None else y.addmm_(x @ down.t(), up.t())

    def by(kernel: Callable[..., Tensor]) -> Call:
        return over(layers, lambda one: kernel(x, one.values, one.metadata, None, down, up))

    clock = Clock(settings["device"])
    calls = {"dense": over(dense, product), "triton": by(decode), "mma": by(decode_mma)}
    for call in calls.values():
        call()
    graphs = {name: clock.captured(call) for name, call in calls.items()}
    timings = interleave(graphs, clock, EFFORT, Deadline())
    parts = []
    for name, timing in timings.items():
        median = Spread.of(timing.seconds).median / len(layers)
        faster = timing.speed_up(timings["dense"])
        moved = 2 * out_features * in_features if name == "dense" else compressed
        parts.append(
            f"{name} {median * 1e6:.1f} us, {faster.median:.2f} x ({faster.low:.2f} to "
            f"{faster.high:.2f}), {moved / median * 1e-9:.0f} GB/s"
        )
    return "; ".join(parts)


def over(items: Sequence[object], act: Callable[..., object]) -> Call:
    """A call that does something with each item."""

    def call() -> None:
        for item in items:
            act(item)

    return call


if __name__ == "__main__":
    main()
