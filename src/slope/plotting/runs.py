"""What runs leave behind, read for their pictures, and the horizontal axis that they share."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Points = tuple[list[float], list[float]]
Rows = list[dict[str, str]]

TOTAL = "total"
"""The layer of ``diagnostics.csv`` that stands for all."""


class _Unit(NamedTuple):
    """A unit of the horizontal axis, for runs that reach at least ``least`` of what it counts."""

    label: str
    size: float
    least: float = 0


# What can be put on the horizontal axis: its column, and units from the largest.
AGAINST: dict[str, tuple[str, tuple[_Unit, ...]]] = {
    "steps": (
        "step",
        (_Unit("optimizer steps (thousands)", 1e3, 1e5), _Unit("optimizer steps", 1)),
    ),
    "tokens": (
        "tokens",
        (
            _Unit("tokens (billions)", 1e9, 1e9),
            _Unit("tokens (millions)", 1e6, 1e6),
            _Unit("tokens (thousands)", 1e3, 1e5),
            _Unit("tokens", 1),
        ),
    ),
    "time": (
        "seconds",
        (
            _Unit("wall-clock time (hours)", 3600, 3600),
            _Unit("wall-clock time (minutes)", 60, 60),
            _Unit("wall-clock time (seconds)", 1),
        ),
    ),
}


@dataclass(frozen=True)
class Run:
    """The tables of one run.

    ``label`` tells it from the others of a picture; ``layers`` holds the rows of
    ``diagnostics.csv`` by layer; ``summary`` is empty while the run goes on, a resumed one too.
    """

    folder: Path
    label: str
    rows: Rows
    layers: dict[str, Rows]
    summary: dict[str, Any]

    def adapter_start(self) -> float | None:
        """The step at which the adapters woke: as summed up, else the first row that says so."""
        start = number(self.summary.get("adapters_started_at_step"))
        if start is not None:
            return start
        active = [row for row in self.rows if _truth(row.get("adapters_active"))]
        return number(active[0]["step"]) if active else None

    def evaluated(self) -> list[str]:
        """The other texts that it was evaluated on."""
        names = [n for n in self.rows[0] if n.startswith("eval/") and n.endswith("/loss")]
        return [name.removeprefix("eval/").removesuffix("/loss") for name in names]

    def title(self) -> str:
        """Its label, with the result once there is one."""
        loss, tokens = self.summary.get("val_loss"), self.summary.get("tokens")
        if loss is None:
            return self.label
        title = f"{self.label}  –  validation loss {loss:.3f}, perplexity {exp(loss):.1f}"
        if tokens:
            title += f", after {in_words(tokens) or f'{tokens:,}'} tokens"
        return title


class Horizontal:
    """Where the steps of runs lie on their common axis.

    Args:
        against: ``steps``, ``tokens`` or ``time``.
        runs: all that share the axis; the farthest chooses the unit.

    Raises:
        ValueError: if ``against`` is something else, or a run has not written its column.
    """

    def __init__(self, against: str, runs: Sequence[Run]) -> None:
        if against not in AGAINST:
            raise ValueError(f"against={against!r} is unknown; choose from {', '.join(AGAINST)}.")
        self._name, units = AGAINST[against]
        self._known = {run.folder: column(run.rows, self._name) for run in runs}
        for folder, (steps, _) in self._known.items():
            if not steps:
                raise ValueError(
                    f"the metrics of '{folder}' have no column {self._name}; draw it against steps."
                )
        farthest = max(places[-1] for _, places in self._known.values())
        unit = next(unit for unit in units if farthest >= unit.least)
        self.label, self._unit = unit.label, unit.size
        self.whole = unit.size == 1 and self._name != "seconds"
        """Whether the axis counts: a fraction on it means nothing."""

    def places(self, run: Run, steps: Sequence[float]) -> list[float]:
        """The steps of a run in units of the axis; between its rows, by interpolation."""
        import numpy as np

        known, places = self._known[run.folder]
        at = np.interp(steps, [0.0, *known], [0.0, *places])
        return [float(x) / self._unit for x in at]

    def start(self, run: Run) -> float | None:
        """Where the adapters of a run woke; in time, the last row that was written before."""
        step = run.adapter_start()
        if step is not None and self._name == "seconds":
            # The first step with adapters may take minutes: torch.compile compiles it anew.
            asleep = [row for row in run.rows if not _truth(row.get("adapters_active"))]
            before = [at for at in column(asleep, self._name)[0] if at <= step]
            step = before[-1] if before else 0.0
        return None if step is None else self.places(run, [step])[0]

    def points(self, run: Run, name: str, layer: str | None = None) -> Points:
        """A column of a run, or of one of its layers, against this axis."""
        steps, values = column(run.rows if layer is None else run.layers.get(layer, []), name)
        return self.places(run, steps), values


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the tables of runs, and label each by as little of its path as tells them apart.

    Args:
        folders: of runs, each with ``metrics.csv``.

    Raises:
        FileNotFoundError: if there is no ``metrics.csv``.
        ValueError: if it holds no measured step, a table is no text or lacks a column,
            ``summary.json`` is broken, or a run is named twice.
    """
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    whole = [path.resolve() for path in paths]
    for path in paths:
        if whole.count(path.resolve()) > 1:
            raise ValueError(f"run '{path}' is named twice; name each run once.")
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        labels = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read_run(folder: Path, label: str) -> Run:
    path = folder / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics at '{path}': give the folder of a run, logs/<name>, that has made a step."
        )
    rows = _read_table(path, "step", "train/loss")
    if not rows:
        raise ValueError(f"'{path}' holds no measured step yet; draw it when the run has made one.")
    layers: dict[str, Rows] = {}
    masks = folder / "diagnostics.csv"
    for row in _read_table(masks, "step", "layer") if masks.is_file() else []:
        layers.setdefault(row["layer"], []).append(row)
    summary = _read_summary(folder / "summary.json")
    steps = number(summary.get("steps"))
    if steps is not None and steps < max(float(row["step"]) for row in rows):
        summary = {}  # of the run as it was before it was resumed with more steps
    return Run(folder, label, rows, layers, summary)


def _read_table(path: Path, *needed: str) -> Rows:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = [name for name in needed if name not in (table.fieldnames or ())]
            rows = [] if missing else [r for r in table if number(r["step"]) is not None]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"'{path}' is no table in UTF-8 ({error}); restore it from a copy of the run, or "
            "convert it with iconv if a spreadsheet wrote it."
        ) from error
    if missing:
        raise ValueError(
            f"'{path}' is not the {path.stem} file of a run: it has no column "
            f"{' and no '.join(missing)}; give the folder of a run, or restore it from a copy."
        )
    return rows


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{path}' is not valid JSON ({error}); delete it to draw without it."
        ) from error
    return summary if isinstance(summary, dict) else {}


def column(rows: Rows, name: str) -> Points:
    """Steps and finite values of one column, in order of step; the last row of a step counts."""
    points: dict[float, float] = {}
    for row in rows:
        step, value = number(row["step"]), number(row.get(name))
        if step is not None and value is not None and math.isfinite(value):
            points[step] = value
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def number(text: Any) -> float | None:
    """What a cell holds, None where it holds no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def in_words(count: float) -> str:
    """Millions or billions; empty below a million.

    Example:
        >>> in_words(196_608_000_000)
        '196.6 billion'
    """
    unit, word = (1e9, "billion") if count >= 1e9 else (1e6, "million")
    return f"{count / unit:,.1f} {word}" if count >= unit else ""


def exp(loss: float) -> float:
    """Perplexity of a loss in nats, kept finite."""
    return math.exp(min(loss, 700.0))


def smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of about 1/30 of the run: no lag but at both ends.

    The ends cut off the half that lies beyond them, and no more: a window that shrank to one value
    would end the curve in that value's noise.
    """
    half = max(1, len(values) // 60)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _truth(text: Any) -> bool:
    return str(text).strip().lower() in {"1", "1.0", "true"}
