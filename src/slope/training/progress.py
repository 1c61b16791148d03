"""What a user sees of a run: a bar in a terminal, plain log lines elsewhere, a table at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from slope.training.metrics import EVALUATED

log = logging.getLogger(__name__)

Row = Mapping[str, "float | int | None"]


@cache
def _stderr() -> Console:
    # One console for the bar and the log lines, so that lines appear above the bar.
    return Console(stderr=True)


def console_handler() -> logging.Handler:
    """A log handler for standard error that does not disturb the bar."""
    if not _stderr().is_terminal:
        return logging.StreamHandler()
    return RichHandler(console=_stderr(), show_path=False, show_level=False, markup=False)


class Progress:
    """Loss, learning rate, tokens per second and time left of a run.

    Args:
        max_steps: optimizer steps of the whole run.
        bar: draw a bar if the console is a terminal.
        console: where to draw; None takes standard error.
    """

    def __init__(self, max_steps: int, bar: bool, console: Console | None = None) -> None:
        self.max_steps = max_steps
        self._bar: RichProgress | None = None
        self._started: tuple[float, int] = (0.0, 0)
        console = console or _stderr()
        if bar and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=max_steps, text="", start=False)

    def start(self, step: int) -> None:
        """Begin, or go on from a step."""
        self._started = (time.monotonic(), step)
        if self._bar is not None:
            self._bar.start_task(self._task)
            self._bar.update(self._task, completed=step)
            self._bar.start()

    def step(self, step: int) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def measured(self, row: Row) -> None:
        """New numbers for the bar."""
        if self._bar is not None:
            text = f"loss {row['train/loss']:.4f}  lr {row['lr']:.2e}"
            if row["tokens_per_second"] is not None:
                text += f"  {row['tokens_per_second']:,.0f} tokens/s"
            self._bar.update(self._task, text=text)

    def row(self, row: Row) -> None:
        """A row of the metrics was written: what was validated or evaluated is always said."""
        step, loss = row["step"], row.get("val/loss")
        if loss is not None:
            log.info("step %s: val loss %.4f, perplexity %.2f", step, loss, row["val/perplexity"])
        for name in row:
            if name.startswith(EVALUATED) and name.endswith("/loss"):
                text = name.removeprefix(EVALUATED).removesuffix("/loss")
                value = row[name.removesuffix("loss") + "perplexity"]
                log.info("step %s: %s loss %.4f, perplexity %.2f", step, text, row[name], value)
        if self._bar is None:
            speed = row["tokens_per_second"]
            log.info(
                "step %s/%s: loss %.4f, lr %.2e, %s tokens/s, %s left",
                step,
                self.max_steps,
                row["train/loss"],
                row["lr"],
                "-" if speed is None else f"{speed:,.0f}",
                self._left(int(step or 0)),
            )

    def stop(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        began, first = self._started
        if step <= first:
            return "-"
        seconds = (time.monotonic() - began) / (step - first) * (self.max_steps - step)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def show_summary(
    summary: Mapping[str, Any],
    report: str,
    written: Mapping[str, Path],
    sample: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the end of a run: layers, numbers, sample, and where everything is."""
    console = console or Console()
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    numbers = Table(title="summary", show_header=False)
    for name, value in summary.items():
        numbers.add_row(name, _readable(name, value))
    console.print(numbers)
    if "bigram_val_loss" in summary:
        compared = Table("model", "val loss", "val perplexity", title="on the same tokens")
        for model in ("", "bigram_"):
            values = (summary[f"{model}val_loss"], summary[f"{model}val_perplexity"])
            compared.add_row("bigram" if model else "this run", *(f"{v:.4g}" for v in values))
        console.print(compared)
    if sample is not None:
        console.print("sample of text:", style="bold")
        console.print(sample, markup=False, highlight=False)
    console.print("written:", style="bold")
    for name, path in written.items():
        console.print(f"  {name:<12} {path}", markup=False, highlight=False, soft_wrap=True)


def _readable(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if "bytes" in name:
        return f"{value:,} ({value / 1e6:.1f} MB)"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
