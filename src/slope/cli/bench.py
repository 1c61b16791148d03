"""``slope bench``: measure speed and memory against dense."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from slope.cli import common

if TYPE_CHECKING:
    from slope.bench.experiment import Experiment

ABOUT = "measure speed and memory against dense, on this machine"
EXPERIMENTS = {
    "layer": "one linear layer: products, upkeep, forward + backward",
    "train": "whole training steps of shortened models",
    "infer": "prompt and decoding of shortened models, with adapters",
    "memory": "bytes of training and serving, beside the arithmetic",
    "setup": "compressing, packing and refreshing against one product",
    "lowrank": "time of an adapter against its rank",
}
_EPILOG = """\
measurements:
{experiments}

Without a GPU everything runs at toy sizes on the reference backend. docs/bench.md says what each
measures and how to read it.

examples:
  slope bench layer --device cuda --shapes 4096x4096,14336x4096 --tokens 2048,16384 --output results
  slope bench train --models llama3-8b --layers 1,3 --budget 300
  slope bench memory --device cpu --json
"""
_EXAMPLES = """\
examples:
  slope bench {name} --device cuda --output results/{name}
  slope bench {name} --device cpu --quick --json
"""


def run(arguments: list[str]) -> int:
    """Measure, write the results, and print the table."""
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    if arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    try:
        ready = prepared(arguments)
    except ValueError as error:
        return common.usage_error(error, "--traceback" in arguments)

    from slope.bench.experiment import run as measure

    # The end of a lease comes as SIGTERM, and leaves what was measured as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folder, rows = measure(ready)
    finally:
        signal.signal(signal.SIGTERM, before)
    if ready.options.json:
        environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
        found = {"measurement": ready.name, "folder": str(folder), "rows": rows}
        print(common.as_json(found | {"environment": environment}))
    else:
        print((folder / "table.md").read_text(encoding="utf-8"))
        print(f"written to {folder}")
    if all(row.get("failed") for row in rows):
        return common.fail(f"nothing could be measured; see {folder}/table.md", 1)
    return 0


def prepared(arguments: list[str]) -> Experiment:
    """The measurement of a command line, checked and not yet run.

    Args:
        arguments: its name and its options.

    Raises:
        ValueError: naming what is wrong and what to type.
    """
    name, *rest = arguments
    if name not in EXPERIMENTS:
        raise ValueError(common.unknown("measurement", name, list(EXPERIMENTS)))
    made: type[Experiment] = getattr(
        import_module(f"slope.bench.{name}"), f"{name.capitalize()}Bench"
    )
    parser = common.parser(f"bench {name}", EXPERIMENTS[name], _EXAMPLES.format(name=name))
    _add_common(parser)
    made.add_arguments(parser)
    options = parser.parse_intermixed_args(rest)
    _check(options)
    ready = made(options)
    ready.cases()
    return ready


def _help() -> str:
    listed = "\n".join(f"  {name:<8} {about}" for name, about in EXPERIMENTS.items())
    return (
        f"usage: slope bench <measurement> [options]\n\n{_EPILOG.format(experiments=listed)}\n"
        "`slope bench <measurement> --help` lists its options."
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; default: a GPU if there is one")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results folder, must be new")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no case after this time"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each contender")
    parser.add_argument(
        "--modes", metavar="MODE,…", help="eager, graph (a GPU's CUDA graphs); default: both"
    )
    parser.add_argument(
        "--cold", action="store_true", help="empty the GPU's L2 cache before each call"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _check(options: argparse.Namespace) -> None:
    """Check and convert the common options in place.

    Raises:
        ValueError: naming the option and what to type.
    """
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options.device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is unknown; type cuda, cuda:1 or cpu.") from error
    if options.device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name} is not supported; type cuda, cuda:1 or cpu.")
    if options.device.type == "cuda":
        count = torch.cuda.device_count()
        if (options.device.index or 0) >= count:
            raise ValueError(
                f"--device {name}: torch {torch.__version__} finds {count} GPUs; type --device cpu."
            )
        options.device = torch.device("cuda", options.device.index or 0)
        torch.cuda.set_device(options.device)
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget {options.budget:g} must be more than 0 seconds.")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds} must be at least 1.")
    if options.modes is not None:
        options.modes = tuple(part.strip() for part in options.modes.split(","))
        allowed = ("eager", "graph") if options.device.type == "cuda" else ("eager",)
        for mode in options.modes:
            if mode not in allowed:
                raise ValueError(
                    f"--modes {mode!r} cannot be measured on {options.device.type}; choose from "
                    f"{', '.join(allowed)}."
                )
