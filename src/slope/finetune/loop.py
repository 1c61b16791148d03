"""Train a head and its encoder on features; evaluate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from slope.finetune.config import Settings
from slope.finetune.features import Feature, WordPieces
from slope.finetune.metrics import Array
from slope.schedule import SlopeSchedule
from slope.training.optim import parameter_groups
from slope.training.progress import Progress


def train(
    model: Any,
    features: Sequence[Feature],
    pieces: WordPieces,
    settings: Settings,
    seed: int,
    fabric: Fabric,
) -> list[float]:
    """AdamW with a linear warm-up and decay; masks stay as they are.

    Args:
        model: from :func:`slope.finetune.model.with_head`.
        features: of the training set.
        pieces: which pads.
        settings: lr, epochs and so on.
        seed: of the order of the data; dropout draws from torch's generator.
        fabric: device and precision.

    Returns:
        The loss of each optimizer step.

    Raises:
        RuntimeError: if the loss is not finite.
    """
    per_epoch = math.ceil(len(features) / settings.batch_size)
    steps = max(1, math.ceil(settings.epochs * per_epoch))
    warmup = math.ceil(settings.warmup_ratio * steps)

    def share(step: int) -> float:
        return min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))

    groups = parameter_groups(model, settings.weight_decay)
    for group in groups:
        del group["names"]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    wrapped, optimizer = fabric.setup(model, optimizer)
    loader: Any = fabric.setup_dataloaders(_loader(features, pieces, settings.batch_size, seed))
    schedule = SlopeSchedule(steps, lora_start=None)
    losses: list[float] = []
    progress = Progress(steps, settings.progress_bar)
    progress.start(0)
    try:
        while len(losses) < steps:
            for batch in islice(loader, steps - len(losses)):
                schedule.apply(model, len(losses))
                loss = wrapped(**batch).loss
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise RuntimeError(
                        f"the loss is {losses[-1]} at step {len(losses)} of {steps} (seed {seed}); "
                        f"set a smaller lr than {settings.lr:g}, or precision=32-true."
                    )
                fabric.backward(loss)
                # Gradients that are not finite are the loss scaler's to skip.
                fabric.clip_gradients(
                    wrapped,
                    optimizer,
                    max_norm=settings.gradient_clip_val,
                    error_if_nonfinite=False,
                )
                lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                optimizer.zero_grad()
                rates.step()
                progress.step(len(losses))
                progress.measured({"train/loss": losses[-1], "lr": lr, "tokens_per_second": None})
    finally:
        progress.stop()
    return losses


@torch.no_grad()
def predict(
    model: Any,
    features: Sequence[Feature],
    pieces: WordPieces,
    settings: Settings,
    fabric: Fabric,
) -> list[Array]:
    """Outputs of the head for each feature, without padding.

    Returns:
        Per feature: (outputs,) of a classification; (2, length) scores as start and as end.
    """
    model.eval()
    found: list[Array] = []
    batches: Any = fabric.setup_dataloaders(
        _loader(features, pieces, settings.batch_size_eval, None)
    )
    with fabric.autocast():
        for batch in batches:
            found.extend(_outputs(model(**batch)).float().cpu().numpy())
    model.train()
    if found[0].ndim == 2:
        return [o[:, : len(f.input_ids)] for o, f in zip(found, features, strict=True)]
    return [np.asarray(output) for output in found]


def _outputs(output: Any) -> Tensor:
    if "logits" in output:
        return output.logits
    return torch.stack([output.start_logits, output.end_logits], dim=1)


def _loader(
    features: Sequence[Feature], pieces: WordPieces, batch_size: int, seed: int | None
) -> DataLoader[Any]:
    """In the order of the features without a seed, else shuffled anew in each epoch."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    data: Any = features
    return DataLoader(
        data,
        batch_size,
        shuffle=seed is not None,
        generator=generator,
        collate_fn=pieces.collate,
    )
