"""The masks of runs: density, flips, kept energy, and the adapters' norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slope.plotting import panels
from slope.plotting.panels import BLUE, DOT, HOLLOW, ORANGE, Look
from slope.plotting.runs import TOTAL, Horizontal, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORWARD, _BACKWARD = "forward", "input gradient"
_STYLES: tuple[dict[str, Any], ...] = ({"linestyle": "-"}, {"linestyle": "-.", **HOLLOW})
_FEW = 20  # measurements; so many get a marker each
# Title, unit, percent, columns with their labels.
_PANELS = (
    ("density", "kept weights", True, {"density": _FORWARD, "density_backward": _BACKWARD}),
    (
        "flips over one optimizer step",
        "changed entries, of all weights",
        True,
        {"flip_rate": _FORWARD, "column_flip_rate": _BACKWARD},
    ),
    (
        "kept energy",
        "squared weight that is kept",
        True,
        {
            "kept_energy": "forward, of the dense weight",
            "kept_energy_backward": "input gradient, of the forward's",
        },
    ),
    ("adapter", "norm relative to the weight's", False, {"adapter_norm": "adapter"}),
)


def draw(runs: Sequence[Run], against: str = "steps") -> Figure | None:
    """Draw the masks of one or several runs; None if no run has measured any.

    Args:
        runs: at least one; each of several has a colour of its own, and its layers are not shown.
        against: ``steps``, ``tokens`` or ``time``.

    Raises:
        ValueError: if ``against`` is unknown, or a run has not written what it needs.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    shown = [(run, look) for run, look in panels.looks(runs) if TOTAL in run.layers]
    if not shown:
        return None
    horizontal = Horizontal(against, runs)
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels.title(
        figure,
        f"{runs[0].title()}\nmasks: bold the mean over all weights, thin each layer"
        if len(runs) == 1
        else "masks: mean over all weights",
    )
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (title, unit, percent, columns) in zip(axes.flat, _PANELS, strict=True):
        for run, look in shown:
            _draw_layers(axis, run, look, horizontal, columns)
        panels.name(axis, title, f"{unit} (%)" if percent else unit)
        if percent:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if len(runs) == 1:
        _draw_lemma(axes[0, 0], runs[0], horizontal)
    for axis in (axes[0, 1], axes[1, 1]):
        axis.set_ylim(bottom=0)
    for axis in (axes[0, 0], axes[1, 0]):
        low, high = axis.get_ylim()
        # Rounding of a layer's size is no news, and nothing is above 100 %.
        spare = max(0.0, 0.05 - (high - low)) / 2
        axis.set_ylim(low - spare, min(high + spare, 1.01))
    lines = {name: {**DOT, **s} for name, s in zip((_FORWARD, _BACKWARD), _STYLES, strict=True)}
    panels.finish(figure, axes, shown, horizontal, lines)
    # Around a single measurement there would be fractions of a step.
    axes[0, 0].set_xlim(0, 1.02 * axes[0, 0].get_xlim()[1])
    return figure


def _draw_layers(
    axis: Axes, run: Run, look: Look, horizontal: Horizontal, columns: dict[str, str]
) -> None:
    """The total, and each layer thin where a run is drawn alone."""
    for (column, label), colour, of_column in zip(
        columns.items(), (BLUE, ORANGE), _STYLES, strict=False
    ):
        for layer in run.layers if look.alone else ():
            points = horizontal.points(run, column, layer)
            if points[0] and layer != TOTAL:
                thin = {**panels.dot(points), "linewidth": 0.7, "alpha": 0.35}
                axis.plot(*points, color=colour, **thin)
        points = horizontal.points(run, column, TOTAL)
        style = {**of_column, "linewidth": 1.5, "clip_on": False}  # a dot at 0 is whole
        if look.alone:
            marker = "o" if len(points[0]) <= _FEW else None
            style |= {"linewidth": 2.2, "marker": marker, "markersize": 3.5}
        look.draw(axis, points, colour, label, **style)


def _draw_lemma(axis: Axes, run: Run, horizontal: Horizontal) -> None:
    """The input gradient's density that Lemma 2.1 expects of a random mask."""
    x, density = horizontal.points(run, "density", TOTAL)
    lemma = dict(zip(*horizontal.points(run, "lemma", TOTAL), strict=True))
    expected = [(at, y - lemma[at]) for at, y in zip(x, density, strict=True) if at in lemma]
    # Where the input gradient is exact, the lemma has nothing to say.
    if any(lemma.values()) and expected:
        axis.plot(
            *zip(*expected, strict=True),
            color="black",
            linestyle=":",
            linewidth=1.6,
            marker="x" if len(expected) == 1 else None,
            label=f"input gradient by Lemma 2.1 ({100 * expected[-1][1]:.2f} %)",
        )
