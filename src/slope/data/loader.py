"""Batches that depend on nothing but the seed and their number.

Shuffled (training): the run is one endless stream of sequences, epoch after epoch, each epoch in
an order that is a pure function of (seed, epoch). With world size W and b sequences per process,
global batch k is the positions k*b*W … (k+1)*b*W-1 of the stream and rank r takes the r-th b of
them. A batch may straddle two epochs, so the stream is the same for every W and b, and any point
of it is reached without reading what comes before.

Not shuffled (validation): one pass in file order, the last, shorter batch included; its sequences
are shared evenly, so that the ranks' numbers of batches differ (by one) only where there are fewer
sequences left than ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Examples(Protocol):
    """A data set of numbered examples, each drawn anew in each epoch or always the same."""

    max_length: int

    def __len__(self) -> int: ...

    def examples(
        self, indices: Sequence[int] | NDArray[Any], seed: int, epochs: NDArray[Any]
    ) -> dict[str, Tensor]:
        """A batch; what is random about an example is a function of seed, epoch and index."""


def epoch_order(seed: int, epoch: int, size: int) -> NDArray[Any]:
    """The order of an epoch: a permutation of 0 … size-1, a pure function of its arguments."""
    dtype = np.uint32 if size <= 1 << 32 else np.int64
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(np.arange(size, dtype=dtype))


class BatchLoader:
    """Iterate over batches of a data set: ``{"input_ids": int64 (batch, max_length), ...}``.

    Args:
        dataset: sequences, or pairs of them.
        batch_size: sequences per batch of this process.
        seed: seed of the order, ≥ 0.
        shuffle: True: endless and shuffled; an iterator goes on where the last one stopped.
            False: one pass in file order; each iterator starts at the beginning.
        rank: this process, 0 … world_size-1.
        world_size: number of processes that share each global batch.
        start_batch: number of batches (of this process) already consumed.
        pin_memory: put batches into page-locked memory; ignored where there is no CUDA device.

    Raises:
        ValueError: if a number is out of its range or the data set is empty.

    Cost: one gather of the batch from the memory map; an order of 4 bytes per sequence is drawn
    once per epoch (8.8 M sequences: 35 MB).
    """

    def __init__(
        self,
        dataset: Examples,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1; type datamodule.batch_size=8.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0 … world_size-1 = {world_size - 1}.")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; type seed=1111.")
        if start_batch < 0:
            raise ValueError(f"start_batch={start_batch} is negative; give 0 or more.")
        if len(dataset) == 0:
            raise ValueError(
                f"{dataset!r} holds no sequence to load; "
                "give more text or a shorter datamodule.max_length."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self._next = start_batch  # number of the batch that the next iteration yields
        self._epoch = -1
        self._order: NDArray[Any] = np.empty(0, np.uint32)

    @property
    def batches_per_epoch(self) -> float:
        """Global batches in one pass over the data; not whole where the stream straddles epochs."""
        return len(self.dataset) / (self.batch_size * self.world_size)

    @property
    def epoch(self) -> int:
        """Epoch that the next batch starts in."""
        return self._next * self.batch_size * self.world_size // len(self.dataset)

    def __len__(self) -> int:
        """Batches of this rank in a pass; the shuffled stream has no end and no length."""
        if self.shuffle:
            raise TypeError("a shuffled BatchLoader is endless; use batches_per_epoch.")
        whole, rest = divmod(len(self.dataset), self.batch_size * self.world_size)
        return whole + (1 if len(self._share(rest)) else 0)

    def _share(self, rest: int) -> range:
        """This rank's part of the ``rest`` sequences of the last, shorter global batch."""
        return range(self.rank * rest // self.world_size, (self.rank + 1) * rest // self.world_size)

    def indices(self, batch: int) -> NDArray[Any]:
        """Numbers of the sequences of this rank's batch ``batch``, counted from the run's start."""
        size, total = self.batch_size * self.world_size, len(self.dataset)
        first = batch * size
        if not self.shuffle:
            share = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            if first + size > total:
                share = self._share(max(0, total - first))
            return np.arange(first + share.start, first + share.stop)
        epochs, places = np.divmod(self._positions(batch), total)
        chosen = np.empty(self.batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if epoch != self._epoch:
                self._order, self._epoch = epoch_order(self.seed, epoch, total), epoch
            inside = epochs == epoch
            chosen[inside] = self._order[places[inside]]
        return chosen

    def _positions(self, batch: int) -> NDArray[Any]:
        """Places in the endless stream that this rank's batch ``batch`` takes."""
        first = (batch * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.shuffle:
            while True:
                number = self._next
                self._next += 1  # before the yield: the caller holds the batch from here on
                epochs = self._positions(number) // len(self.dataset)
                yield self._load(self.indices(number), epochs)
        start, self._next = self._next, 0
        for number in range(start, len(self)):
            indices = self.indices(number)
            yield self._load(indices, np.zeros_like(indices))

    def in_step(self) -> Iterator[dict[str, Tensor]]:
        """One pass in as many batches on every rank, for models whose ranks compute together.

        A rank whose share of the last batch is empty gets the data set's first sequence with
        ``"weight": 0`` beside its tensors: it takes part and counts for nothing.
        """
        yield from self
        rest = len(self.dataset) % (self.batch_size * self.world_size)
        if rest and not self._share(rest):
            zero = np.zeros(1, np.int64)
            yield {**self._load(zero, zero), "weight": torch.zeros(())}

    def _load(self, indices: NDArray[Any], epochs: NDArray[Any]) -> dict[str, Tensor]:
        batch = self.dataset.examples(indices, self.seed, epochs)
        if self.pin_memory:
            return {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: batches of this process, sequences of all, consumed so far."""
        return {
            "batches": self._next,
            "sequences_consumed": self._next * self.batch_size * self.world_size,
            "seed": self.seed,
            "sequences": len(self.dataset),
            "max_length": self.dataset.max_length,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last sequence of the state, also with another number of processes.

        Args:
            state: what ``state_dict`` gave.

        Raises:
            ValueError: if the state is of other data or another seed, or the consumed sequences are
                not a whole number of global batches of this loader.
        """
        mine = {
            "seed": self.seed,
            "sequences": len(self.dataset),
            "max_length": self.dataset.max_length,
        }
        for name, value in mine.items():
            if state[name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name}={state[name]}, this run has "
                    f"{name}={value}; resume with the same seed, corpus and datamodule options."
                )
        size = self.batch_size * self.world_size
        batches, rest = divmod(state["sequences_consumed"], size)
        if rest:
            raise ValueError(
                f"the checkpoint stopped after {state['sequences_consumed']} sequences, which is "
                f"not a whole number of global batches of {size} (batch_size={self.batch_size} x "
                f"world_size={self.world_size}); type a datamodule.batch_size that divides it."
            )
        self._next = batches
