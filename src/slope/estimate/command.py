"""``slope estimate``: parameters, bytes, FLOPs and time of a run, dense and sparse side by side."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from slope import configs
from slope.estimate import paper
from slope.estimate.rates import gpus
from slope.estimate.report import Estimate, Side, estimate, measured_share
from slope.estimate.request import MOMENTS, PRECISIONS, STRATEGIES, Request, parse

if TYPE_CHECKING:
    from rich.table import Table

ABOUT = "memory, speed and fit of a run, before it starts and without a GPU"
_WIDTH = 100
_TOLERANCE = 0.02
_EPILOG = f"""\
settings:
  model=llama3-8b       one of `slope config --list`, / or - between its parts
  experiment=owt/gpt2s  instead: a recipe, with its batch, sequence length and accumulation
  gpu=h200              {", ".join(gpus())}
  pattern=2:4 rank=16   of the sparse layers and their adapters; rank=0.0156 is a ratio of d_in
  batch=8 seq=2048      micro-batch and length of a sequence, per device
  accumulate=1          micro-batches per optimizer step
  devices=1 strategy=ddp       {" | ".join(STRATEGIES)}
  precision=bf16-mixed         {" | ".join(PRECISIONS)}
  moments=fp32          Adam's moments, {" | ".join(MOMENTS)}; else the dtype of the parameters
  layers=4              a model shortened to so many blocks
  pruner.skip_attention=True   and every other key with a dot, as for `slope train`

examples:
  slope estimate model=llama3-8b gpu=h200
  slope estimate model=opt-13b devices=8 strategy=fsdp batch=4 --json
  slope estimate experiment=c4/opt-6.7b devices=8 gpu=a100
  slope estimate model=opt-66b --accounting paper
"""


def run(arguments: list[str]) -> int:
    """Parse, estimate, print; the exit code."""
    parser = argparse.ArgumentParser(
        prog="slope estimate",
        description="Estimate memory, speed and fit of a run; needs no GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--accounting",
        metavar="paper|ours",
        default="ours",
        help="ours (default): what a run holds; paper: the ratios as the paper counts them",
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error came from (or set SLOPE_TRACEBACK=1)",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        _check_accounting(options.accounting)
        request = parse(options.settings)
        if options.accounting == "paper":
            _print_paper(_paper_rows(request), request, options.json)
            return 0
        if not options.json:
            print(f"slope: estimate {request.title} on one {request.rates.gpu.name}", flush=True)
        result = estimate(request)
    except ValueError as error:
        if options.traceback or os.environ.get("SLOPE_TRACEBACK", "") not in ("", "0"):
            traceback.print_exception(error)
        print(f"slope: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(result), indent=2))
    else:
        _show(result)
    return 0


def _check_accounting(name: str) -> None:
    known = ("paper", "ours")
    if name not in known:
        raise ValueError(
            f"--accounting {name} is unknown; did you mean {configs.nearest(name, known)}? "
            "Choices: paper, ours."
        )


# -- our accounting --------------------------------------------------------------------------------


def as_json(result: Estimate) -> dict[str, Any]:
    """Everything of an estimate as plain values: bytes, seconds, FLOPs, ratios."""
    request, model, gpu = result.request, result.model, result.request.rates.gpu
    return {
        "model": request.title,
        "gpu": asdict(gpu),
        "settings": {
            "pattern": sorted({str(layer.pattern) for layer in model.sparse}),
            "batch": result.batch,
            "seq": result.seq,
            "accumulate": request.accumulate,
            "devices": request.devices,
            "strategy": request.strategy,
            "precision": request.precision,
            "bytes_per_number": asdict(result.precision),
        },
        "parameters": {
            "total": model.parameters,
            "in_sparse_layers": model.parameters_in_sparse_layers,
            "kept_in_sparse_layers": model.values,
            "adapters": model.adapters,
        },
        "usable_memory": request.rates.usable_memory,
        "dense": _side_as_json(result.dense),
        "sparse": _side_as_json(result.sparse),
        "sparse_with_active_adapters": asdict(result.awake) | {"total": result.awake.total},
        "speed_up": result.speed_up,
        "speed_up_with_active_adapters": result.dense.step.total / result.awake.total,
        "memory_ratio": result.sparse.training.total / result.dense.training.total,
        "state_ratio": result.sparse.training.state / result.dense.training.state,
        "serving_weights_ratio": result.sparse.serving.weights / result.dense.serving.weights,
        "advice": list(result.advice),
        "notes": list(result.notes),
        "provenance": {
            "measurement": dict(request.rates.measurement),
            "share_of_products_in_measured_shapes": measured_share(model, request.rates),
            "counted": ["parameters", "training", "serving", "flops_per_token"],
            "measured": ["step_seconds.products"],
            "arithmetic": [
                f"step_seconds.{name}"
                for name in ("attention", "elementwise", "upkeep", "optimizer", "exchange")
            ],
        },
    }


def _side_as_json(side: Side) -> dict[str, Any]:
    training, serving, step = side.training, side.serving, side.step
    return {
        "parameters": side.parameters,
        "training": asdict(training) | {"state": training.state, "total": training.total},
        "serving": asdict(serving) | {"total": serving.total},
        "flops_per_token": asdict(side.flops),
        "step_seconds": asdict(step) | {"total": step.total},
        "tokens_per_second": side.tokens_per_second,
        "mfu": side.mfu,
        "fits": side.fits,
    }


def _show(result: Estimate) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.width = min(_WIDTH, console.width) if console.is_terminal else _WIDTH
    request, model = result.request, result.model
    patterns = ", ".join(sorted({str(layer.pattern) for layer in model.sparse}))
    shared = f", {request.strategy}" if request.devices > 1 else ""
    console.print(
        f"{patterns} in {len(model.sparse)} of {len(model.linears)} linear layers; "
        f"{request.precision}; {request.devices} device(s){shared}; micro-batch {result.batch} x "
        f"{result.seq} tokens, {request.accumulate} per step"
    )
    console.print(_table(result))
    limit = request.rates.usable_memory
    for name, side in (("dense", result.dense), ("sparse", result.sparse)):
        verdict = "fits in" if side.fits else "DOES NOT FIT in"
        console.print(
            f"{name}: {side.training.total / 1e9:.1f} GB {verdict} {limit / 1e9:.1f} GB "
            f"({limit / request.rates.gpu.memory:.0%} of {request.rates.gpu.memory / 1e9:.0f} GB)"
        )
    if not result.sparse.fits:
        ways = result.advice or ("nothing within 1024 devices; take a smaller model.",)
        console.print("what fits instead:")
        for way in ways:
            console.print(f"  {way}")
    share = measured_share(model, request.rates)
    console.print(
        f"measured: rates of the products, {request.rates.measurement['what'].split(',')[0]}, on "
        f"one H200, {request.rates.measurement['date']}; {share:.0%} of their FLOPs are in shapes "
        "that were measured, the rest is interpolated. Everything else is counted or arithmetic: "
        "no kernel is slower here than its bytes."
    )
    for note in result.notes:
        console.print(note)


def _table(result: Estimate) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    model, dense, sparse = result.model, result.dense, result.sparse
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("", "dense", "sparse", "ratio", "basis"):
        table.add_column(title, justify="left" if title in ("", "basis") else "right")

    def row(name: str, a: float, b: float, basis: str, unit: float = 1e9, places: int = 2) -> None:
        if a or b:
            ratio = f"{b / a:.3f}" if a else ""
            number = f",.{places}f"
            table.add_row(name, format(a / unit, number), format(b / unit, number), ratio, basis)

    def section(title: str) -> None:
        table.add_section()
        table.add_row(title)

    row("parameters, G", dense.parameters, sparse.parameters, "counted", places=3)
    in_sparse = model.parameters_in_sparse_layers
    row("  in sparse layers", in_sparse, model.values, "counted", places=3)
    row("  adapters", 0, model.adapters, "counted", places=3)
    section("training, GB per GPU")
    for name in ("weights", "masks", "gradients", "optimizer", "working", "exchange"):
        row(f"  {name}", getattr(dense.training, name), getattr(sparse.training, name), "counted")
    row("  activations", dense.training.activations, sparse.training.activations, "counted")
    row("  total", dense.training.total, sparse.training.total, "counted")
    section("serving in bf16, GB")
    row("  weights", dense.serving.weights, sparse.serving.weights, "counted")
    row("  adapters", 0, sparse.serving.adapters, "counted")
    row(
        f"  key/value cache, {result.batch} x {result.seq}",
        dense.serving.cache, sparse.serving.cache, "counted",
    )  # fmt: skip
    section("time of a step, ms")
    scaled = "measured" if result.request.rates.gpu.measured else "scaled by peak"
    row("  products of linear layers", dense.step.products, sparse.step.products, scaled, 1e-3)
    for name, basis in (
        ("attention", "assumed share of peak"),
        ("elementwise", "bytes"),
        ("upkeep", "bytes"),
        ("optimizer", "bytes"),
        ("exchange", "bytes, not hidden"),
    ):
        row(f"  {name}", getattr(dense.step, name), getattr(sparse.step, name), basis, 1e-3)
    row("  total", dense.step.total, sparse.step.total, "sum", 1e-3)
    if model.adapters:
        row("  total, adapters active", dense.step.total, result.awake.total, "sum", 1e-3)
    section("speed")
    row("  GFLOPs per token", dense.flops.done, sparse.flops.done, "counted")
    row("  tokens/s", dense.tokens_per_second, sparse.tokens_per_second, "", 1, 0)
    row("  MFU of the dense FLOPs, %", dense.mfu, sparse.mfu, "", 0.01, 1)
    table.add_row("  speed-up", "1.00", f"{result.speed_up:.2f}")
    return table


# -- the paper's accounting ------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperRow:
    """One ratio of the paper's accounting.

    Attributes:
        what: what it is of.
        blocks: of the model that is counted; None for all.
        as_printed: with 3 bits of positions per group, as the paper prints.
        as_stored: with 4 bits, as the tensors hold.
        published: in the paper's table, or None.
    """

    what: str
    blocks: int | None
    as_printed: float
    as_stored: float
    published: float | None

    @property
    def follows(self) -> bool | None:
        """Whether the published ratio follows from the arithmetic, within 0.02."""
        if self.published is None:
            return None
        return abs(self.published - self.as_stored) <= _TOLERANCE


def _paper_rows(request: Request) -> list[PaperRow]:
    if request.title not in configs.choices("model"):
        raise ValueError(
            f"--accounting paper counts a model, not experiment={request.title}; name it, for "
            "example model=opt-66b."
        )
    found = next((row for row in paper.PUBLISHED if row.model == request.title), None)
    # The published ratios belong to the shortened models that were measured.
    known = found if request.layers is None else None
    training_blocks = known.blocks_training if known else request.layers
    inference_blocks = known.blocks_inference if known else request.layers
    training = paper.weights_of(request.title, training_blocks)
    inference = paper.weights_of(request.title, inference_blocks)
    rows = [
        PaperRow(
            "training",
            training_blocks,
            paper.training_ratio(training, paper.POSITIONS_AS_PRINTED),
            paper.training_ratio(training),
            known.training if known else None,
        )
    ]
    for index, ratio in enumerate(paper.RANK_RATIOS):
        rows.append(
            PaperRow(
                f"inference, rank {ratio:.2%}",
                inference_blocks,
                paper.inference_ratio(inference, ratio, paper.POSITIONS_AS_PRINTED),
                paper.inference_ratio(inference, ratio),
                known.inference[index] if known else None,
            )
        )
    return rows


def _print_paper(rows: list[PaperRow], request: Request, as_text: bool) -> None:
    layer = {
        "training": paper.sparse_training(paper.POSITIONS_AS_PRINTED) / paper.DENSE_TRAINING,
        "inference": paper.sparse_inference(paper.POSITIONS_AS_PRINTED) / paper.DENSE_INFERENCE,
    }
    if as_text:
        content = {
            "model": request.title,
            "accounting": "paper",
            "sparse_layer": layer,
            "ratios": [asdict(row) | {"follows": row.follows} for row in rows],
        }
        print(json.dumps(content, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=_WIDTH)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for title in ("sparse / dense", "blocks", "as printed", "as stored", "published", "follows"):
        table.add_column(title, justify="left" if title == "sparse / dense" else "right")
    for row in rows:
        table.add_row(
            row.what,
            "all" if row.blocks is None else str(row.blocks),
            f"{row.as_printed:.3f}",
            f"{row.as_stored:.3f}",
            "" if row.published is None else f"{row.published:.2f}",
            {None: "", True: "yes", False: "NO"}[row.follows],
        )
    console.print(f"{request.title}, counted as in arXiv 2405.16325")
    console.print(table)
    console.print(
        f"A sparse layer alone: training {layer['training']:.3f}, inference "
        f"{layer['inference']:.3f}. Counted as the authors' script does: embeddings and head stay "
        "dense, but their gradients and moments are halved too, which no run can do; "
        "--accounting ours (the default) counts what a run holds."
    )
