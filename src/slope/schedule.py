"""What happens at which optimizer step: adapters wake, column masks are refreshed.

A pure function of the step, so a resumed run needs no state of it, and every trainer (plain loop,
Lightning, Hugging Face) calls the same object.
"""

from __future__ import annotations

import math

from torch import nn

from slope.convert import activate_adapters, deactivate_adapters, sparse_layers


class SlopeSchedule:
    """Call :meth:`apply` before the first micro-batch of each optimizer step.

    Args:
        max_steps: optimizer steps of the whole run.
        lora_start: share of the run after which adapters are active, in (0, 1]; 1 never wakes
            them, None for models without adapters. 0.99 is the paper's.

    Raises:
        ValueError: if ``max_steps`` < 1 or ``lora_start`` is outside (0, 1].

    Example:
        >>> SlopeSchedule(1000, lora_start=0.99).start_step
        990
    """

    def __init__(self, max_steps: int, lora_start: float | None = 0.99) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1.")
        if lora_start is not None and not 0 < lora_start <= 1:
            raise ValueError(
                f"lora_start={lora_start} is outside (0, 1]; it is the share of the steps before "
                "the adapters start, for example lora_start=0.99."
            )
        self.max_steps = max_steps
        self.lora_start = lora_start

    @property
    def start_step(self) -> int:
        """First optimizer step, counted from 0, that is done with active adapters."""
        if self.lora_start is None:
            return self.max_steps
        # The product may miss a whole number by rounding: 0.07 * 100 is 7.000000000000001.
        return math.ceil(round(self.lora_start * self.max_steps, 9))

    def apply(self, model: nn.Module, step: int) -> None:
        """Put the model into the state that optimizer step ``step`` (from 0) is done in."""
        if self.lora_start is not None:
            if step >= self.start_step:
                activate_adapters(model)
            else:
                deactivate_adapters(model)
        for _, layer in sparse_layers(model):
            # Interval 1 refreshes inside the layer, whenever its values have changed.
            interval = layer.column_mask_interval
            if interval > 1 and step > 0 and step % interval == 0:
                layer.refresh_column_mask()
