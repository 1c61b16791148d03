"""SLoPe in anybody's Lightning trainer: ``Trainer(callbacks=[SlopeCallback()])``."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from slope.integrations.agreement import check_masks
from slope.integrations.checks import check_run
from slope.integrations.diagnostics import MaskLog
from slope.methods.evolving import Evolution
from slope.schedule import SlopeSchedule


class SlopeCallback(pl.Callback):
    """Wake the adapters, refresh and evolve the masks at the right optimizer steps.

    Needs no state: what it does depends on ``trainer.global_step`` alone.

    Args:
        max_steps: optimizer steps of the run; None asks the trainer.
        lora_start: share of the steps before the adapters start; None for models without adapters
            or without sparse layers.
        lora_lazy: as for :class:`slope.SlopeSchedule`.
        dense_start: as there.
        evolution: as there.
        diagnostics: give ``mask/...`` to the trainer's loggers every ``log_every_n_steps``
            optimizer steps.

    Raises:
        ValueError: for a share outside (0, 1]. When the training begins: if its length is unknown,
            the model has no sparse layers, or got them after an optimizer was made.
    """

    def __init__(
        self,
        max_steps: int | None = None,
        lora_start: float | None = 0.99,
        lora_lazy: bool = True,
        dense_start: float | None = None,
        evolution: Evolution | None = None,
        diagnostics: bool = False,
    ) -> None:
        self._settings = (lora_start, lora_lazy, dense_start, evolution)
        # Bad values are reported here, not at the first step.
        self.schedule = SlopeSchedule(1 if max_steps is None else max_steps, *self._settings)
        self._ask_trainer = max_steps is None
        self._diagnostics = diagnostics
        self._masks: MaskLog | None = None
        self._measured = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out how long the run is."""
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"SlopeCallback follows the steps of one optimizer, and this run has "
                f"{len(trainer.optimizers)}; give one parameter groups, or call a SlopeSchedule "
                "yourself (docs/integrations.md)."
            )
        check_run(pl_module, trainer.optimizers, dense=self._settings[0] is None)
        self._masks = MaskLog(pl_module) if self._diagnostics else None
        self._measured = trainer.global_step
        if self._ask_trainer:
            steps = trainer.estimated_stepping_batches
            # Lightning counts on with the accumulation of the first epoch.
            changes = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)
            if changes or steps == float("inf"):
                why = " (GradientAccumulationScheduler changes it)" if changes else ""
                raise ValueError(
                    f"the length of this run is unknown{why}; write SlopeCallback(max_steps=...)."
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

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure the masks after an optimizer step that is due."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        # An epoch may end in the middle of an accumulation, and then with a step.
        if self._masks is not None and step != self._measured:
            self._measured = step
            row = self._masks.row(pl_module) if every and step % every == 0 else {}
            for logger in trainer.loggers if row else ():
                logger.log_metrics(row, step)


class MaskCheck(pl.Callback):
    """For debugging: compare the masks of all processes every few optimizer steps.

    Args:
        every_n_steps: optimizer steps between two comparisons; 0 never compares.

    Raises:
        ValueError: for a number below 0.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 0:
            raise ValueError(
                f"check_masks_every_n_steps={every_n_steps} must be a number of optimizer steps, "
                "for example 100, or 0 for never."
            )
        self._every = every_n_steps

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the last micro-batch of an optimizer step that is due."""
        step, last = trainer.global_step, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._every and last and step % self._every == 0:
            check_masks(pl_module, pl_module.device, f"step {step}: ")
