"""Mask diagnostics of a run: which steps are measured, and ``diagnostics.csv``.

A measured step k compares the masks that it is done with to those that step k + 1 begins with, so
a mask that is refreshed between the two is counted. Nothing of it outlives the step: a run that is
resumed measures what an unbroken one does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from slope.diagnostics import MaskSnapshot, layer_diagnostics, total
from slope.layers import adapted_layers
from slope.linear import AdaptedLinear
from slope.schedule import SlopeSchedule
from slope.training.metrics import DIAGNOSTICS_COLUMNS, MetricsFile, Value

FILE = "diagnostics.csv"
_KEY = "callbacks.diagnostics.every_n_steps"


def every_n_steps(cfg: DictConfig) -> int:
    """Optimizer steps between two measurements; 0 means never.

    Raises:
        ValueError: if the configuration has something else than a number of steps or null.
    """
    every: Any = OmegaConf.select(cfg, _KEY)
    if every is None:
        every = cfg.trainer.val_check_interval
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(
            f"{_KEY}={every} must be a whole number of optimizer steps: 100 for every hundredth, "
            "0 for never, null for each validation."
        )
    return every


class MaskDiagnostics:
    """Measures the masks of a run in the steps that are due; a context manager of its file.

    The masks are the same on every process, so the first one measures alone.

    Args:
        path: of ``diagnostics.csv``.
        step: the optimizer step from which the run goes on.
        every: optimizer steps between two measurements, at least 1.
        schedule: what happens to the masks between two steps. Steps in which they evolve are
            measured too, since no other shows it.
    """

    def __init__(self, path: Path, step: int, every: int, schedule: SlopeSchedule) -> None:
        self.every = every
        self._file = MetricsFile(path, step, DIAGNOSTICS_COLUMNS)
        self._schedule = schedule
        self._before: MaskSnapshot | None = None

    @classmethod
    def open(
        cls, cfg: DictConfig, step: int, schedule: SlopeSchedule, model: nn.Module
    ) -> MaskDiagnostics | None:
        """What a configuration asks for; None if it is nothing, or the model is dense.

        Raises:
            ValueError: as :func:`every_n_steps`.
        """
        every = every_n_steps(cfg)
        if not every or not any(True for _ in adapted_layers(model)):
            return None
        return cls(Path(cfg.paths.log_dir) / FILE, step, every, schedule)

    def due(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 1, is measured; the last one always is."""
        last, evolution = self._schedule.max_steps, self._schedule.evolution
        if step == last or step % self.every == 0:
            return True
        return evolution is not None and evolution.share(step - 1, last) > 0

    def begin(self, model: nn.Module) -> None:
        """Remember the masks at the beginning of a step that is due."""
        self._before = MaskSnapshot(model)

    def measure(self, model: nn.Module, step: int) -> dict[str, Value]:
        """Measure after the last update of a step that is due, and write its rows.

        Args:
            model: sparsified.
            step: optimizer steps done, this one included.

        Returns:
            The totals as columns of ``metrics.csv``.
        """

        def upcoming(layer: AdaptedLinear) -> AdaptedLinear:
            seen = copy.copy(layer)
            seen._buffers = {
                name: None if buffer is None else buffer.clone()
                for name, buffer in layer._buffers.items()
            }
            self._schedule.refresh_masks(seen, step)
            return seen

        layers = layer_diagnostics(model, self._before, upcoming)
        self._before = None
        everything = total(layers).row()
        self._file.append(
            *({"step": step, "layer": name, **layer.row()} for name, layer in layers.items()),
            {"step": step, "layer": "total", **everything},
        )
        return {f"mask/{name}": value for name, value in everything.items()}

    def sync(self) -> None:
        """Make the rows safe from a power cut."""
        self._file.sync()

    def __enter__(self) -> MaskDiagnostics:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)
