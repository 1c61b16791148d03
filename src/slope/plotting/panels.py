"""What the panels of all pictures have in common: colours, grid, the adapters' start, legends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from slope.plotting.runs import Horizontal, Points, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

# Okabe-Ito and Tol colours, told apart by colour-blind readers; dashes and markers tell the lines
# apart in print. 7 colours and 8 markers have no common factor: 56 runs look different.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#555555"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#661100")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HOLLOW: dict[str, Any] = {"markerfacecolor": "white"}
DOT: dict[str, Any] = {"marker": "o", "markersize": 4}  # stands in a legend for any marker
_START = {"color": GREY, "linestyle": "--", "linewidth": 1}
_SMALL = 9  # points, the letters of legends
_SAMPLE = 5 * _SMALL  # points, what a legend puts beside a label: the line and the gaps
_LINE = 1.7 * _SMALL / 72  # inches, of a legend
_TICKS = 6  # steps of the horizontal axis, so that their numbers do not touch


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
            axis.plot(*points, color=colour, label=label, **{**dot(points), **style})
            return
        # Few markers, and not at the same places for all runs.
        every = max(1, len(points[0]) // 8)
        first = _MARKERS.index(self.marker) * every // len(_MARKERS)
        marked = {"marker": self.marker, "markersize": 4, "markevery": (first, every)}
        axis.plot(*points, **{**marked, **style, "color": self.colour})


Shown = Sequence[tuple[Run, Look]]


def looks(runs: Sequence[Run]) -> Shown:
    """Each run with its look: of up to 56 runs, each differs in colour or marker."""
    if len(runs) == 1:
        return [(runs[0], Look())]
    different = zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)
    return [(run, Look(*look)) for run, look in zip(runs, different, strict=False)]


def dot(points: Points) -> Mapping[str, Any]:
    """The marker without which a line of one point is not seen; none for others."""
    return DOT if len(points[0]) == 1 else {}


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
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for axis in axes.flat:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(
            # With at least one tick: for two, a run of one step would get fractions after all.
            MaxNLocator(_TICKS, steps=[1, 2, 2.5, 5, 10], integer=horizontal.whole, min_n_ticks=1)
        )
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
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
    _add_legend(figure, handles)


def _add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below the panels, in two columns where all labels fit; the figure grows by its height."""
    room = 72 * figure.get_figwidth()
    widest = max(_width(str(handle.get_label()), _SMALL) for handle in handles)
    columns = 2 if widest <= room / 2 - _SAMPLE else 1
    labels = [fit(str(handle.get_label()), room / columns - _SAMPLE, _SMALL) for handle in handles]
    lines = math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + lines * _LINE)
    figure.legend(
        handles=handles,
        labels=labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=_SMALL,
    )


def title(figure: Figure, text: str) -> None:
    """Title of a figure, broken into lines that are no wider than it."""
    lines = [fit(line, 72 * figure.get_figwidth(), 12) for line in text.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=12)


def fit(text: str, points: float, size: float) -> str:
    """A text of ``size`` points, broken into lines that are no wider than ``points``."""
    width = _width(text, size)
    if width <= points:
        return text
    # Letters differ in width: a tenth is spare.
    return textwrap.fill(text, max(1, int(0.9 * len(text) * points / width)))


def _width(text: str, size: float) -> float:
    """Points that a text is wide in the font of all pictures, rounding to pixels included."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(size, dpi=720)
    font.set_text(text)
    return 1.03 * float(font.get_width_height()[0]) / 640  # it counts in 64ths of a dot


def name(axis: Axes, title: str, unit: str) -> None:
    """Title and unit of a panel."""
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(unit)


def _say_not_measured(axis: Axes) -> None:
    """Write into an empty panel why it is empty."""
    at = axis.transAxes
    axis.text(0.5, 0.5, "not measured", transform=at, ha="center", va="center", color=GREY)
    axis.set_yticks([])
