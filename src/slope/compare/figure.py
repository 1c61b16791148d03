"""The picture of a comparison: validation curves in panels, and the final losses in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope.compare.plan import Comparison
from slope.compare.results import MethodResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "comparison.png"

# Okabe-Ito and Tol colours, told apart by colour-blind readers; markers tell them apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#661100")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BASELINE, _REFERENCE = "#000000", "#777777"
_OTHERS = "other methods"
_PER_PANEL = len(_COLOURS)
_COLUMNS = 4
_MANY = 6


def draw(comparison: Comparison, results: Sequence[MethodResult]) -> Path:
    """Draw all curves and final losses.

    Args:
        comparison: for its name, baseline and reference.
        results: what its runs have left so far.

    Returns:
        The path of ``comparison.png``; ``comparison.svg`` lies beside it.
    """
    from matplotlib.figure import Figure

    panels = _panels(comparison, results)
    common = [r for r in results if r.method.label in (comparison.baseline, comparison.reference)]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    shown = [r for r in results if r.val_loss is not None or r.having("diverged")]
    height = max(3.1 * rows, 0.24 * len(shown)) + 1.2
    figure = Figure(figsize=(3.6 * columns + 5.5, height), layout="constrained")
    figure.suptitle(f"{comparison.name}: {_what(comparison)}", fontsize=12)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(3.6 * columns, 5.5))[0]
    axes = left.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, members) in zip(axes.flat, panels, strict=False):
        _draw_curves(axis, title, comparison, [*common, *members])
    for axis in axes[:, 0]:
        axis.set_ylabel("nats per token")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer steps")
    axes[0, 0].set_ylim(_limits(common or results))
    _draw_losses(right.subplots(), comparison, shown)
    path = comparison.directory / PICTURE
    figure.savefig(path, dpi=110)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path


def _what(comparison: Comparison) -> str:
    cfg = comparison.runs[0].cfg
    steps, batch = int(cfg.trainer.max_steps), int(cfg.train.global_batch_size)
    tokens = steps * batch * int(cfg.datamodule.max_length)
    return (
        f"validation loss, mean and range over seeds {', '.join(map(str, comparison.seeds))}; "
        f"{tokens:,} tokens"
    )


def _panels(
    comparison: Comparison, results: Sequence[MethodResult]
) -> list[tuple[str, list[MethodResult]]]:
    """Titles and methods; baseline and reference are in all of them and make none."""
    named: dict[str, list[MethodResult]] = {}
    for result in results:
        if result.method.label not in (comparison.baseline, comparison.reference):
            named.setdefault(result.method.panel or _OTHERS, []).append(result)
    panels = []
    for title, members in named.items():
        for start in range(0, len(members), _PER_PANEL):
            panels.append((title, members[start : start + _PER_PANEL]))
    return panels or [("", [])]


def _draw_curves(
    axis: Axes, title: str, comparison: Comparison, results: Sequence[MethodResult]
) -> None:
    axis.set_title(title, fontsize=10)
    own = 0
    for result in results:
        label = result.method.label
        style: dict[str, Any] = {"color": _BASELINE, "linestyle": "-", "linewidth": 1.4}
        if label == comparison.reference:
            style |= {"color": _REFERENCE, "linestyle": "--"}
        elif label != comparison.baseline:
            style |= {"color": _COLOURS[own], "marker": _MARKERS[own], "markersize": 4, "zorder": 3}
            own += 1
        steps, means, lows, highs = _band(result)
        if len(steps) == 1:  # a line of one point is none
            style.setdefault("marker", "D")
        if steps:
            axis.plot(steps, means, label=label, **style)
            axis.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        elif result.having("diverged"):
            axis.plot([], [], label=f"{label} (diverged)", **style)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def _band(result: MethodResult) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, mean, least and largest loss over the finished runs."""
    curves = [dict(run.curve) for run in result.having("finished")]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    losses = [[curve[step] for curve in curves] for step in steps]
    means = [math.fsum(values) / len(values) for values in losses]
    return steps, means, [min(values) for values in losses], [max(values) for values in losses]


def _limits(results: Sequence[MethodResult]) -> tuple[float | None, float | None]:
    """From where the curves are near each other; their steep beginning shows no difference."""
    tops = []
    for result in results:
        _, means, _, _ = _band(result)
        if len(means) > 2:
            tops.append(means[len(means) // 4])
    return None, max(tops, default=None)


def _draw_losses(axis: Axes, comparison: Comparison, results: Sequence[MethodResult]) -> None:
    """Best on top; what lies far beyond the others is written at the edge instead of drawn."""
    ranked = sorted(results, key=_mean)
    axis.set_title("final validation loss: mean ± std, dots are seeds", fontsize=10)
    axis.set_yticks(range(len(ranked)), [r.method.label for r in ranked], fontsize=8)
    axis.set_ylim(max(1, len(ranked)) - 0.5, -0.5)
    axis.set_xlabel("nats per token")
    axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    edge = _edge([_mean(result) for result in ranked if result.val_loss is not None])
    for place, result in enumerate(ranked):
        known = result.method.label in (comparison.baseline, comparison.reference)
        if result.val_loss is not None and result.val_loss.mean <= edge:
            _draw_loss(axis, place, result, _BASELINE if known else _COLOURS[0])
            if known:
                line = "-" if result.method.label == comparison.baseline else "--"
                mean = result.val_loss.mean
                axis.axvline(mean, color=_REFERENCE, linestyle=line, linewidth=0.8, zorder=1)
        note = _note(result, edge)
        if note:
            at = axis.get_yaxis_transform()
            axis.text(
                0.99, place, note, transform=at, ha="right", va="center", fontsize=8, zorder=4
            )


def _draw_loss(axis: Axes, place: int, result: MethodResult, colour: str) -> None:
    assert result.val_loss is not None
    seeds = [run.val_loss for run in result.having("finished") if run.val_loss is not None]
    axis.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.35, markersize=3)
    axis.errorbar(
        result.val_loss.mean,
        place,
        xerr=result.val_loss.deviation,
        fmt="D" if colour == _BASELINE else "o",
        color=colour,
        markersize=5,
        capsize=2.5,
        linewidth=1.2,
    )


def _mean(result: MethodResult) -> float:
    return math.inf if result.val_loss is None else result.val_loss.mean


def _edge(means: Sequence[float]) -> float:
    """The largest mean drawn: among many, 3 x as far from the best as the upper quartile."""
    ranked = sorted(means)
    if len(ranked) < _MANY:
        return math.inf
    return ranked[0] + 3 * (ranked[3 * (len(ranked) - 1) // 4] - ranked[0])


def _note(result: MethodResult, edge: float) -> str:
    diverged = result.having("diverged")
    parts = []
    if result.val_loss is not None and result.val_loss.mean > edge:
        parts.append(f"{result.val_loss.mean:.2f} →")
    if diverged:
        parts.append(f"{len(diverged)} of {len(result.runs)} diverged")
    return ", ".join(parts)
