"""The decode kernels alone, on a GPU: microseconds per product, and over the dense product.

    python benchmarks/gpu_decode.py                        # the shapes of the committed log
    python benchmarks/gpu_decode.py --rank 0.015625        # with an adapter of that share of d_in
    python benchmarks/gpu_decode.py --cuts                 # other cuts too, for the table

Each contender is one CUDA graph over as many layers as do not fit into the L2 cache, so that
weights come from memory as in a model. Contenders take turns; a line has medians and the 10th to
90th percentile of each speed-up. With ``--cuts`` every cut is checked, timed once, and the best
few take turns with the others; they are named by token_tiles, row_tiles, row_warps, column_warps,
stages, g for wgmma / splits, and with an adapter / low splits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from slope.backends import decoding_mma
from slope.backends.decoding import MAX_TOKENS, decode
from slope.backends.decoding_mma import MmaLaunch, decode_mma
from slope.bench.timing import Call, Clock, Deadline, Effort, Spread, interleave
from slope.linear import SlopeLinear

SHAPES = (
    "4096x4096,14336x4096,4096x14336,1024x4096,5120x5120,2560x2560,10240x2560,9216x9216,36864x9216,"
    "7168x7168,768x768,3072x768,768x3072,50304x4096"
)
EFFORT = Effort(rounds=15, window=2e-3, warmup=2, limit=5.0)
ONCE = Effort(rounds=5, window=5e-4, warmup=1, limit=1.0)
BEYOND_CACHE = 120 << 20  # bytes of compressed weights: twice the L2 cache of an H200
FINALISTS = 3
# row_tiles, row_warps, column_warps, stages
CUTS = {
    1: ((1, 1, 8, 3), (1, 1, 4, 4), (1, 2, 2, 3), (2, 1, 8, 3), (1, 2, 2, 4), (2, 2, 4, 2)),
    2: (
        (1, 1, 8, 3), (1, 1, 4, 4), (1, 2, 2, 4), (2, 1, 8, 3), (2, 2, 2, 3), (2, 2, 4, 2),
        (2, 4, 2, 3),
    ),
    4: (
        (1, 1, 4, 4), (2, 1, 4, 3), (2, 2, 2, 3), (2, 4, 2, 3), (4, 2, 2, 3), (4, 4, 2, 2),
        (1, 4, 2, 4),
    ),
    8: (
        (1, 2, 4, 2), (2, 2, 4, 2), (2, 2, 2, 3), (2, 4, 2, 3), (4, 2, 2, 3), (4, 4, 2, 2),
        (1, 4, 2, 4),
    ),
}  # fmt: skip
# The same for wgmma, by the tiles of a block's tokens.
GROUPED = {
    2: ((1, 4, 1, 4), (1, 4, 1, 8), (1, 4, 2, 3), (1, 4, 2, 4), (2, 4, 2, 2), (2, 4, 2, 3)),
    4: (
        (1, 4, 1, 4), (1, 4, 1, 8), (1, 4, 2, 3), (1, 4, 2, 4), (2, 4, 2, 2), (2, 4, 2, 3),
        (1, 8, 1, 4), (1, 8, 2, 3), (2, 8, 1, 3),
    ),
    8: (
        (1, 4, 1, 4), (1, 4, 1, 6), (1, 4, 2, 3), (1, 4, 2, 4), (2, 4, 2, 2), (2, 4, 2, 3),
        (1, 8, 1, 4), (1, 8, 2, 3), (2, 8, 1, 3), (2, 8, 1, 4),
    ),
    16: (
        (1, 4, 1, 2), (1, 4, 1, 4), (1, 4, 2, 2), (1, 8, 1, 2), (1, 8, 1, 4), (2, 4, 1, 2),
        (2, 4, 1, 4), (2, 8, 1, 3),
    ),
}  # fmt: skip
SPLITS = (1, 2, 3, 4, 6, 8)
LOW_SPLITS = (2, 4, 8, 16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="d_out x d_in, comma separated")
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--rank", type=float, default=0.0, help="of an adapter, as a share of d_in")
    parser.add_argument("--cuts", action="store_true", help="time other cuts of the work too")
    parser.add_argument("--seconds", type=float, help="begin no case after this time")
    options = parser.parse_args()
    deadline = Deadline(options.seconds)
    tokens = [int(word) for word in options.tokens.split(",")]
    if options.cuts:
        compile_all({-(-t // 8) for t in tokens})
    for shape in options.shapes.split(","):
        out_features, in_features = map(int, shape.split("x"))
        for t in tokens:
            if deadline.passed:
                print(f"{shape}, {t} tokens: no time left")
                continue
            rank = round(options.rank * in_features)
            line = measure(out_features, in_features, t, rank, options.cuts)
            print(f"{shape}, {t} tokens: {line}", flush=True)


def compile_all(token_tiles: set[int]) -> None:
    """Every cut, on all cores."""

    def compile_one(cut: MmaLaunch) -> None:
        torch.cuda.set_device(0)
        decoding_mma._kernel(cut, torch.bfloat16, 0)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, (cut for tiles in token_tiles for cut in cuts_of(tiles))))


def cuts_of(token_tiles: int) -> list[MmaLaunch]:
    """The candidates that fit into shared memory; more than 64 tokens are shared among blocks."""
    cuts = []
    if token_tiles <= max(CUTS):
        tiles = next(most for most in CUTS if token_tiles <= most)
        cuts = [MmaLaunch(tiles, *cut, 0) for cut in CUTS[tiles]]
    if torch.cuda.get_device_capability() == (9, 0):
        least = next((most for most in GROUPED if token_tiles <= most), max(GROUPED))
        for tiles in (least,) if token_tiles <= 8 else (8, 16):
            cuts += [MmaLaunch(tiles, *cut, 0, grouped=True) for cut in GROUPED[tiles]]
    return [cut for cut in cuts if cut.shared <= decoding_mma._shared_memory(0)]


def candidates(
    out_features: int, in_features: int, tokens: int, rank: int
) -> Iterator[tuple[str, functools.partial[Tensor]]]:
    """Cuts with splits that fill a GPU neither far too little nor several times."""
    token_tiles = -(-tokens // 8)
    for cut, splits in itertools.product(cuts_of(token_tiles), SPLITS):
        parts = -(-token_tiles // cut.token_tiles)
        blocks = -(-out_features // cut.rows) * parts * splits
        steps = in_features // (128 * cut.column_warps)
        if splits > steps or (splits > 1 and blocks > (280 if cut.rows < 256 else 900)):
            continue
        if blocks < 40 and splits < min(SPLITS[-1], steps):
            continue
        name = f"{'.'.join(map(str, cut[:5]))}{'g' * cut.grouped}/{splits}"
        if not rank:
            yield name, functools.partial(decode_mma, launch=cut, splits=splits)
            continue
        for low in LOW_SPLITS:
            made = functools.partial(decode_mma, launch=cut, splits=splits, low_splits=low)
            yield f"{name}/{low}", made


@torch.no_grad()
def measure(out_features: int, in_features: int, tokens: int, rank: int, cuts: bool) -> str:
    """One line of the table."""
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    compressed = out_features * in_features * 9 // 8
    few = tokens <= MAX_TOKENS
    layers = [
        SlopeLinear(in_features, out_features, bias=False, **settings).requires_grad_(False)
        for _ in range(min(60, max(2, BEYOND_CACHE // compressed)))
    ]
    packed = (
        []
        if few
        else [
            SlopeLinear(
                in_features, out_features, bias=False, backend="cusparselt", **settings
            ).requires_grad_(False)
            for _ in layers
        ]
    )
    dense = [layer.to_dense() for layer in layers]
    x = torch.randn(tokens, in_features, **settings)
    down = torch.randn(rank, in_features, **settings) / in_features**0.5 if rank else None
    up = torch.randn(out_features, rank, **settings) if rank else None

    def adapted(y: Tensor) -> Tensor:
        return y if down is None or up is None else y.addmm_(x @ down.t(), up.t())

    def product(w: Tensor) -> Tensor:
        return adapted(torch.nn.functional.linear(x, w))

    def sparse(layer: SlopeLinear, kernel: Callable[..., Tensor]) -> Tensor:
        if few:
            return kernel(x, layer.values, layer.metadata, None, down, up)
        return adapted(kernel(x, layer.values, layer.metadata))

    def by(kernel: Callable[..., Tensor]) -> Call:
        return over(layers, lambda layer: sparse(layer, kernel))

    clock = Clock(settings["device"])
    calls = {"dense": over(dense, product)}
    if few:
        calls |= {"mma": by(decode_mma)} if cuts else {"triton": by(decode), "mma": by(decode_mma)}
    else:
        calls["cusparselt"] = over(packed, lambda layer: adapted(layer(x)))
    if cuts:
        expected = product(dense[0]).float()
        times = {}
        for name, kernel in candidates(out_features, in_features, tokens, rank):
            call = by(kernel)
            y = sparse(layers[0], kernel).float()
            difference = (y - expected).norm() / expected.norm()
            if not difference < 1e-2:
                raise AssertionError(f"{out_features}x{in_features}, {name}: error {difference}")
            call()
            timing = interleave({name: captured(call)}, clock, ONCE, Deadline())[name]
            times[name] = Spread.of(timing.seconds).median, call
        best = sorted(times, key=lambda name: times[name][0])[:FINALISTS]
        calls |= {name: times[name][1] for name in best}
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


def captured(call: Call) -> Call:
    """As :meth:`Clock.captured`, without collecting garbage first, which would take longer."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        call()
        graph.capture_end()
    replay: Call = graph.replay
    return replay


def over(items: Sequence[object], act: Callable[..., object]) -> Call:
    """A call that does something with each item."""

    def call() -> None:
        for item in items:
            act(item)

    return call


if __name__ == "__main__":
    main()
