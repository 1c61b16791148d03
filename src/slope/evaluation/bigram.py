"""A bigram language model: the level that a trained transformer has to be clearly below.

Interpolated Kneser-Ney with one discount D (V tokens, c = counts on the training tokens)::

    p(b | a) = max(c(a, b) - D, 0) / c(a)  +  D * followers(a) / c(a) * p(b)
    p(b)     = (predecessors(b) + 1) / (distinct pairs + V)           D = n1 / (n1 + 2 * n2)

where n1 and n2 are the numbers of pairs seen once and twice. Nothing is tuned on the validation
tokens. Counts are kept as sorted unique pairs, so that memory follows the pairs that occur and not
the square of the vocabulary. It uses the same token pairs that the transformer is scored on:
neighbours inside one sequence, never across two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAIRS_PER_CHUNK = 1 << 23  # 64 MiB of int64 keys


@dataclass(frozen=True)
class BigramModel:
    """Interpolated bigram probabilities, looked up by sorted pair key ``a * vocab_size + b``."""

    vocab_size: int
    keys: NDArray[np.int64]  # (pairs,) sorted
    discounted: NDArray[np.float64]  # (pairs,) max(c(a, b) - D, 0) / c(a)
    backoff: NDArray[np.float64]  # (vocab_size,) D * followers(a) / c(a); 1 where a was never seen
    unigram: NDArray[np.float64]  # (vocab_size,) p(b)

    def log_probability(self, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """Natural log of p(b | a) for each pair key, shape (pairs,) -> (pairs,)."""
        first, second = np.divmod(keys, self.vocab_size)
        probability = self.backoff[first] * self.unigram[second]
        if len(self.keys):
            place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            probability += np.where(self.keys[place] == keys, self.discounted[place], 0.0)
        return np.log(probability)


def fit_bigram(dataset: Sequence[Any], vocab_size: int) -> BigramModel:
    """Count the token pairs of a data set of sequences and smooth them.

    Args:
        dataset: item i is a 1-D integer tensor or array of token ids.
        vocab_size: number of ids; every token must be below it.

    Returns:
        The model.

    Raises:
        ValueError: if a token id is outside 0 … vocab_size - 1, or there is no pair.
    """
    keys = np.empty(0, np.int64)
    counts = np.empty(0, np.int64)
    for chunk in _pair_keys(dataset, vocab_size):
        new_keys, new_counts = np.unique(chunk, return_counts=True)
        keys, counts = _merge(keys, counts, new_keys, new_counts)
    if len(keys) == 0:
        raise ValueError(
            "no token pair to count: the data set holds no sequence of two tokens or more; "
            "give a longer corpus or a shorter datamodule.max_length."
        )
    first, second = np.divmod(keys, vocab_size)
    total = np.bincount(first, counts, minlength=vocab_size)  # c(a)
    followers = np.bincount(first, minlength=vocab_size)
    predecessors = np.bincount(second, minlength=vocab_size)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    seen = total > 0
    backoff = np.ones(vocab_size)
    backoff[seen] = discount * followers[seen] / total[seen]
    return BigramModel(
        vocab_size=vocab_size,
        keys=keys,
        discounted=(counts - discount) / total[first],
        backoff=backoff,
        unigram=(predecessors + 1) / (len(keys) + vocab_size),
    )


def bigram_loss(train_dataset: Sequence[Any], val_dataset: Sequence[Any], vocab_size: int) -> float:
    """Validation loss of a bigram model fitted on the training tokens.

    Args:
        train_dataset: sequences that the counts come from.
        val_dataset: sequences that are scored.
        vocab_size: number of token ids.

    Returns:
        Mean negative log-likelihood of the tokens 1 … L-1 of each sequence, in nats per token.

    Raises:
        ValueError: if either data set holds no pair, or an id outside the vocabulary.

    Example:
        >>> import numpy as np
        >>> text = [np.array([0, 1, 0, 1, 0, 1, 0, 1])]
        >>> bigram_loss(text, text, vocab_size=2) < 0.2      # far under log(2) = 0.69
        True
    """
    model = fit_bigram(train_dataset, vocab_size)
    loss, pairs = 0.0, 0
    for keys in _pair_keys(val_dataset, vocab_size):
        loss -= float(model.log_probability(keys).sum())
        pairs += len(keys)
    if pairs == 0:
        raise ValueError(
            "no token pair to score: the validation set holds no sequence of two tokens or more; "
            "raise datamodule.val_ratio."
        )
    return loss / pairs


def _pair_keys(dataset: Sequence[Any], vocab_size: int) -> Iterator[NDArray[np.int64]]:
    """Keys ``a * vocab_size + b`` of neighbouring tokens, some millions at a time."""
    waiting: list[NDArray[np.int64]] = []
    size = 0
    for index in range(len(dataset)):
        tokens = np.asarray(dataset[index], dtype=np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
            wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise ValueError(
                f"token id {wrong} in sequence {index} is outside the vocabulary of {vocab_size}; "
                "was the cache made with another tokenizer?"
            )
        waiting.append(tokens[:-1] * vocab_size + tokens[1:])
        size += len(waiting[-1])
        if size >= _PAIRS_PER_CHUNK:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    if size:
        yield np.concatenate(waiting)


def _merge(
    keys: NDArray[np.int64],
    counts: NDArray[np.int64],
    new_keys: NDArray[np.int64],
    new_counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Add two sorted count tables."""
    if len(keys) == 0:
        return new_keys, new_counts
    merged, inverse = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
    weights = np.concatenate([counts, new_counts])
    return merged, np.bincount(inverse.ravel(), weights, minlength=len(merged)).astype(np.int64)
