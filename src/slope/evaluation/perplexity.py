"""Mean negative log-likelihood per token, and its exponential."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def perplexity(loss: float) -> float:
    """``exp(loss)`` for a loss in nats per token; infinite where it does not fit a float.

    Example:
        >>> perplexity(0.0)
        1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def mean_loss(model: nn.Module, batches: Iterable[Any]) -> float:
    """Loss of a causal language model over batches, weighted by the tokens that it predicts.

    Args:
        model: a causal language model whose forward takes `input_ids` and `labels` (shifted inside)
            and returns an object with `loss`, the mean over the predicted tokens.
        batches: tensors of token ids (batch, length), or dicts with `input_ids`.

    Returns:
        Nats per token. The model's train/eval mode is left as it was.

    Raises:
        ValueError: if no batch holds a token to predict.
    """
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in batches:
            ids = batch["input_ids"] if isinstance(batch, dict) else batch
            ids = ids.to(device)
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            if predicted > 0:
                with torch.no_grad():
                    total += float(model(input_ids=ids, labels=ids).loss) * predicted
                tokens += predicted
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError("no token to predict: every batch is empty or one token long.")
    return total / tokens
