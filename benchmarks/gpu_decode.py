"""Products of few tokens, on a GPU: microseconds of each kernel, and over the dense product.

    python benchmarks/gpu_decode.py                        # the shapes of the committed log
    python benchmarks/gpu_decode.py --rank 0.015625        # with an adapter of that share of d_in
    python benchmarks/gpu_decode.py --apart                # not one right after the other
    python benchmarks/gpu_decode.py --cuts --every all.csv # cuts that do not compete otherwise, too
    python benchmarks/gpu_decode.py --once dense,16.1.8.1.4t/2 --shapes 4096x4096 --tokens 256

Each contender is one CUDA graph over as many layers as do not fit into the L2 cache, so that
weights come from memory as in a model. With ``--apart`` a small kernel, in all times, keeps
a product from beginning while the one before ends. Contenders take turns; a line has medians and
the 10th to 90th percentile of each speed-up, and the name of the launch that was chosen for
``mma``. With ``--cuts`` every cut is checked, timed once, and the best few take turns with the
others. With ``--once`` launches are made a single time, untimed, for a profiler. Launches are named
by token_tiles, row_tiles, row_warps, column_warps, stages, g for wgmma or t for wgmma with TMA /
splits, and with an adapter / low splits; p is t with blocks that make several tiles, x where blocks
that begin together share X. With an adapter ``gemm`` is also timed in both ways to make X down^T.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from slope.backends import decoding_mma, ops
from slope.backends.decoding import MAX_TOKENS
from slope.backends.decoding_mma import MmaLaunch, decode_mma, why_no_mma
from slope.backends.gemm import WAYS, gemm_with_adapter, takes_adapter, why_no_gemm
from slope.backends.tuning import bucket
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
    16: ((1, 4, 1, 4), (1, 8, 1, 2), (1, 8, 1, 4)),
}  # fmt: skip
# The same with tiles that the tensor memory accelerator copies.
BY_TMA = {
    1: ((1, 4, 1, 8), (1, 4, 2, 16), (1, 4, 2, 8)),
    2: (
        (1, 4, 1, 8), (1, 4, 1, 4), (1, 8, 1, 10), (1, 8, 1, 5), (1, 4, 2, 8), (1, 4, 2, 4),
        (1, 4, 2, 14), (1, 8, 2, 4),
    ),
    3: ((1, 4, 2, 12), (1, 4, 2, 6), (1, 4, 1, 6)),
    4: (
        (1, 4, 1, 6), (1, 8, 1, 8), (1, 8, 1, 4), (2, 8, 1, 4), (1, 12, 1, 5), (1, 4, 2, 6),
        (1, 4, 2, 12), (1, 8, 2, 8),
    ),
    5: ((1, 4, 2, 10), (1, 4, 2, 4), (1, 8, 2, 6)),
    6: (
        (1, 4, 2, 10), (1, 4, 2, 4), (1, 8, 2, 6), (1, 4, 1, 10), (1, 8, 1, 7), (1, 8, 1, 5),
        (1, 12, 1, 5),
    ),
    8: (
        (1, 4, 1, 8), (1, 4, 1, 4), (1, 8, 1, 6), (1, 8, 1, 3), (1, 12, 1, 5), (2, 8, 1, 4),
        (1, 4, 2, 4), (1, 4, 2, 8), (1, 8, 2, 6), (1, 4, 3, 9), (1, 4, 4, 8),
    ),
    9: ((1, 4, 1, 8), (1, 8, 1, 5), (1, 8, 2, 6)),
    10: ((1, 4, 1, 7), (1, 4, 2, 6), (1, 8, 1, 5), (1, 8, 2, 4), (1, 12, 1, 4)),
    11: ((1, 4, 2, 6), (1, 4, 1, 6), (1, 8, 1, 5), (1, 8, 2, 4)),
    12: (
        (1, 4, 1, 6), (1, 4, 1, 4), (1, 4, 2, 6), (1, 4, 2, 4), (1, 4, 3, 6), (1, 8, 1, 5),
        (1, 8, 2, 4), (1, 12, 1, 4),
    ),
    14: ((1, 4, 1, 6), (1, 4, 2, 4), (1, 8, 1, 4)),
    16: (
        (1, 4, 1, 5), (1, 4, 1, 2), (1, 8, 1, 4), (1, 12, 1, 3), (2, 8, 1, 3), (1, 4, 2, 4),
        (1, 4, 3, 3), (2, 4, 2, 4),
    ),
}  # fmt: skip
# The same with blocks that make several tiles.
STAYING = {
    4: ((1, 8, 1, 6), (1, 12, 1, 4)),
    6: ((1, 8, 1, 6), (1, 12, 1, 5)),
    8: ((1, 4, 1, 6), (1, 12, 1, 4), (2, 8, 1, 3), (1, 8, 1, 5)),
    10: ((1, 8, 1, 4), (1, 12, 1, 4)),
    11: ((1, 4, 1, 6), (1, 8, 1, 4), (1, 12, 1, 3)),
    12: ((1, 4, 1, 5), (1, 8, 1, 4), (1, 12, 1, 3)),
    16: ((1, 4, 1, 4), (1, 12, 1, 3), (1, 8, 1, 3), (2, 8, 1, 2)),
}
PARTS = 11  # among which the tokens of narrow tiles are shared at most
LOW_SPLITS = (0, 2, 4, 8, 16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="d_out x d_in, comma separated")
    parser.add_argument("--tokens", default="1,8,16,32,64,128")
    parser.add_argument(
        "--paths", default="mma,cusparselt", help="of mma, triton, gemm, cusparselt"
    )
    parser.add_argument("--rank", type=float, default=0.0, help="of an adapter, as a share of d_in")
    parser.add_argument("--apart", action="store_true", help="another kernel before each product")
    parser.add_argument("--cuts", action="store_true", help="time other cuts of mma too")
    parser.add_argument("--named", default="", help="of them, those whose names this pattern finds")
    parser.add_argument(
        "--splits", type=int, default=decoding_mma.LARGEST_CLUSTER, help="of them, up to so many"
    )
    parser.add_argument("--every", type=Path, help="file for the time of every cut")
    parser.add_argument("--once", help="launches, comma separated, or dense: for a profiler")
    parser.add_argument("--seconds", type=float, help="begin no case after this time")
    options = parser.parse_args()
    if (options.named or options.every) and not options.cuts:
        parser.error("--named and --every are about other cuts; add --cuts")
    if options.once and (options.cuts or options.rank):
        parser.error("--once is without an adapter and times nothing; leave --rank and --cuts out")
    shapes = options.shapes.split(",")
    for shape in shapes:
        if not re.fullmatch(r"\d+x\d+", shape):
            parser.error(f"--shapes has {shape}; type d_out x d_in, as 4096x14336")
    if not torch.cuda.is_available():
        parser.error("it times kernels of an NVIDIA GPU, and torch finds none")
    deadline = Deadline(options.seconds)
    tokens = [int(word) for word in options.tokens.split(",")]
    if options.cuts:
        compile_all(tokens, options.named, options.rank > 0)
    for shape in shapes:
        out_features, in_features = map(int, shape.split("x"))
        for t in tokens:
            if options.once:
                make_once(out_features, in_features, t, options.once.split(","))
                continue
            if deadline.passed:
                print(f"{shape}, {t} tokens: no time left")
                continue
            rank = round(options.rank * in_features)
            line = measure(out_features, in_features, t, rank, options)
            print(f"{shape}, {t} tokens: {line}", flush=True)


@torch.no_grad()
def make_once(out_features: int, in_features: int, tokens: int, names: Sequence[str]) -> None:
    """A product by each launch, or dense."""
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    layer = SlopeLinear(in_features, out_features, bias=False, **settings)
    dense, x = layer.to_dense(), torch.randn(tokens, in_features, **settings)
    for name in names:
        torch.cuda.synchronize()
        print(f"{out_features}x{in_features}, {tokens} tokens: {name}", flush=True)
        if name == "dense":
            torch.nn.functional.linear(x, dense)
        else:
            given = x, layer.values, layer.metadata, None, None, None, 1.0
            decode_mma(*given, MmaLaunch.parse(name))
        torch.cuda.synchronize()


def compile_all(tokens: Sequence[int], named: str, adapted: bool) -> None:
    """Every cut, on all cores."""
    cuts = {cut for t in tokens for cut in cuts_of(t, named)}
    if adapted:
        cuts |= {cut._replace(low_splits=1) for cut in cuts if cut.tma}

    def compile_one(cut: MmaLaunch) -> None:
        torch.cuda.set_device(0)
        decoding_mma._kernel(cut, torch.bfloat16, 0)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, cuts))


def cuts_of(tokens: int, named: str) -> list[MmaLaunch]:
    """The candidates that fit into shared memory; more than 64 tokens are shared among blocks."""
    cuts = []
    if tokens <= 8 * max(CUTS):
        tiles = next(most for most in CUTS if tokens <= 8 * most)
        cuts = [MmaLaunch(tiles, *cut) for cut in CUTS[tiles]]
    if torch.cuda.get_device_capability() == (9, 0):
        least = next((most for most in GROUPED if tokens <= 8 * most), max(GROUPED))
        for tiles in (least,) if tokens <= MAX_TOKENS else (8, 16):
            cuts += [MmaLaunch(tiles, *cut, grouped=True) for cut in GROUPED[tiles]]
        for tiles, ways in BY_TMA.items():
            if tiles <= least and (tiles >= 6 or tokens <= 8 * PARTS * tiles):
                cuts += [MmaLaunch(tiles, *cut, grouped=True, tma=True) for cut in ways]
                more = STAYING.get(tiles, ())
                cuts += [MmaLaunch(tiles, *cut, grouped=True, tma=True, stays=True) for cut in more]
    memory = decoding_mma._shared_memory(0)
    return [cut for cut in cuts if cut.shared <= memory and re.search(named, str(cut))]


def candidates(
    out_features: int, in_features: int, tokens: int, rank: int, named: str, most_splits: int
) -> Iterator[MmaLaunch]:
    """Each cut with its splits; with an adapter also those of down, 0 leaves it to cuBLAS."""
    for launch in decoding_mma.split(cuts_of(tokens, named), tokens, out_features, in_features):
        if launch.splits > most_splits:
            continue
        ways = LOW_SPLITS if rank else (0,)
        if launch.tma:
            ways = ways[: 1 if rank % decoding_mma._TMA_ROW else 4]
        for low in ways:
            yield launch._replace(low_splits=low)


@torch.no_grad()
def measure(
    out_features: int, in_features: int, tokens: int, rank: int, options: argparse.Namespace
) -> str:
    """One line of the table."""
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    compressed = out_features * in_features * 9 // 8
    layers = [
        SlopeLinear(in_features, out_features, bias=False, **settings)
        for _ in range(min(60, max(2, BEYOND_CACHE // compressed)))
    ]
    dense = [layer.to_dense() for layer in layers]
    packed = [ops.packed_operand(layer.values, layer.metadata) for layer in layers]
    x = torch.randn(tokens, in_features, **settings)
    down = torch.randn(rank, in_features, **settings) / in_features**0.5 if rank else None
    up = torch.randn(out_features, rank, **settings) if rank else None

    def adapted(y: Tensor) -> Tensor:
        return y if down is None or up is None else y.addmm_(x @ down.t(), up.t())

    def by_dense(number: int) -> Tensor:
        return adapted(torch.nn.functional.linear(x, dense[number]))

    def by_path(path: str, number: int) -> Tensor:
        layer = layers[number]
        given = x, layer.values, layer.metadata, layer.column_mask, packed[number], None
        return ops.sparse_linear_forward(*given, down, up, 1.0, path)

    def by_cut(launch: MmaLaunch, number: int) -> Tensor:
        given = x, layers[number].values, layers[number].metadata, None
        if launch.low_splits:
            return decode_mma(*given, down, up, 1.0, launch)
        return adapted(decode_mma(*given, None, None, 1.0, launch))

    def all_layers(act: Callable[[int], Tensor]) -> Call:
        def with_another(number: int) -> Tensor:
            x.neg_()
            return act(number)

        return over(range(len(layers)), with_another if options.apart else act)

    def by_way(way: str, number: int) -> Tensor:
        assert down is not None and up is not None
        given = packed[number], x, None, out_features, down, up
        return gemm_with_adapter(*given, 1.0, way)

    clock = Clock(settings["device"])
    calls = {"dense": all_layers(by_dense)}
    dtypes = (torch.bfloat16,) * 2
    unserved = {
        "triton": tokens > MAX_TOKENS,
        "mma": why_no_mma(bucket(tokens), out_features, in_features, *dtypes, 0) is not None,
        "gemm": why_no_gemm(bucket(tokens), out_features, in_features, 0) is not None,
    }
    for path in options.paths.split(","):
        if not unserved.get(path):
            calls[path] = all_layers(functools.partial(by_path, path))
            for way in WAYS if path == "gemm" and takes_adapter(rank) else ():
                calls[f"{path} {way}"] = all_layers(functools.partial(by_way, way))
    if options.cuts:
        expected = by_dense(0).float()
        times = {}
        case = out_features, in_features, tokens, rank
        for launch in candidates(*case, options.named, options.splits):
            name, act = str(launch), functools.partial(by_cut, launch)
            difference = (act(0).float() - expected).norm() / expected.norm()
            if not difference < 1e-2:
                raise AssertionError(f"{out_features}x{in_features}, {name}: error {difference}")
            call = all_layers(act)
            call()
            timing = interleave({name: captured(call)}, clock, ONCE, Deadline())[name]
            times[name] = Spread.of(timing.seconds).median / len(layers), call
        best = sorted(times, key=lambda name: times[name][0])[:FINALISTS]
        calls |= {name: times[name][1] for name in best}
        if options.every:
            with options.every.open("a", newline="") as file:
                rows = csv.writer(file)
                rows.writerows(
                    (*case, name, f"{time * 1e6:.3f}") for name, (time, _) in times.items()
                )
    for call in calls.values():
        call()
    graphs = {name: clock.captured(call) for name, call in calls.items()}
    timings = interleave(graphs, clock, EFFORT, Deadline())
    parts = []
    for name, timing in timings.items():
        median = Spread.of(timing.seconds).median / len(layers)
        faster = timing.speed_up(timings["dense"])
        moved = 2 * out_features * in_features if name == "dense" else compressed
        taken = f" {chosen(out_features, in_features, tokens, rank)}" if name == "mma" else ""
        parts.append(
            f"{name}{taken} {median * 1e6:.1f} us, {faster.median:.2f} x ({faster.low:.2f} to "
            f"{faster.high:.2f}), {moved / median * 1e-9:.0f} GB/s"
        )
    return "; ".join(parts)


def chosen(out_features: int, in_features: int, tokens: int, rank: int) -> str:
    """The name of the launch that the product took."""
    case = out_features, in_features, bucket(tokens), rank
    return next(
        choice.algorithms["mma"]
        for key, choice in ops.tuner().known().items()
        if case == (key.out_features, key.in_features, key.tokens, key.adapter_rank)
        and "mma" in choice.algorithms
    )


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
