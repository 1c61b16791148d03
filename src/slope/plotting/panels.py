"""What the panels of all pictures have in common: colours, grid, the adapters' start, legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from slope.plotting.runs import Horizontal, Points, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Okabe-Ito and Tol colours, told apart by colour-blind readers; dashes and markers tell the lines
# apart in print.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#555555"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#661100")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_START = {"color": GREY, "linestyle": "--", "linewidth": 1}


@dataclass(frozen=True)
class Look:
    """How the lines of a run look.

    ``colour`` is that of all its lines; None for a run that is drawn alone, where each line has a
    colour and a label of its own.
    """

    colour: str | None = None
    marker: str = "o"

    @property
    def alone(self) -> bool:
        """Whether the run is the only one of the picture."""
        return self.colour is None

    def draw(self, axis: Axes, points: Points, colour: str, label: str, **style: Any) -> None:
        """Draw a line if it has points; ``colour`` and ``label`` are for a run alone."""
        if not points[0]:
            return
        if self.alone:
            axis.plot(*points, color=colour, label=label, **style)
            return
        # Few markers, and not at the same places for all runs.
        every = max(1, len(points[0]) // 8)
        first = _MARKERS.index(self.marker) * every // len(_MARKERS)
        marked = {"marker": self.marker, "markersize": 4, "markevery": (first, every)}
        axis.plot(*points, **{**marked, **style, "color": self.colour})


Shown = Sequence[tuple[Run, Look]]


def looks(runs: Sequence[Run]) -> Shown:
    """Each run with its look; an eighth run looks like the first."""
    if len(runs) == 1:
        return [(runs[0], Look())]
    different = zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)
    return [(run, Look(*look)) for run, look in zip(runs, different, strict=False)]


def finish(
    figure: Figure,
    axes: NDArray[Any],
    shown: Shown,
    horizontal: Horizontal,
    lines: Mapping[str, Mapping[str, Any]],
) -> None:
    """Grid, the adapters' start, axis labels, and for several runs a legend below the panels.

    Args:
        figure: of the panels.
        axes: all panels, (rows, columns).
        shown: all runs that are drawn.
        horizontal: their common axis.
        lines: what a style of line means, for the legend of several runs.
    """
    from matplotlib.lines import Line2D

    for axis in axes.flat:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="x", style="plain")
        if not axis.has_data():
            _say_not_measured(axis)
    for axis in axes[-1]:
        axis.set_xlabel(horizontal.label)
    starts = [(horizontal.start(run), look.colour or GREY) for run, look in shown]
    starts = [(at, colour) for at, colour in starts if at is not None]
    for at, colour in starts:
        for axis in axes.flat:
            axis.axvline(at, **{**_START, "color": colour})
    if starts:
        lines = {**lines, "adapters start": _START}
    if shown[0][1].alone:
        if starts:
            axes[0, 0].plot([], [], label="adapters start", **_START)
        for axis in axes.flat:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize=9)
        return
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=4, label=run.title())
        for run, look in shown
    ]
    for label, style in lines.items():
        handles.append(Line2D([], [], label=label, **{**style, "color": GREY}))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def name(axis: Axes, title: str, unit: str) -> None:
    """Title and unit of a panel."""
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(unit)


def _say_not_measured(axis: Axes) -> None:
    """Write into an empty panel why it is empty."""
    at = axis.transAxes
    axis.text(0.5, 0.5, "not measured", transform=at, ha="center", va="center", color=GREY)
    axis.set_yticks([])
