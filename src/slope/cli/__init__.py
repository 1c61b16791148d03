"""The ``slope`` command: ``slope train experiment=demo``, ``slope config``, ``slope plot``.

The first line is printed before torch is imported, which takes seconds. Exit codes: 0 done,
1 failed, 2 the command line was wrong, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from slope import configs

_EPILOG = """\
overrides:
  experiment=owt/gpt2s    a whole recipe (`slope config --list` shows all)
  model=, datamodule=, pruner=, optimizer=, scheduler=   one part of it
  key=value               one value, for example trainer.max_steps=1000 pruner.add_lora=True
  +key=value              a key that the configuration does not have

examples:
  slope train experiment=demo
  slope train experiment=smoke name=first datamodule=text datamodule.data_files=corpus.txt
  slope train experiment=owt/gpt2s pruner=slope trainer.devices=8 name=my-run resume=True
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are one message on stderr.

    Args:
        argv: without the program's name; None takes ``sys.argv``.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "config": _config,
        "plot": _plot,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from slope import __version__

        print(f"slope {__version__}")
        return 0
    command = arguments.pop(0)
    if command not in commands:
        near = configs.nearest(command, commands)
        return _fail(
            f"unknown command {command!r}; did you mean {near!r}? Commands: {', '.join(commands)}.",
            2,
        )
    show = "--traceback" in arguments or os.environ.get("SLOPE_TRACEBACK", "") not in ("", "0")
    try:
        return commands[command](arguments)
    except SystemExit as stop:  # argparse has printed what it stopped for
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C.", 130)
    except Exception as error:
        if show:
            traceback.print_exc()
        return _fail(_message(error), 1)


def _print_help() -> None:
    print("usage: slope <command> [options]\n")
    print("Pretrain language models with N:M sparse weights (SLoPe, arXiv 2405.16325).\n")
    print("commands:")
    print("  train   pretrain a model:                 slope train experiment=demo")
    print("  config  print a run's configuration:      slope config experiment=owt/gpt2s")
    print("  plot    draw a run's curves:              slope plot my-run")
    print("\n`slope <command> --help` says more; `slope --version` prints the version.")


def _parser(command: str, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"slope {command}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error came from (or set SLOPE_TRACEBACK=1)",
    )
    return parser


def _train(arguments: list[str]) -> int:
    parser = _parser("train", "Pretrain a model.", _EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="override", help="see below")
    parser.add_argument(
        "--cfg", action="store_true", help="print the resolved configuration and do nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    if not options.overrides:
        listed = ", ".join(configs.choices("experiment"))
        return _fail(f"nothing to train; add experiment=demo or another of {listed}.", 2)
    if options.cfg:
        return _print_config(options.overrides)
    from slope.training.pruner import check_pruner

    try:
        cfg = configs.compose(options.overrides)
        check_pruner(cfg.pruner)
    except ValueError as error:
        return _usage_error(error, options.traceback)
    if _is_first_process():
        chosen = [o.partition("=")[2] for o in options.overrides if o.startswith("experiment=")]
        experiment = chosen[-1] if chosen else "none"
        print(f"slope: train experiment={experiment} name={cfg.name}", flush=True)

    from slope.training import run

    return 130 if run(cfg).get("interrupted") else 0


def _config(arguments: list[str]) -> int:
    parser = _parser("config", "Print the resolved configuration of a run as YAML.", _EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="override", help="see below")
    parser.add_argument("--list", action="store_true", help="list the choices of every group")
    options = parser.parse_intermixed_args(arguments)
    if options.list:
        for group in configs.groups():
            print(f"{group}:")
            for name in configs.choices(group):
                print(f"  {name}")
        return 0
    return _print_config(options.overrides)


def _plot(arguments: list[str]) -> int:
    parser = _parser("plot", "Draw curves.png from a run's metrics.csv.")
    parser.add_argument("run", help="a run's name, or the folder with its metrics.csv")
    options = parser.parse_intermixed_args(arguments)
    folders = [Path(options.run), Path("logs") / options.run]
    folder = next((path for path in folders if (path / "metrics.csv").is_file()), None)
    if folder is None:
        runs = sorted(path.parent.name for path in Path("logs").glob("*/metrics.csv"))
        raise FileNotFoundError(
            f"no metrics.csv in {' or '.join(map(str, folders))}; "
            + (f"runs under logs/: {', '.join(runs)}." if runs else "give a run's folder.")
        )

    from slope.plotting import plot_run

    print(plot_run(folder))
    return 0


def _print_config(overrides: Sequence[str]) -> int:
    try:
        cfg = configs.compose(overrides)
    except ValueError as error:
        return _usage_error(error, False)

    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(cfg, resolve=True), end="")
    return 0


def _is_first_process() -> bool:
    return all(os.environ.get(key, "0") == "0" for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _usage_error(error: ValueError, show: bool) -> int:
    if show or os.environ.get("SLOPE_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    return _fail(str(error), 2)


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "slope":
        return f'{error.name} is not installed; type: pip install "slope-llm[train]"'
    if isinstance(error, (ValueError, RuntimeError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (SLOPE_TRACEBACK=1 shows where)"


def _fail(message: str, code: int) -> int:
    print(f"slope: error: {message}", file=sys.stderr)
    return code
