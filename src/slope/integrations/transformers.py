"""SLoPe in the Trainer of `transformers`: ``Trainer(..., callbacks=[SlopeTrainerCallback()])``.

Accumulation, clipping, mixed precision, resuming and ``save_model`` are the Trainer's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slope.integrations.checks import check_run
from slope.integrations.diagnostics import MaskLog
from slope.layers import pruned_layers
from slope.methods.evolving import Evolution
from slope.schedule import SlopeSchedule


class SlopeTrainerCallback(TrainerCallback):
    """Wake the adapters, refresh and evolve the masks at the right optimizer steps.

    Needs no state: what it does depends on ``state.global_step`` alone, so a run goes on from any
    checkpoint of the Trainer.

    The Trainer has no event between the last backward and clipping: what the other trainers do
    before (the decay of SR-STE and FST, the swaps of evolving masks) is done after it here. SLoPe
    with its fixed mask does nothing there.

    Args:
        lora_start: share of the steps before the adapters start; None for models without adapters
            or without sparse layers.
        lora_lazy: as for :class:`slope.SlopeSchedule`.
        dense_start: as there.
        evolution: as there.
        diagnostics: add ``mask/...`` to every log of the training loss. The Trainer hands logs to
            its own loggers first; for them, insert this callback at the front:
            ``trainer.callback_handler.callbacks.insert(0, callback)``.

    Raises:
        ValueError: for a share outside (0, 1]. When the training begins: if a method with a decay
            would add it to gradients that are still scaled (``fp16`` with ``max_grad_norm=0``), or
            the model has no sparse layers, or got them after the optimizer was made.
    """

    def __init__(
        self,
        lora_start: float | None = 0.99,
        lora_lazy: bool = True,
        dense_start: float | None = None,
        evolution: Evolution | None = None,
        diagnostics: bool = False,
    ) -> None:
        self._settings = (lora_start, lora_lazy, dense_start, evolution)
        # Bad values are reported here, not at the first step.
        self.schedule = SlopeSchedule(1, *self._settings)
        self._diagnostics = diagnostics
        self._masks: MaskLog | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        """The length of the run is known now."""
        self.schedule = SlopeSchedule(state.max_steps, *self._settings)
        check_run(model, [] if optimizer is None else [optimizer], self._settings[0] is None)
        if args.fp16 and not args.max_grad_norm and any(True for _ in pruned_layers(model)):
            raise ValueError(
                "fp16=True with max_grad_norm=0 leaves the gradients scaled, and a decay cannot be "
                "added to them; type max_grad_norm=1.0 or bf16=True."
            )
        self._masks = MaskLog(model) if self._diagnostics else None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **others: Any,
    ) -> None:
        """Before the first micro-batch of an optimizer step."""
        self.schedule.apply(model, state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **others: Any,
    ) -> None:
        """Decays and swaps."""
        self.schedule.before_optimizer_step(model, optimizer, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any],
        **others: Any,
    ) -> None:
        """Measure the masks along with the training loss."""
        if self._masks is not None and "loss" in logs:
            row = self._masks.row(model)
            logs.update(row)
            state.log_history[-1].update(row)
