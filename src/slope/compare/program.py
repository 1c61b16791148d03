"""A whole comparison: check, run, sum up, draw."""

from __future__ import annotations

import contextlib
import logging
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console

from slope.compare import results, runner, table
from slope.compare.plan import ENDED, Comparison, Run
from slope.compare.results import MethodResult

log = logging.getLogger(__name__)

LOG, ENVIRONMENT = "compare.log", "env.json"


class Outcome(NamedTuple):
    """How a comparison ended.

    Attributes:
        interrupted: whether a signal stopped it.
        failed: its failed runs with the reasons.
        results: of all runs so far.
        files: the tables and the figure.
    """

    interrupted: bool
    failed: Mapping[str, str]
    results: Sequence[MethodResult]
    files: Sequence[Path]


def compare(
    comparison: Comparison,
    runs: Sequence[Run],
    jobs: int | None,
    command: Sequence[str],
    console: Console | None = None,
) -> Outcome:
    """Do the runs that have not ended, then write and print what all runs so far have shown.

    Args:
        comparison: what :func:`slope.compare.plan.load` read.
        runs: those of its runs that are wanted now.
        jobs: processes at once; None: one per core on a CPU, 1 on a
            GPU or where a run has several devices.
        command: what was typed, for the log.
        console: where to print the table; None: standard output.

    Raises:
        ValueError: if a method's settings cannot work, before anything is run.
        RuntimeError: if another process works on the same comparison.
    """
    comparison.directory.mkdir(parents=True, exist_ok=True)
    with _alone(comparison):
        waiting = [run for run in runs if run.state() not in ENDED]
        complete, failed = True, {}
        if waiting:
            complete, failed = _run(comparison, runs, waiting, jobs, command)
        found = results.read(comparison)
        files = _show(comparison, found, console or Console()) if found else []
    return Outcome(not complete, failed, found, files)


def _run(
    comparison: Comparison,
    runs: Sequence[Run],
    waiting: Sequence[Run],
    jobs: int | None,
    command: Sequence[str],
) -> tuple[bool, dict[str, str]]:
    """Whether all runs have ended, and those that failed."""
    found = runner.check(waiting)
    cores = runner.cores()
    if jobs is None:
        jobs = cores if found["accelerator"] == "cpu" and comparison.devices == 1 else 1
    threads = max(1, cores // jobs)
    session = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "commit": _commit(),
        **found["machine"],
        "cores": cores,
        "jobs": jobs,
        "threads": threads,
    }
    table.add_session(comparison.directory / ENVIRONMENT, session)
    several = runner.Runner(runs, jobs, threads, comparison.progress_bar)
    with _log_to(comparison.directory / LOG, several.handler):
        log.info(
            "%s: %d of %d runs to do, %d at once with %d threads each.",
            comparison.name,
            len(waiting),
            len(runs),
            jobs,
            threads,
        )
        complete = several.run()
    return complete, {run.name: why for run, why in several.failed.items()}


def _show(comparison: Comparison, found: Sequence[MethodResult], console: Console) -> list[Path]:
    """Write and print the tables; the files."""
    written = table.write(comparison, found)

    from slope.compare.figure import draw

    written.append(draw(comparison, found))
    console.print(table.console_table(comparison, found))
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return written


def _commit() -> str | None:
    """The commit of the checkout that this package is in, with a plus if files have changed."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def _alone(comparison: Comparison) -> Iterator[None]:
    """Hold the comparison's lock; the system frees it when the process ends, however it ends."""
    try:
        with FileLock(comparison.directory / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"another process works on comparison {comparison.name!r} ({comparison.directory}); "
            "wait for it, or type name=<another>."
        ) from error


@contextlib.contextmanager
def _log_to(path: Path, console: logging.Handler) -> Iterator[None]:
    """Write the package's log to a file, which later sessions append to, and to the console."""
    logger = logging.getLogger("slope")
    level = logger.level
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(console)
        logger.removeHandler(file)
        file.close()
