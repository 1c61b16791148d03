"""``slope estimate``: what a run needs and how fast it will be, without a GPU."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slope.cli import common

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slope.estimate import Estimate, Request, Side

ABOUT = "memory, speed and fit of a run, before it starts and without a GPU"
_EPILOG = """\
settings:
  model=llama3-8b       {models}
  experiment=owt/gpt2s  instead: a recipe, with its batch, sequence length and accumulation
  gpu=h200              {gpus}
  pattern=2:4 rank=16   of the sparse layers and their adapters; rank=0.0156 is a ratio of d_in
  batch=8 seq=2048      micro-batch per device, tokens of a sequence
  accumulate=1          micro-batches per optimizer step
  devices=1             of one host of 8, or of several
  strategy=ddp          or zero1 (optimizer=adamw-zero), fsdp2, hsdp (sharded inside each host)
  precision=bf16-mixed  or bf16, weights and moments too
  pruner.skip_attention=True   and every other key under model. and pruner., as for `slope train`

examples:
  slope estimate model=llama3-8b gpu=h200
  slope estimate model=opt-13b devices=8 strategy=fsdp2 batch=4 --json
  slope estimate experiment=c4/opt-6.7b devices=8 gpu=a100
  slope estimate model=opt-66b --accounting paper
"""
_WIDTH = 100


def run(arguments: list[str]) -> int:
    """Parse, estimate, print; the exit code."""
    from slope.estimate.rates import gpus
    from slope.estimate.request import models, parse

    listed = textwrap.fill(models(), _WIDTH - 24).replace("\n", "\n" + " " * 24)
    epilog = _EPILOG.format(models=listed, gpus=", ".join(gpus()))
    parser = common.parser(
        "estimate", "Estimate memory, speed and fit of a run; needs no GPU.", epilog
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--accounting", choices=("ours", "paper"), default="ours",
        help="ours (default): what a run holds; paper: the memory ratios of the paper's table, "
        "counted as the paper does and as we do",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    try:
        request = parse(options.settings)
        if options.accounting == "paper":
            _paper(request, options.json)
        else:
            _ours(request, options.json)
    except ValueError as error:
        return common.usage_error(error, options.traceback)
    return 0


def _ours(request: Request, as_json: bool) -> None:
    if not as_json:
        print(f"slope: estimate {request.title} on one {request.rates.gpu.name}", flush=True)
    from slope.estimate import estimate

    result = estimate(request)
    if as_json:
        print(common.as_json(_as_json(result)))
    else:
        _show(result)


def _as_json(result: Estimate) -> dict[str, Any]:
    """Everything of an estimate as plain values: bytes, seconds, FLOPs, ratios."""
    request, model = result.request, result.model
    dense, sparse = result.dense, result.sparse
    settings = ("batch", "seq", "accumulate", "devices", "strategy", "precision")
    return {
        "title": request.title,
        "gpu": asdict(request.rates.gpu) | {"usable_memory": request.rates.usable_memory},
        "settings": {name: getattr(request, name) for name in settings},
        "pattern": sorted({str(layer.pattern) for layer in model.sparse}),
        "parameters": {
            "total": model.parameters,
            "in_sparse_layers": model.in_sparse_layers,
            "kept_in_sparse_layers": model.values,
            "adapters": model.adapters,
        },
        "dense": _side_as_json(dense),
        "sparse": _side_as_json(sparse),
        "sparse_with_active_adapters": asdict(result.awake) | {"total": result.awake.total},
        "speed_up": result.speed_up,
        "speed_up_with_active_adapters": dense.step.total / result.awake.total,
        "memory_ratio": sparse.training.total / dense.training.total,
        "state_ratio": sparse.training.state / dense.training.state,
        "measured_share": result.measured_share,
        "advice": list(result.advice),
        "notes": list(result.notes),
    }


def _side_as_json(side: Side) -> dict[str, Any]:
    training, step, sent = side.training, side.step, side.traffic.sent
    return asdict(side) | {
        "training": asdict(training) | {"state": training.state, "total": training.total},
        "traffic": asdict(side.traffic) | {"sent": sent},
        "step": asdict(step) | {"total": step.total},
    }


def _show(result: Estimate) -> None:
    request, model, dense, sparse = result.request, result.model, result.dense, result.sparse
    patterns = ", ".join(sorted({str(layer.pattern) for layer in model.sparse}))
    devices = (
        f"{request.devices} devices, {request.strategy}" if request.devices > 1 else "1 device"
    )
    print(
        f"{patterns} in {len(model.sparse)} of {len(model.linears)} linear layers; "
        f"{request.precision}; {devices}; micro-batch {request.batch} x {request.seq} tokens, "
        f"{request.accumulate} per step\n"
    )
    print(f"{'':<29}{'dense':>12}{'sparse':>12}{'ratio':>8}   basis")
    for line in _lines(result):
        print(line)
    limit, memory = request.rates.usable_memory, request.rates.gpu.memory
    for name, side in (("dense", dense), ("sparse", sparse)):
        verdict = "fits in" if side.fits else "DOES NOT FIT in"
        print(
            f"{name}: {side.training.total / 1e9:.1f} GB {verdict} {limit / 1e9:.1f} GB "
            f"({limit / memory:.0%} of {memory / 1e9:.0f} GB)"
        )
    if not sparse.fits:
        ways = result.advice or ("nothing up to 1024 devices; take a smaller model",)
        print("\n".join(["what fits instead:", *(f"  {way}" for way in ways)]))
    print("\nassumptions and sources")
    for note in result.notes:
        print(textwrap.fill(note, _WIDTH, initial_indent="  ", subsequent_indent="    "))


def _lines(result: Estimate) -> Iterator[str]:
    """The table; rows without a number on either side are left out."""
    model, dense, sparse, request = result.model, result.dense, result.sparse, result.request

    def row(name: str, a: float, b: float, basis: str, places: int = 2) -> Iterator[str]:
        if a or b:
            ratio = f"{b / a:.3f}" if a else ""
            numbers = f"{a:>12,.{places}f}{b:>12,.{places}f}{ratio:>8}"
            yield f"{name:<29}{numbers}   {basis}".rstrip()

    def fields(of: str, unit: float, bases: dict[str, str]) -> Iterator[str]:
        for name, basis in bases.items():
            a, b = (getattr(getattr(side, of), name) / unit for side in (dense, sparse))
            yield from row(f"  {name}", a, b, basis)

    yield from row("parameters, G", dense.parameters / 1e9, sparse.parameters / 1e9, "counted", 3)
    yield from row(
        "  in sparse layers", model.in_sparse_layers / 1e9, model.values / 1e9, "counted", 3
    )
    yield from row("  adapters", 0, model.adapters / 1e9, "counted", 3)
    yield "\ntraining, GB per GPU"
    names = ("weights", "masks", "gradients", "optimizer", "working", "exchange", "activations")
    yield from fields("training", 1e9, dict.fromkeys((*names, "total"), "counted"))
    if request.devices > 1:
        yield "\nsent in a step, GB, by one GPU"
        names = ("parameters", "gradients", "masks", "sent")
        yield from fields("traffic", 1e9, dict.fromkeys(names, "counted"))
        yield from fields("traffic", 1e9, {"leaving_host": "counted, by all GPUs of a host"})
    yield f"\nserving in bf16, GB ({request.batch} x {request.seq} tokens in the cache)"
    yield from fields("serving", 1e9, dict.fromkeys(("weights", "adapters", "cache"), "counted"))
    yield "\ntime of a step, ms"
    rates = "measured" if request.rates.gpu.measured else "measured, scaled by peak"
    bases = {"products": rates, "attention": "assumed share of peak", "elementwise": "bytes"}
    bases |= dict.fromkeys(("upkeep", "optimizer", "exchange"), "bytes")
    yield from fields("step", 1e-3, bases | {"total": "sum"})
    if model.adapters:
        total = dense.step.total * 1e3
        yield from row("  total, adapters active", total, result.awake.total * 1e3, "sum")
    yield "\nspeed"
    yield from row("  GFLOPs per token", dense.flops.done / 1e9, sparse.flops.done / 1e9, "counted")
    yield from row("  tokens/s", dense.tokens_per_second, sparse.tokens_per_second, "", 0)
    yield from row("  MFU of the dense FLOPs, %", dense.mfu * 100, sparse.mfu * 100, "", 1)
    yield from row("  speed-up", 1, result.speed_up, "")
    yield ""


def _paper(request: Request, as_json: bool) -> None:
    from slope.estimate.paper import rows

    found = rows(request.title)
    if as_json:
        table = [asdict(row) | {"follows": row.follows} for row in found]
        print(common.as_json({"title": request.title, "accounting": "paper", "rows": table}))
        return
    print(f"{request.title}, memory, sparse / dense, of the shortened models of arXiv 2405.16325\n")
    print(f"{'':<24}{'blocks':>8}{'published':>11}{'counted':>9}{'follows':>9}{'ours':>8}")
    for row in found:
        follows = "yes" if row.follows else "NO"
        print(
            f"{row.what:<24}{row.blocks:>8}{row.published:>11.2f}{row.paper:>9.3f}{follows:>9}"
            f"{row.ours:>8.3f}"
        )
    note = (
        "counted: as the authors' script does; embeddings and head stay dense, but their gradients "
        "and moments are halved too, which no run can do. ours: what a run of this library holds, "
        "weights, masks, gradients and moments under bf16-mixed, or weights that serve in bf16; "
        "the first Q, K and V stay dense. A sparse layer alone, training: 0.688 by the paper's "
        "accounting, 0.512 ours, without a byte of mask per weight and a second sparse copy; "
        "serving: 0.5625 both. (The paper prints 0.682 and 0.547, with 3 bits of positions per "
        "group; the tensors hold 4.)"
    )
    print(f"\n{textwrap.fill(note, _WIDTH)}")
