"""What was measured of several models, side by side: Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        model: what the user calls it.
        data: a file, or a task.
        metric: of the task; or perplexity, loss (nats per token), bits_per_byte.
        value: of the metric.
        stderr: standard error of the value, None where it is not known.
        count: what the value is a mean over: predicted tokens, or examples; None for a group of
            tasks.
        window: of a file: tokens that the model saw at once.
        stride: of a file: tokens from one window to the next.
        fewshot: of a task: solved examples before each question; None for a group whose tasks
            differ.
    """

    model: str
    data: str
    metric: str
    value: float
    stderr: float | None
    count: int | None
    window: int | None = None
    stride: int | None = None
    fewshot: int | None = None


def to_csv(measured: Sequence[Measurement]) -> str:
    """One line per number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Measurement)])
    writer.writerows(["" if v is None else v for v in astuple(one)] for one in measured)
    return text.getvalue()


def to_markdown(measured: Sequence[Measurement], notes: Sequence[str]) -> str:
    """A column per model, value ± standard error; below it how things were counted."""
    models = list(dict.fromkeys(one.model for one in measured))
    rows = list(dict.fromkeys((one.data, one.metric) for one in measured))
    found = {(one.data, one.metric, one.model): one for one in measured}
    lines = [
        _line(["data", "metric", *models]),
        _line(["---", "---", *["---:"] * len(models)]),
        *(_line([*row, *(_cell(found.get((*row, model))) for model in models)]) for row in rows),
    ]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(one: Measurement | None) -> str:
    if one is None:
        return "–"
    return f"{one.value:.4f}" if one.stderr is None else f"{one.value:.4f} ± {one.stderr:.4f}"
