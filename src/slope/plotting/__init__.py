"""Curves of runs: loss, perplexity, learning rate, gradient norm, throughput, memory; their masks.

Reads what a run leaves behind (`metrics.csv`, `diagnostics.csv`, `summary.json`) and nothing else,
so that it works on a running, a finished and a copied run. Draws through matplotlib's object
interface: no global state, no display.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slope.disk import check_folder_of
from slope.plotting import curves, masks
from slope.plotting.runs import AGAINST, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AGAINST", "CURVES", "DIAGNOSTICS", "plot_run", "plot_runs"]

CURVES, DIAGNOSTICS = "curves.png", "diagnostics.png"
"""The pictures in a run's folder: its curves, and its masks."""


def plot_run(log_dir: str | Path, against: str = "steps") -> list[Path]:
    """Draw the curves of one run into its folder, and those of its masks if they were measured.

    Args:
        log_dir: folder with `metrics.csv`, `diagnostics.csv` where masks were measured and, once
            the run has ended, `summary.json`.
        against: what is on the horizontal axis: `steps`, `tokens` or `time`.

    Returns:
        The files: `curves.png`, `curves.svg`, and where masks were measured `diagnostics.png` and
        `diagnostics.svg`.

    Raises:
        FileNotFoundError: if there is no `metrics.csv`.
        ValueError: if it holds no measured step, or not what it is to be drawn against.
    """
    folder = Path(log_dir)
    return _draw([folder], folder / CURVES, folder / DIAGNOSTICS, against)


def plot_runs(
    log_dirs: Sequence[str | Path], output: str | Path, against: str = "steps", force: bool = False
) -> list[Path]:
    """Draw one or several runs over each other.

    Args:
        log_dirs: folders of runs, each once.
        output: a file name that ends in `.png` or `.svg`; both are written.
        against: what is on the horizontal axis: `steps`, `tokens` or `time`.
        force: replace pictures that exist.

    Returns:
        The files: `<name>.png` and `<name>.svg`, and where masks were measured `<name>-masks.png`
        and `<name>-masks.svg`.

    Raises:
        FileExistsError: if one of them exists and `force` is not given.
        FileNotFoundError: if a run has no `metrics.csv`, or the folder of `output` is missing.
        ValueError: for another ending, a run that is named twice or has no measured step, or a
            value of `against` that is unknown or was not measured.
    """
    path = Path(output)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"pictures are PNG and SVG; '{path}' must end in .png or .svg.")
    path = path.with_suffix(".png")
    second = path.with_stem(f"{path.stem}-masks")
    for file in (*_both(path), *_both(second)):
        if file.exists() and not force:
            raise FileExistsError(f"'{file}' exists; give --force to replace it, or another name.")
    check_folder_of(Path(output))
    return _draw(log_dirs, path, second, against)


def _draw(log_dirs: Sequence[str | Path], path: Path, masks_path: Path, against: str) -> list[Path]:
    runs = read_runs(log_dirs)
    figures = {path: curves.draw(runs, against), masks_path: masks.draw(runs, against)}
    return [
        file
        for path, figure in figures.items()
        if figure is not None
        for file in _save(figure, path)
    ]


def _both(path: Path) -> tuple[Path, Path]:
    return path, path.with_suffix(".svg")


def _save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write both pictures, each whole or not at all."""
    for file in _both(path):
        partial = file.with_name(f"{file.name}.partial")
        kind = file.suffix.removeprefix(".")
        figure.savefig(
            partial, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None
        )
        os.replace(partial, file)
    return _both(path)
