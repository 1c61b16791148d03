"""The model as Lightning trains it: a loss, parameter groups, clipping."""

from __future__ import annotations

from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slope.training.optim import LearningRates, build_optimizer, parameter_groups
from slope.training.strategies import ShardedStrategy, whole


class LanguageModule(pl.LightningModule):
    """A language model of transformers, its optimizer, and rates that depend on the step alone.

    Args:
        model: called with ``input_ids`` and ``labels``, returns an object with ``loss``.
        rates: learning rates by step.
        optimizer: name, betas, eps, weight decay, and for LAMB ``decay_embeddings``.
        fused: use the fused AdamW kernel.

    Attributes:
        losses: detached losses of the micro-batches since the last optimizer step.
        grad_norm: gradient norm of the last optimizer step, before clipping.
        MEASURES: columns of the metrics that a validation fills in.
    """

    MEASURES: ClassVar[tuple[str, ...]] = ("val/loss",)

    def __init__(
        self, model: nn.Module, rates: LearningRates, optimizer: dict[str, Any], fused: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.rates = rates
        self.losses: list[Tensor] = []
        self.grad_norm: Tensor | None = None
        self._optimizer = optimizer
        self._fused = fused

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the next token; the model shifts the labels."""
        loss: Tensor = self.model(
            input_ids=batch["input_ids"], labels=batch.get("labels", batch["input_ids"])
        ).loss
        return loss

    def evaluate(self, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | int]]:
        """What MEASURES names of a validation batch: means, and what each is the mean of."""
        rows, length = batch["input_ids"].shape
        return [(self.loss(batch), rows * (length - 1))]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One micro-batch."""
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_model(self) -> None:
        """Cast the model, and share it out where the strategy does.

        Lightning calls this before it loads a checkpoint, which would else be rounded.
        """
        self.trainer.precision_plugin.convert_module(self.model)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self.model)

    @property
    def betas(self) -> tuple[float, float]:
        """Of the optimizer."""
        first, second = self._optimizer["betas"]
        return first, second

    @property
    def eps(self) -> float:
        """Of the optimizer."""
        return float(self._optimizer["eps"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is built over."""
        settings = self._optimizer
        return parameter_groups(
            self.model, settings["weight_decay"], settings.get("decay_embeddings", False)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over the groups; no scheduler, the rates are set from the step."""
        return build_optimizer(
            self.parameter_groups(),
            self._optimizer["name"],
            self.rates.peak,
            self.betas,
            self.eps,
            self._fused,
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient and keep that norm."""
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        self.grad_norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit))


class TrainBatches:
    """Micro-batches of a run as one long epoch that can be entered anywhere.

    One batch more than the run reads, so that Lightning never takes a batch for the last one of
    its epoch: the run ends at its step, and a longer ``max_steps`` continues it.

    Args:
        loader: a :class:`slope.data.BatchLoader` without end.
        length: micro-batches of the run.
    """

    def __init__(self, loader: Any, length: int) -> None:
        self.loader = loader
        self.length = length

    def __len__(self) -> int:
        return self.length + 1

    def __iter__(self) -> Any:
        return iter(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Position, for Lightning's checkpoint."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.loader.load_state_dict(state)
