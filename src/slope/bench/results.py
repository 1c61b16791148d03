"""The folder of one measurement: ``results.csv``, ``table.md``, ``figure.png``, ``env.json``, log.

Rows are written as they are measured, so that a lease that ends early leaves all that was measured.
A folder that holds anything is never written to.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

Row = dict[str, Any]
log = logging.getLogger("slope.bench")
# Okabe-Ito, told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#555555")


class Results:
    """Writer of one results folder; a context manager that closes its files.

    Args:
        folder: made here.
        columns: of the CSV, in order.
        environment: what ``env.json`` holds.

    Raises:
        FileExistsError: if the folder holds anything.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], environment: Mapping[str, Any]
    ) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} holds results already and results are never overwritten; choose another "
                f"folder, for example --output {folder}-2, or move it away."
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(environment), indent=2, default=str)
        (folder / "env.json").write_text(text + "\n", encoding="utf-8")
        self.folder = folder
        self.rows: list[Row] = []
        self._columns = tuple(columns)
        self._file = (folder / "results.csv").open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self._columns)
        self._writer.writeheader()
        self._handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        log.removeHandler(self._handler)
        self._handler.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Write each row to the CSV and the log at once; columns without a value stay empty."""
        for row in rows:
            self.rows.append(row)
            exact = {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()}
            self._writer.writerow({key: exact.get(key) for key in self._columns})
            self._file.flush()
            log.info("%s", " ".join(f"{k}={v}" for k, v in exact.items() if v is not None))

    def write_table(self, text: str) -> None:
        """Write ``table.md``."""
        (self.folder / "table.md").write_text(text, encoding="utf-8")

    def write_figure(self, title: str, draw: Callable[[Figure], None]) -> None:
        """Write ``figure.png``, unless nothing was drawn."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 7), layout="constrained")
        figure.suptitle(title, fontsize=11)
        draw(figure)
        if figure.axes:
            figure.savefig(self.folder / "figure.png", dpi=130)


def number(value: Any, digits: int = 2) -> str:
    """A number for a reader, a dash for none.

    Example:
        >>> number(1.2345), number(None)
        ('1.23', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(["a", "b"], [["1", "x | y"]]), end="")
        | a | b |
        |---|---|
        | 1 | x / y |
    """
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    # a bar would end the cell
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def pivot(
    rows: Iterable[Row],
    index: Sequence[str],
    across: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:
    """A Markdown table with a line per different ``index`` and a column per different ``across``.

    Args:
        rows: what was measured.
        index: columns that stand on the left.
        across: the column of a row.
        cell: what stands there.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    names: dict[str, None] = {}
    for row in rows:
        names[across(row)] = None
        found.setdefault(tuple(str(row[key]) for key in index), {})[across(row)] = cell(row)
    body = [[*key, *(cells.get(name, "–") for name in names)] for key, cells in found.items()]
    return markdown([*index, *names], body)


def failures(rows: Iterable[Row], keys: Sequence[str]) -> str:
    """What could not be measured and why, as Markdown; empty if nothing.

    Args:
        rows: all.
        keys: columns that tell one kind of failure from another.
    """
    kinds: dict[tuple[str, ...], int] = {}
    for row in rows:
        if row.get("failed"):
            kind = *(str(row.get(key) or "") for key in keys), str(row["failed"])
            kinds[kind] = kinds.get(kind, 0) + 1
    cells = [[*kind[:-1], str(count), kind[-1]] for kind, count in kinds.items()]
    return "\nNot measured:\n\n" + markdown([*keys, "rows", "reason"], cells) if kinds else ""


def draw_panels(
    figure: Figure,
    points: Iterable[tuple[str, str, Any, float | None]],
    ylabel: str,
    level: float | None = 1.0,
) -> None:
    """One panel per first element, one line per second.

    Args:
        figure: empty.
        points: (panel, line, x, y); those without y are left out.
        ylabel: of all.
        level: drawn as a dotted line.
    """
    panels: dict[str, dict[str, list[tuple[Any, float]]]] = {}
    for panel, line, x, y in points:
        if y is not None:
            panels.setdefault(panel, {}).setdefault(line, []).append((x, y))
    if not panels:
        return
    rows = 1 if len(panels) < 4 else 2
    axes = figure.subplots(rows, -(-len(panels) // rows), squeeze=False).flat
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn: dict[str, Artist] = {}
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, curve in lines.items():
            index = names.index(name)
            style = "-" if index < len(_COLOURS) else "--"
            colour = _COLOURS[index % len(_COLOURS)]
            xs, ys = zip(*curve, strict=True)
            (drawn[name],) = axis.plot(xs, ys, style, marker="o", ms=4, color=colour)
        if level is not None:
            axis.axhline(level, color="#999999", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(ylabel, fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
        for label in axis.get_xticklabels():
            label.set(rotation=40, horizontalalignment="right", rotation_mode="anchor")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes):
        axis.set_visible(False)
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=6, frameon=False,
        fontsize=8,
    )  # fmt: skip
