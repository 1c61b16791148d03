"""What the sub-commands of ``slope bench`` share: cases in, rows out, and the loop between."""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from slope.bench.environment import environment, watched
from slope.bench.results import Results, Row, draw_panels, failures, log, number, pivot
from slope.bench.timing import (
    Call,
    Clock,
    Deadline,
    Effort,
    Factory,
    Spread,
    interleave,
    noting,
    reason,
    warmed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FULL, _QUICK = Effort(25, 4e-3, 5, 15), Effort(8, 2e-3, 3, 4)
_ON_CPU = Effort(5, 1e-3, 1, 15)

TIMES = (
    "contender", "mode", "median_us", "low_us", "high_us", "host_us",
    "baseline", "speed_up", "speed_up_low", "speed_up_high", "rounds", "calls",
)  # fmt: skip
"""Columns of a timed row: µs per call with 10th and 90th percentile, speed-up in pairs."""


@dataclass(frozen=True)
class Case:
    """What is measured together; its fields are the first columns of a row."""

    def __str__(self) -> str:
        return " ".join(str(value) for value in asdict(self).values())


class Lab:
    """Measures contenders on one device.

    Args:
        device: ``cuda`` or ``cpu``.
        effort: how long.
        deadline: of the program.
        modes: ``"eager"``: as a user calls it; ``"graph"``: replayed from a CUDA graph.
        cold: empty the L2 cache before each call.
    """

    def __init__(
        self,
        device: torch.device,
        effort: Effort,
        deadline: Deadline,
        modes: Sequence[str] = ("eager",),
        cold: bool = False,
    ) -> None:
        self.device = device
        self.clock = Clock(device, cold)
        self._effort = effort
        self._deadline = deadline
        self._modes = tuple(modes)

    @property
    def late(self) -> bool:
        """Whether the budget is used up."""
        return self._deadline.passed

    def compare(self, factories: Mapping[str, Factory], baselines: Sequence[str]) -> list[Row]:
        """Time contenders side by side in every mode.

        Args:
            factories: each makes its operands and hands back the call.
            baselines: contenders of which the fastest is what speed-ups are told against.

        Returns:
            A row per contender and mode; for one that fails, with the reason under ``failed``.
        """
        failed: dict[str, str] = {}
        calls: dict[str, Call] = {}
        for name, make in factories.items():
            with noting(failed, name):
                calls[name] = warmed(make(), self.clock, self._effort)
            if name in failed:  # it may have run out of memory
                self.clock.free()
        rows: list[Row] = []
        for mode in self._modes:
            ready, why = calls, dict(failed)
            if mode == "graph":
                ready = {}
                for name, call in calls.items():
                    with noting(why, name):
                        ready[name] = self.clock.captured(call)
            timings = interleave(ready, self.clock, self._effort, self._deadline)
            medians = {n: statistics.median(timings[n].seconds) for n in baselines if n in timings}
            baseline = min(medians, key=lambda name: medians[name], default=None)
            for name in factories:
                row: Row = {"contender": name, "mode": mode, "failed": why.get(name)}
                if name in timings:
                    spread = Spread.of(timings[name].seconds)
                    row["median_us"] = spread.median * 1e6
                    row["low_us"], row["high_us"] = spread.low * 1e6, spread.high * 1e6
                    row["host_us"] = statistics.median(timings[name].host) * 1e6
                    row["rounds"], row["calls"] = len(timings[name].seconds), timings[name].calls
                if name in timings and baseline is not None:
                    ratio = timings[name].speed_up(timings[baseline])
                    row["baseline"], row["speed_up"] = baseline, ratio.median
                    row["speed_up_low"], row["speed_up_high"] = ratio.low, ratio.high
                rows.append(row)
        return rows


class Experiment(ABC):
    """One sub-command.

    Args:
        options: of the command line; see :meth:`add_arguments`.

    Raises:
        ValueError: if an option has a value that cannot be measured.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    case: ClassVar[type[Case]]
    columns: ClassVar[tuple[str, ...]]
    """After those of the case."""
    index: ClassVar[tuple[str, ...]]
    """Columns that tell one line of the table from another."""
    kinds: ClassVar[tuple[str, ...]] = ("contender", "mode")
    """Columns that tell one kind of failure from another."""
    note: ClassVar[str] = "Each cell: median time, and how many times as fast as the baseline."
    ylabel: ClassVar[str] = "baseline time / time"

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.on_gpu = options.device.type == "cuda"

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Options of this sub-command alone; defaults None, chosen by device."""

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """What to measure, in order."""

    @abstractmethod
    def measure(self, case: Any, lab: Lab) -> Iterator[Row]:
        """Rows of a case, without the columns of the case."""

    def across(self, row: Row) -> str:
        """The column of the table that a row stands in."""
        return str(row["contender"])

    def cell(self, row: Row) -> str:
        """What the table says of a row."""
        text = f"{number(row['median_us'], 1)} µs"
        if row.get("speed_up") is not None and row["contender"] != row["baseline"]:
            text += f", {number(row['speed_up'])}×"
        return text

    @abstractmethod
    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """Panel, line, x and y of a row in the figure."""

    def table(self, rows: list[Row]) -> str:
        """What was measured as Markdown."""
        return f"{self.note}\n\n" + pivot(rows, self.index, self.across, self.cell)


def run(experiment: Experiment) -> tuple[Path, list[Row]]:
    """Measure all cases within the budget and write the results.

    Returns:
        The folder, and its rows; one that could not be measured says why under ``failed``.

    Raises:
        FileExistsError: if the folder holds results already.
    """
    options = experiment.options
    device: torch.device = options.device
    effort = _ON_CPU if device.type == "cpu" else _QUICK if options.quick else _FULL
    if options.rounds is not None:
        effort = replace(effort, rounds=options.rounds)
    deadline = Deadline(options.budget)
    modes = options.modes or (("eager", "graph") if device.type == "cuda" else ("eager",))
    lab = Lab(device, effort, deadline, modes, options.cold)
    settings = {key: str(value) for key, value in vars(options).items() if value is not None}
    columns = (*experiment.case.__dataclass_fields__, *experiment.columns, "failed")
    folder = options.output or _default_folder(experiment.name, device)
    cases = experiment.cases()
    done = 0
    with (
        Results(folder, columns, environment(device, settings | vars(effort))) as results,
        watched(device, folder / "gpu.csv"),
        _ended_by_sigterm(),
    ):
        try:
            for case in _with_progress(cases):
                if deadline.passed:
                    log.info("the budget of %s s is used up", options.budget)
                    break
                results.add(_measured(experiment, case, lab))
                done += 1
        finally:  # Ctrl-C, or SIGTERM at the end of a lease, leaves what was measured
            _write(experiment, results, done, len(cases))
    return folder, results.rows


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, by an exception."""
    if threading.current_thread() is not threading.main_thread():  # only that one may say so
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measured(experiment: Experiment, case: Case, lab: Lab) -> Iterator[Row]:
    begin = time.monotonic()
    try:
        for row in experiment.measure(case, lab):
            yield asdict(case) | row
    except Exception as error:  # what no contender is to blame for ends the case, not the table
        log.exception("%s failed", case)
        yield asdict(case) | {"failed": reason(error)}
    lab.clock.free()
    log.info("%s took %.1f s", case, time.monotonic() - begin)


def _with_progress(cases: Sequence[Case]) -> Iterator[Case]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    shown = text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*shown, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            yield case
            progress.advance(task)


def _write(experiment: Experiment, results: Results, done: int, total: int) -> None:
    good = [row for row in results.rows if not row.get("failed")]
    text = f"# slope bench {experiment.name}\n\n{experiment.about}\n\n{experiment.table(good)}"
    text += failures(results.rows, experiment.kinds)
    if done < total:
        text += f"\nStopped after {done} of {total} cases: the rest is not measured.\n"
    results.write_table(text)

    if experiment.on_gpu:  # which path backend="auto" took for which product, and why
        from slope.backends.ops import tuner

        known = tuner().known().items()
        told = {str(key): f"{choice.path}: {choice.reason()}" for key, choice in known}
        text = json.dumps(told, indent=2, ensure_ascii=False)
        (results.folder / "choices.json").write_text(text + "\n", encoding="utf-8")

    def draw(figure: Figure) -> None:
        draw_panels(figure, map(experiment.point, good), experiment.ylabel)

    results.write_figure(f"slope bench {experiment.name}: {experiment.about}", draw)


def _default_folder(name: str, device: torch.device) -> Path:
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    return Path("logs") / "bench" / f"{now}_{device.type}_{name}"
