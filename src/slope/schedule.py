"""What happens at which optimizer step: adapters wake, masks are refreshed, masks evolve.

A pure function of the step, so a resumed run needs no state of it, and every trainer (plain loop,
Lightning, Hugging Face) calls the same object.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import nn

from slope.layers import (
    activate_adapters,
    adapters,
    deactivate_adapters,
    pruned_layers,
    sparse_layers,
)
from slope.methods.evolving import Evolution, GradientCollector, swap


class SlopeSchedule:
    """Call :meth:`apply` before the first micro-batch of each optimizer step.

    Methods with a decay on pruned weights (SR-STE, FST) and evolving masks also need
    :meth:`before_optimizer_step`, after the last backward and before clipping.

    Args:
        max_steps: optimizer steps of the whole run.
        lora_start: share of the run after which adapters are active, in (0, 1]; 1 never wakes
            them, None for models without adapters. 0.99 is the paper's.
        lora_lazy: False: adapters are active from step 0, ``lora_start`` is not read.
        dense_start: share of the run after which layers of a method rest and are dense (FST's last
            phase), in (0, 1]; None for never.
        evolution: how SLoPe's row mask evolves; None: it is fixed.

    Raises:
        ValueError: if ``max_steps`` is no whole number of at least 1, or a share is outside (0, 1].

    Example:
        >>> SlopeSchedule(1000, lora_start=0.99).start_step
        990
    """

    def __init__(
        self,
        max_steps: int,
        lora_start: float | None = 0.99,
        lora_lazy: bool = True,
        dense_start: float | None = None,
        evolution: Evolution | None = None,
    ) -> None:
        whole = isinstance(max_steps, Real) and not isinstance(max_steps, bool)
        if not whole or not 1 <= max_steps < math.inf or int(max_steps) != max_steps:
            raise ValueError(
                f"max_steps={max_steps!r} must be the whole number of the run's optimizer steps, "
                "at least 1, for example max_steps=1000."
            )
        if lora_start is not None and not 0 < lora_start <= 1:
            raise ValueError(
                f"lora_start={lora_start} is outside (0, 1]; it is the share of the steps before "
                "the adapters start, for example lora_start=0.99."
            )
        if dense_start is not None and not 0 < dense_start <= 1:
            raise ValueError(
                f"dense_start={dense_start} is outside (0, 1]; it is the share of the steps before "
                "the dense last phase, for example dense_start=0.83."
            )
        self.max_steps = max_steps
        self.lora_start = lora_start
        self.lora_lazy = lora_lazy
        self.dense_start = dense_start
        self.evolution = evolution
        self._collector: GradientCollector | None = None

    @property
    def start_step(self) -> int:
        """First optimizer step, counted from 0, that is done with active adapters."""
        if self.lora_start is None:
            return self.max_steps
        return _first_step(self.lora_start, self.max_steps) if self.lora_lazy else 0

    @property
    def dense_step(self) -> int:
        """First optimizer step, counted from 0, of the dense last phase."""
        if self.dense_start is None:
            return self.max_steps
        return _first_step(self.dense_start, self.max_steps)

    def apply(self, model: nn.Module, step: int) -> None:
        """Put the model into the state that optimizer step ``step`` (from 0) is done in.

        Raises:
            ValueError: if adapters that are active and trained would go to sleep.
        """
        if self.lora_start is not None:
            if step >= self.start_step:
                activate_adapters(model)
            else:
                self._put_to_sleep(model, step)
        self.refresh_masks(model, step)
        if self.evolution is not None and self.evolution.share(step, self.max_steps):
            if self._collector is not None:
                self._collector.close()  # an optimizer step that was given up
            self._collector = GradientCollector([layer for _, layer in sparse_layers(model)])

    def _put_to_sleep(self, model: nn.Module, step: int) -> None:
        if any(adapter.active and bool(adapter.up.any()) for adapter in adapters(model)):
            raise ValueError(
                f"step {step} of {self.max_steps} is before the adapters start (step "
                f"{self.start_step}), but they are trained already, and the model would lose what "
                "they add. Type lora_lazy=False to keep them active, or call "
                "slope.deactivate_adapters(model) if they are to sleep."
            )
        deactivate_adapters(model)

    def refresh_masks(self, model: nn.Module, step: int) -> None:
        """The part of :meth:`apply` that is about masks; ``model`` may be a single layer."""
        for _, layer in sparse_layers(model):
            # Interval 1 refreshes inside the layer, whenever its values have changed; but not where
            # FSDP2 has sharded them.
            interval = layer.column_mask_interval
            if interval == 1 and hasattr(layer.values, "full_tensor"):
                layer.refreshes_itself = False
            due = interval > 1 and step > 0 and step % interval == 0
            if layer.prune_backward and (due or not layer.refreshes_itself):
                layer.refresh_column_mask()
        for _, pruned in pruned_layers(model):
            pruned.dense = self.dense_start is not None and step >= self.dense_step
            with torch.no_grad():
                pruned.method.begin_step(pruned, step)

    def before_optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Add decays to the gradients, and let masks evolve; once per optimizer step.

        Args:
            model: after its last backward, gradients unscaled and not yet clipped.
            optimizer: whose state follows the weights.
            step: as for :meth:`apply`.
        """
        for _, layer in pruned_layers(model):
            with torch.no_grad():
                layer.method.adjust_gradient(layer)
        if self._collector is None or self.evolution is None:
            return
        collector, self._collector = self._collector, None
        collector.close()
        share = self.evolution.share(step, self.max_steps)
        for collected, gradient in collector.gradients.items():
            swap(collected, gradient, share, optimizer)


def _first_step(share: float, max_steps: int) -> int:
    # The product may miss a whole number by rounding: 0.07 * 100 is 7.000000000000001.
    return math.ceil(round(share * max_steps, 9))
