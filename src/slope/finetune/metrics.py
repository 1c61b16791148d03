"""The official metrics of GLUE and SQuAD v1.1, in percent, from their definitions.

torchmetrics has SQuAD's by the rule of v2.0, where two texts without any word agree.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def accuracy(predicted: Array, labels: Array) -> float:
    """Share of right predictions."""
    return 100 * float(np.mean(predicted == labels))


def f1(predicted: Array, labels: Array) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if there is no true positive."""
    hits = float(np.sum((predicted == 1) & (labels == 1)))
    return 100 * 2 * hits / max(1.0, float(np.sum(predicted == 1) + np.sum(labels == 1)))


def pearson(predicted: Array, labels: Array) -> float:
    """Correlation; 0 where one side is constant and there is none."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (predicted, labels))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return 100 * float(np.sum(x * y) / scale) if scale > 0 else 0.0


def matthews(predicted: Array, labels: Array) -> float:
    """Matthews' coefficient of two classes: the correlation of the 0/1 labels."""
    return pearson(predicted, labels)


def spearman(predicted: Array, labels: Array) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def squad(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of SQuAD v1.1, after the official normalisation.

    Args:
        predictions: question id -> text; one that is missing counts as wrong.
        answers: question id -> the right answers; the best one counts.
    """

    def mean(score: Callable[[list[str], list[str]], float]) -> float:
        best = [
            max(score(_words(predictions[key]), _words(text)) for text in texts)
            if key in predictions
            else 0.0
            for key, texts in answers.items()
        ]
        return 100 * sum(best) / len(best)

    return {"exact_match": mean(lambda a, b: float(a == b)), "f1": mean(_shared_words)}


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _shared_words(predicted: list[str], answer: list[str]) -> float:
    """Harmonic mean of precision and recall of the words; 0 where none is shared."""
    shared = (Counter(predicted) & Counter(answer)).total()
    return 2 * shared / (len(predicted) + len(answer)) if shared else 0.0
