"""A progress bar on stderr for reading and tokenising a corpus."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

_REFRESH_SECONDS = 0.1


class TokenProgress:
    """How far the corpus is read, tokens so far and per second, time left.

    Args:
        total: position of the corpus's end; None: unknown.
        enabled: False draws nothing and imports nothing.
    """

    def __init__(self, total: int | None, *, enabled: bool) -> None:
        self._total = total
        self._bar: Any = None
        self._task: Any = None
        self._tokens = 0
        self._position = 0
        self._begun = self._drawn = time.monotonic()
        if enabled:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[tokens]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> TokenProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw(finished=kind is None)
            self._bar.stop()

    def start(self, description: str) -> None:
        """Begin a pass over the corpus; the pass before it is done."""
        if self._bar is not None:
            if self._task is not None:
                self._draw(finished=True)
            self._task = self._bar.add_task(description, total=self._total, tokens="")
        self._tokens = self._position = 0
        self._begun = time.monotonic()

    def advance(self, position: int) -> None:
        """The corpus is read up to ``position``."""
        self._position = position
        if self._bar is not None and time.monotonic() - self._drawn > _REFRESH_SECONDS:
            self._draw()

    def count(self, tokens: int) -> None:
        """So many more tokens are written."""
        self._tokens += tokens

    @property
    def fraction(self) -> float | None:
        """Share of the corpus that is read; None: unknown."""
        return self._position / self._total if self._total else None

    def _draw(self, finished: bool = False) -> None:
        self._drawn = time.monotonic()
        if self._task is None:
            return
        position = self._position
        if finished:
            position = self._total or position
        seconds = max(self._drawn - self._begun, 1e-9)
        rate = f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f}/s" if self._tokens else ""
        total = position if finished else self._total
        self._bar.update(self._task, completed=position, total=total, tokens=rate)
