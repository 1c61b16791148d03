"""The loss of guessing each token by its frequency: what a masked language model has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 26


def unigram_loss(
    train: NDArray[Any], val: NDArray[Any], vocab_size: int, document_end: int
) -> float:
    """Cross-entropy of validation tokens under the training tokens' frequencies.

    Args:
        train: token ids, shape (tokens,), memory-mapped or not; each count is raised by one.
        val: token ids that are scored.
        vocab_size: number of ids.
        document_end: a token that nobody predicts, left out of both.

    Returns:
        Nats per token.

    Example:
        >>> unigram_loss(np.array([1, 2, 0]), np.array([2, 1]), 3, 0)  # of 3 ids, 0 is left out
        0.6931471805599453
    """
    counts, scored = _counts(train, vocab_size), _counts(val, vocab_size)
    counts += 1
    counts[document_end] = scored[document_end] = 0
    seen = counts > 0
    logs = np.log(counts[seen] / counts.sum())
    return float(-(scored[seen] * logs).sum() / scored.sum())


def _counts(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    total = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _BLOCK):
        total += np.bincount(tokens[start : start + _BLOCK], minlength=vocab_size)
    return total
