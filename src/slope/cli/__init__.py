"""The ``slope`` command: ``slope train experiment=demo``, ``slope config …``, ``slope plot …``.

One module per command, with ``ABOUT``, a line for the list of commands, and ``run(arguments)``,
which hands back the exit code. To add one, write the module and name it in ``COMMANDS``. A module
is imported when its command is used, and imports torch only after its first line is printed: that
import takes seconds. Exit codes: 0 done, 1 failed, 2 the command line was wrong, 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from slope.cli.common import fail, message, unknown, wants_traceback

COMMANDS = (
    "train",
    "finetune",
    "config",
    "plot",
    "report",
    "compare",
    "inspect",
    "generate",
    "eval",
    "export",
    "bench",
    "estimate",
    "completion",
)
_HELP = """\
usage: slope <command> [options]

Pretrain language models with N:M sparse weights (SLoPe, arXiv 2405.16325).

commands:
{commands}

examples:
  slope train experiment=demo name=first
  slope report first

`slope <command> --help` says more, with examples; `slope --version`: the version.
`--json` makes a command print what a program may read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are one message on stderr.

    Args:
        argv: without the program's name; None takes ``sys.argv``.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Letters that the terminal does not have must not make a finished command fail.
        sys.stdout.reconfigure(errors="replace")
    if not arguments:
        _print_help(sys.stderr)
        return 2
    if arguments[0] in ("-h", "--help", "help"):
        _print_help(sys.stdout)
        return 0
    if arguments[0] == "--version":
        from slope import __version__

        print(f"slope {__version__}")
        return 0
    command = arguments.pop(0)
    if command not in COMMANDS:
        return fail(unknown("command", command, COMMANDS), 2)
    show = "--traceback" in arguments or wants_traceback()
    try:
        code: int = import_module(f"slope.cli.{command}").run(arguments)
        return code
    except SystemExit as stop:  # argparse has printed what it stopped for
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return fail("stopped by Ctrl-C.", 130)
    except Exception as error:
        if show:
            traceback.print_exc()
        return fail(message(error), 1)


def _print_help(file: TextIO) -> None:
    width = max(map(len, COMMANDS))
    listed = "\n".join(
        f"  {command:<{width}}  {import_module(f'slope.cli.{command}').ABOUT}"
        for command in COMMANDS
    )
    print(_HELP.format(commands=listed), file=file)
