"""SLoPe in anybody's Lightning trainer: ``Trainer(callbacks=[SlopeCallback()])``."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from slope.methods.evolving import Evolution
from slope.schedule import SlopeSchedule


class SlopeCallback(pl.Callback):
    """Wake the adapters, refresh and evolve the masks at the right optimizer steps.

    Needs no state: what it does depends on ``trainer.global_step`` alone.

    Args:
        max_steps: optimizer steps of the run; None asks the trainer.
        lora_start: share of the steps before the adapters start; None for models without adapters.
        lora_lazy: as for :class:`slope.SlopeSchedule`.
        dense_start: as there.
        evolution: as there.
    """

    def __init__(
        self,
        max_steps: int | None = None,
        lora_start: float | None = 0.99,
        lora_lazy: bool = True,
        dense_start: float | None = None,
        evolution: Evolution | None = None,
    ) -> None:
        self._settings = (lora_start, lora_lazy, dense_start, evolution)
        # Bad values are reported here, not at the first step.
        self.schedule = SlopeSchedule(1 if max_steps is None else max_steps, *self._settings)
        self._ask_trainer = max_steps is None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out how long the run is."""
        if self._ask_trainer:
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ValueError(
                    "the length of this run is unknown; write SlopeCallback(max_steps=...)."
                )
            self.schedule = SlopeSchedule(int(steps), *self._settings)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first micro-batch of an optimizer step, put the model into that step's state."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.schedule.apply(pl_module, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decays and swaps, on unscaled gradients that are not clipped yet."""
        self.schedule.before_optimizer_step(pl_module, optimizer, trainer.global_step)
