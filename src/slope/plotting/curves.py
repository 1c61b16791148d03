"""Loss, perplexity, learning rate, gradient norm, throughput and memory of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slope.plotting import panels
from slope.plotting.panels import BLUE, DOT, GREEN, HOLLOW, ORANGE, PURPLE, Shown
from slope.plotting.runs import Horizontal, Run, exp, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHED = 20  # points; a curve of more is smoothed
_STEEP = 0.1  # share of a run, before which the losses of several are too steep to compare
_THIN: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.6}
_OTHERS = ("-", "--", "-.", ":")  # of as many other texts, if a run evaluated them
_BOLD: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}


def draw(runs: Sequence[Run], against: str = "steps") -> Figure:
    """Draw the curves of one or several runs.

    Args:
        runs: at least one; each of several has a colour of its own.
        against: ``steps``, ``tokens`` or ``time``.

    Raises:
        ValueError: if ``against`` is unknown, or a run has not written what it needs.
    """
    from matplotlib.figure import Figure

    horizontal = Horizontal(against, runs)
    figure = Figure(figsize=(13, 7), layout="constrained")
    shown = panels.looks(runs)
    if len(runs) == 1:
        panels.title(figure, runs[0].title())
    axes = figure.subplots(2, 3, sharex=True)
    loss, perplexity, rate, norm, throughput, memory = axes.flat
    _draw_loss(loss, shown, horizontal, lambda nats: nats, "{:.2f}")
    panels.name(loss, "loss", "nats per token")
    _scale_by_factors(perplexity)
    _draw_loss(perplexity, shown, horizontal, exp, "{:.0f}")
    panels.name(perplexity, "perplexity", "perplexity (log scale)")
    _draw_rate(rate, shown, horizontal)
    _draw_one(norm, shown, horizontal, "grad_norm", PURPLE)
    panels.name(norm, "gradient norm", "norm before clipping")
    _draw_one(throughput, shown, horizontal, "tokens_per_second", GREEN)
    panels.name(throughput, "throughput", "tokens per second")
    _draw_memory(memory, shown, horizontal)

    lines = {"training": {**_THIN, **HOLLOW, **DOT}, "validation": _BOLD}
    if any(any(horizontal.points(run, "lora_lr")[1]) for run, _ in shown):
        lines["learning rate of the adapters"] = {"linestyle": "-."}
    panels.finish(figure, axes, shown, horizontal, lines)
    return figure


def _draw_loss(
    axis: Axes,
    shown: Shown,
    horizontal: Horizontal,
    of: Callable[[float], float],
    number: str,
) -> None:
    """Training, validation and bigram loss, or what ``of`` makes of them."""
    limits = []
    for run, look in shown:
        (x, nats), val = horizontal.points(run, "train/loss"), horizontal.points(run, "val/loss")
        label = "training"
        if len(x) > _SMOOTHED:
            if look.alone:
                axis.plot(x, [of(y) for y in nats], color=BLUE, alpha=0.25, linewidth=0.8)
            nats, label = smooth(nats), "training (smoothed)"
        limits += nats[int(_STEEP * len(nats)) :] + val[1]
        plain = {} if look.alone else {**_THIN, **HOLLOW}
        look.draw(axis, (x, [of(y) for y in nats]), BLUE, label, **plain)
        marked = {**_BOLD, "marker": look.marker, "markevery": 1}
        look.draw(axis, (val[0], [of(y) for y in val[1]]), ORANGE, "validation", **marked)
        for name, style in zip(run.evaluated() if look.alone else (), _OTHERS, strict=False):
            x, nats = horizontal.points(run, f"eval/{name}/loss")
            look.draw(axis, (x, [of(y) for y in nats]), PURPLE, name, **_BOLD, linestyle=style)
    if len(shown) > 1 and limits:
        spare = 0.05 * (max(limits) - min(limits)) or 0.1
        axis.set_ylim(of(min(limits) - spare), of(max(limits) + spare))
    levels = {run.summary.get("bigram_val_loss") for run, _ in shown}
    for level in sorted(of(nats) for nats in levels if nats is not None):
        label = f"bigram, validation ({number.format(level)})"
        axis.axhline(level, color=GREEN, linestyle=":", linewidth=1.5, label=label)


def _scale_by_factors(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_rate(axis: Axes, shown: Shown, horizontal: Horizontal) -> None:
    for run, look in shown:
        look.draw(axis, horizontal.points(run, "lr"), BLUE, "weights")
        adapters = horizontal.points(run, "lora_lr")
        if any(adapters[1]):
            look.draw(axis, adapters, ORANGE, "adapters", linestyle="-.")
    panels.name(axis, "learning rate", "learning rate")
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_memory(axis: Axes, shown: Shown, horizontal: Horizontal) -> None:
    largest = max(
        max(horizontal.points(run, "peak_memory_bytes")[1], default=0) for run, _ in shown
    )
    size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    _draw_one(axis, shown, horizontal, "peak_memory_bytes", ORANGE, size)
    panels.name(axis, "peak memory", unit)


def _draw_one(
    axis: Axes,
    shown: Shown,
    horizontal: Horizontal,
    column: str,
    colour: str,
    unit: float = 1,
) -> None:
    """A column from zero on; ``unit`` is what one on the axis stands for."""
    from matplotlib.ticker import StrMethodFormatter

    largest = 0.0
    for run, look in shown:
        x, values = horizontal.points(run, column)
        look.draw(axis, (x, [y / unit for y in values]), colour, "_hidden", linewidth=1.2)
        largest = max([largest, *(y / unit for y in values)])
    if axis.has_data():
        axis.set_ylim(0, 1.1 * largest or 1.0)
    if largest >= 1000:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
