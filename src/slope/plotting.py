"""Curves of a run: loss, perplexity, learning rate, gradient norm, throughput, memory; its masks.

Reads what a run leaves behind (`metrics.csv`, `diagnostics.csv`, `summary.json`) and nothing else,
so that it works on a running, a finished and a copied run. Draws through matplotlib's object
interface: no global state, no display.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# The Okabe-Ito colours, told apart by colour-blind readers; dashes tell them apart in print.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#555555"

Points = tuple[list[float], list[float]]

DIAGNOSTICS = "diagnostics.png"
"""The second picture of a run: its masks."""
_TOTAL = "total"


def plot_run(log_dir: str | Path) -> Path:
    """Draw the curves of one run, and those of its masks if they were measured.

    Args:
        log_dir: folder with `metrics.csv`, `diagnostics.csv` where masks were measured and, once
            the run has ended, `summary.json`.

    Returns:
        The path of `curves.png`; `curves.svg` lies beside it, and so do `diagnostics.png` and
        `diagnostics.svg`.

    Raises:
        FileNotFoundError: if there is no `metrics.csv`.
        ValueError: if it holds no measured step.
    """
    from matplotlib.figure import Figure

    log_dir = Path(log_dir)
    rows = _read_metrics(log_dir / "metrics.csv")
    summary = _read_summary(log_dir / "summary.json")
    start = _adapter_start(rows, summary)

    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(_title(log_dir, summary), fontsize=12)
    axes = figure.subplots(2, 3, sharex=True)

    _draw_loss(axes[0, 0], rows, summary)
    _draw_perplexity(axes[0, 1], rows, summary)
    _draw_lr(axes[0, 2], rows)
    _draw_one(
        axes[1, 0], _column(rows, "grad_norm"), "gradient norm", "norm before clipping", _PURPLE
    )
    _draw_one(
        axes[1, 1], _column(rows, "tokens_per_second"), "throughput", "tokens per second", _GREEN
    )
    _draw_memory(axes[1, 2], _column(rows, "peak_memory_bytes"))

    _finish(axes, start)
    for axis in axes[0]:
        axis.legend(frameon=False, fontsize=9)
    path = log_dir / "curves.png"
    _save(figure, path)
    if (log_dir / "diagnostics.csv").is_file():
        _plot_masks(log_dir, summary, start)
    return path


def _finish(axes: NDArray[Any], start: float | None) -> None:
    """What all panels of a figure have in common; ``axes`` (rows, columns)."""
    for axis in axes.flat:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="x", style="plain")
        if start is not None:
            axis.axvline(start, color=_GREY, linestyle="--", linewidth=1)
    if start is not None:
        axes[0, 0].plot([], [], color=_GREY, linestyle="--", linewidth=1, label="adapters start")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer steps")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _draw_loss(axis: Axes, rows: list[dict[str, str]], summary: dict[str, Any]) -> None:
    train, val = _column(rows, "train/loss"), _column(rows, "val/loss")
    axis.set_title("loss", fontsize=11)
    axis.set_ylabel("nats per token")
    if len(train[0]) > 20:
        axis.plot(*train, color=_BLUE, alpha=0.25, linewidth=0.8)
        axis.plot(train[0], _smooth(train[1]), color=_BLUE, label="training (smoothed)")
    else:
        axis.plot(*train, color=_BLUE, label="training")
    axis.plot(*val, color=_ORANGE, marker="o", markersize=3.5, label="validation")
    bigram = summary.get("bigram_val_loss")
    if bigram is not None:
        axis.axhline(
            bigram,
            color=_GREEN,
            linestyle=":",
            linewidth=1.5,
            label=f"bigram, validation ({bigram:.2f})",
        )


def _draw_perplexity(axis: Axes, rows: list[dict[str, str]], summary: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    train, val = _column(rows, "train/loss"), _column(rows, "val/loss")
    axis.set_title("perplexity", fontsize=11)
    axis.set_ylabel("perplexity (log scale)")
    axis.set_yscale("log")
    smooth = _smooth(train[1]) if len(train[0]) > 20 else train[1]
    axis.plot(train[0], [_exp(y) for y in smooth], color=_BLUE, label="training")
    axis.plot(
        val[0],
        [_exp(y) for y in val[1]],
        color=_ORANGE,
        marker="o",
        markersize=3.5,
        label="validation",
    )
    bigram = summary.get("bigram_val_loss")
    if bigram is not None:
        level = _exp(bigram)
        axis.axhline(
            level, color=_GREEN, linestyle=":", linewidth=1.5, label=f"bigram ({level:.0f})"
        )
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_lr(axis: Axes, rows: list[dict[str, str]]) -> None:
    axis.set_title("learning rate", fontsize=11)
    axis.set_ylabel("learning rate")
    axis.plot(*_column(rows, "lr"), color=_BLUE, label="weights")
    lora = _column(rows, "lora_lr")
    if any(lora[1]):
        axis.plot(*lora, color=_ORANGE, linestyle="-.", label="adapters")
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_memory(axis: Axes, points: Points) -> None:
    largest = max(points[1], default=0.0)
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    scaled = (points[0], [y / unit for y in points[1]])
    _draw_one(axis, scaled, "peak memory", name, _ORANGE)


def _draw_one(axis: Axes, points: Points, title: str, unit: str, colour: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axis.set_title(title, fontsize=11)
    axis.set_ylabel(unit)
    if points[0]:
        axis.plot(*points, color=colour, linewidth=1.2)
        axis.set_ylim(0, 1.1 * max(points[1]) or 1.0)
        if max(points[1]) >= 1000:
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    else:
        _say_not_measured(axis)


# -- the masks -------------------------------------------------------------------------------------


def _plot_masks(log_dir: Path, summary: dict[str, Any], start: float | None) -> None:
    from matplotlib.figure import Figure

    layers: dict[str, list[dict[str, str]]] = {}
    for row in _read_table(log_dir / "diagnostics.csv"):
        layers.setdefault(row["layer"], []).append(row)
    if _TOTAL not in layers:
        return  # begun, and nothing measured yet

    figure = Figure(figsize=(11, 7), layout="constrained")
    title = f"{_title(log_dir, summary)}\nmasks: bold the mean over all weights, thin each layer"
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, 2, sharex=True)
    forward, backward = "forward", "input gradient"

    _draw_layers(axes[0, 0], layers, (("density", forward), ("density_backward", backward)))
    _name(axes[0, 0], "density", "kept weights", percent=True)
    _draw_lemma(axes[0, 0], layers[_TOTAL])
    _draw_layers(axes[0, 1], layers, (("flip_rate", forward), ("column_flip_rate", backward)))
    _name(
        axes[0, 1], "flips over one optimizer step", "changed entries, of all weights", percent=True
    )
    _draw_layers(
        axes[1, 0],
        layers,
        (
            ("kept_energy", "forward, of the dense weight"),
            ("kept_energy_backward", "input gradient, of the forward's"),
        ),
    )
    _name(axes[1, 0], "kept energy", "squared weight that is kept", percent=True)
    _draw_layers(axes[1, 1], layers, (("adapter_norm", "adapter"),))
    _name(axes[1, 1], "adapter", "norm relative to the weight's", percent=False)
    for axis in (axes[0, 1], axes[1, 1]):
        axis.set_ylim(bottom=0)
    for axis in (axes[0, 0], axes[1, 0]):
        low, high = axis.get_ylim()
        # Rounding of a layer's size is no news, and nothing is above 100 %.
        spare = max(0.0, 0.05 - (high - low)) / 2
        axis.set_ylim(low - spare, min(high + spare, 1.01))

    _finish(axes, start)
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9)
    _save(figure, log_dir / DIAGNOSTICS)


def _draw_layers(
    axis: Axes, layers: dict[str, list[dict[str, str]]], columns: tuple[tuple[str, str], ...]
) -> None:
    """Each layer thin and the total bold, for one or two columns with their labels."""
    drawn = False
    for (column, label), colour, dashes in zip(
        columns, (_BLUE, _ORANGE), ("-", "-."), strict=False
    ):
        for layer, rows in layers.items():
            points = _column(rows, column)
            if not points[0] or layer == _TOTAL:
                continue
            axis.plot(*points, color=colour, linewidth=0.7, alpha=0.35)
        points = _column(layers[_TOTAL], column)
        if points[0]:
            drawn = True
            marker = "o" if len(points[0]) <= 20 else None
            style: dict[str, Any] = {
                "linewidth": 2.2,
                "linestyle": dashes,
                "marker": marker,
                "markersize": 3.5,
            }
            axis.plot(*points, color=colour, label=label, **style)
    if not drawn:
        _say_not_measured(axis)


def _draw_lemma(axis: Axes, rows: list[dict[str, str]]) -> None:
    """The input gradient's density that Lemma 2.1 expects of a random mask."""
    steps, density = _column(rows, "density")
    lemma = dict(zip(*_column(rows, "lemma"), strict=True))
    expected = [(x, y - lemma[x]) for x, y in zip(steps, density, strict=True) if x in lemma]
    # Where the input gradient is exact, the lemma has nothing to say.
    if any(lemma.values()) and expected:
        axis.plot(
            *zip(*expected, strict=True),
            color="black",
            linestyle=":",
            linewidth=1.6,
            label=f"input gradient by Lemma 2.1 ({100 * expected[-1][1]:.2f} %)",
        )


def _name(axis: Axes, title: str, unit: str, percent: bool) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_title(title, fontsize=11)
    axis.set_ylabel(f"{unit} (%)" if percent else unit)
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _say_not_measured(axis: Axes) -> None:
    at = axis.transAxes
    axis.text(0.5, 0.5, "not measured", transform=at, ha="center", va="center", color=_GREY)
    axis.set_yticks([])


# -- reading ---------------------------------------------------------------------------------------


def _read_metrics(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics at '{path}': give the folder of a run, logs/<name>, that has made a step."
        )
    rows = _read_table(path)
    if not rows:
        raise ValueError(f"'{path}' holds no measured step yet; draw it when the run has made one.")
    return rows


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if _number(row.get("step")) is not None]


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


def _title(log_dir: Path, summary: dict[str, Any]) -> str:
    title = log_dir.resolve().name
    if summary.get("val_loss") is not None:
        title += f"  –  validation loss {summary['val_loss']:.3f}"
        title += f", perplexity {_exp(summary['val_loss']):.1f}"
        if summary.get("tokens"):
            tokens = summary["tokens"]
            count = f"{tokens / 1e6:,.1f} million" if tokens >= 1e6 else f"{tokens:,}"
            title += f", after {count} tokens"
    return title


def _adapter_start(rows: list[dict[str, str]], summary: dict[str, Any]) -> float | None:
    """The step at which the adapters woke: as summed up, else the first row that says so."""
    start = _number(summary.get("adapters_started_at_step"))
    if start is not None:
        return start
    active = [row for row in rows if _truth(row.get("adapters_active"))]
    return _number(active[0]["step"]) if active else None


def _column(rows: list[dict[str, str]], name: str) -> Points:
    """Steps and finite values of one column, in order of step; the last row of a step counts."""
    points: dict[float, float] = {}
    for row in rows:
        step, value = _number(row["step"]), _number(row.get(name))
        if step is not None and value is not None and math.isfinite(value):
            points[step] = value
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _truth(text: Any) -> bool:
    return str(text).strip().lower() in {"1", "1.0", "true"}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of about 1/30 of the run: no lag, shorter at both ends."""
    half = max(1, len(values) // 60)
    smoothed = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
