"""What the commands share: parsers, the printed configuration, and how an error is said."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slope import configs
from slope.spelling import did_you_mean

OVERRIDES = """\
overrides:
  experiment=owt/gpt2s    a whole recipe (`slope config --list` shows all)
  model=, datamodule=, pruner=, optimizer=, scheduler=   one part of it
  key=value               one value, for example trainer.max_steps=1000 pruner.add_lora=True
  +key=value              a key that the configuration does not have
"""
_LISTED = 10  # runs, of those there are, if one is not found


def parser(command: str, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options that every command has.

    Args:
        command: its name.
        about: what it does, one sentence.
        epilog: printed as it stands below the options; the place for examples.
    """
    made = argparse.ArgumentParser(
        prog=f"slope {command}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error came from (or set SLOPE_TRACEBACK=1)",
    )
    return made


def device(text: str) -> str:
    """The type of an argument that is ``auto`` or names a device, be there such a one or not."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; type cpu, cuda or cuda:N")
    return text


def print_config(
    overrides: Sequence[str], show_traceback: bool = False, wants_json: bool = False
) -> int:
    """Print the resolved configuration as YAML or JSON; the exit code."""
    try:
        cfg = configs.compose(overrides)
    except ValueError as error:
        return usage_error(error, show_traceback)

    from omegaconf import OmegaConf

    if wants_json:
        print(as_json(OmegaConf.to_container(cfg, resolve=True)))
    else:
        print(OmegaConf.to_yaml(cfg, resolve=True), end="")
    return 0


def as_json(document: Any) -> str:
    """JSON that every reader takes: a number that is infinite or none at all becomes null.

    Example:
        >>> print(as_json({"loss": 800.0, "perplexity": math.inf}))
        {
          "loss": 800.0,
          "perplexity": null
        }
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inside) for key, inside in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inside) for inside in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=2, ensure_ascii=False)


def find_run(given: str) -> Path:
    """The folder of a run that is named by its name or its folder.

    Raises:
        FileNotFoundError: if there are no metrics; the message lists the newest runs, and asks for
            one that is spelled almost so.
    """
    folders = [Path(given), Path("logs") / given]
    for folder in folders:
        if (folder / "metrics.csv").is_file():
            return folder
    said = f"no metrics.csv in {' or '.join(map(str, folders))}"
    tables = sorted(Path("logs").glob("*/metrics.csv"), key=lambda path: -path.stat().st_mtime)
    if not tables:
        raise FileNotFoundError(f"{said}; give a run's folder.")
    runs = [path.parent.name for path in tables]
    more = f" and {len(runs) - _LISTED} older ones" if len(runs) > _LISTED else ""
    raise FileNotFoundError(
        f"{said}; runs under logs/: {', '.join(runs[:_LISTED])}{more}{did_you_mean(given, runs)}"
    )


def is_first_process() -> bool:
    """Whether this is the only process of a run or the one of them that speaks."""
    return all(os.environ.get(key, "0") == "0" for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def unknown(what: str, given: str, known: Sequence[str]) -> str:
    """What is said of a name that is none of those known: one that is close to it, and all.

    Example:
        >>> unknown("command", "trian", ["train", "plot"])
        "unknown command 'trian'; did you mean 'train'? Commands: train, plot."
        >>> unknown("command", "foo", ["train", "plot"])
        "unknown command 'foo'. Commands: train, plot."
    """
    near = did_you_mean(given, known)
    return f"unknown {what} {given!r}{near} {what.capitalize()}s: {', '.join(known)}."


def wants_traceback() -> bool:
    """Whether the environment asks for tracebacks."""
    return os.environ.get("SLOPE_TRACEBACK", "") not in ("", "0")


def usage_error(error: Exception, show_traceback: bool) -> int:
    """Say that the command line was wrong; exit code 2."""
    if show_traceback or wants_traceback():
        traceback.print_exception(error)
    return fail(str(error), 2)


def message(error: Exception) -> str:
    """What is printed of an error."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "slope":
        return f'{error.name} is not installed; type: pip install "slope-llm[train]"'
    if isinstance(error, (ValueError, RuntimeError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (SLOPE_TRACEBACK=1 shows where)"


def fail(text: str, code: int) -> int:
    """Print one message on standard error and hand back the exit code."""
    print(f"slope: error: {text}", file=sys.stderr)
    return code
