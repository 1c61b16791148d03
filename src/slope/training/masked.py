"""BERT's objective: the hidden tokens of a pair of texts, and whether the second follows."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn import functional

from slope.data.pairs import IGNORED
from slope.training.module import LanguageModule


class MaskedLanguageModule(LanguageModule):
    """A ``BertForPreTraining`` that predicts hidden tokens and the order of two texts.

    Minimised is the sum of both mean cross-entropies. What is logged and validated as the loss is
    that of the hidden tokens alone, nats per token. Only at their places is the vocabulary's
    product computed. Batches are those of :class:`slope.data.pairs.PairDataset`.
    """

    MEASURES = ("val/loss", "val/next_sentence_accuracy")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One micro-batch."""
        tokens, order = self._scores(batch)
        loss = _token_loss(tokens, batch)
        self.losses.append(loss.detach())
        return loss + functional.cross_entropy(order, batch["next_sentence_label"])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the hidden tokens."""
        return _token_loss(self._scores(batch)[0], batch)

    def evaluate(self, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | int]]:
        """Also how often the order is told right."""
        tokens, order = self._scores(batch)
        follows = batch["next_sentence_label"]
        right = (order.argmax(-1) == follows).double().mean()
        return [(_token_loss(tokens, batch), _predicted(batch)), (right, len(follows))]

    def _scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the hidden tokens (B, P, vocabulary) and of the order (B, 2)."""
        model = cast(Any, self.model)
        hidden, pooled = model.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            return_dict=False,
        )[:2]
        places = batch["positions"].unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        tokens, order = model.cls(hidden.gather(1, places), pooled)
        return tokens, order


def _token_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    total = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / _predicted(batch).clamp(min=1)


def _predicted(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"] != IGNORED).sum()
