"""Fixed-length sequences of a memory-mapped token file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HEADER_BYTES = 64


class TokenDataset:
    """The tokens of one split, cut into sequences of ``max_length`` that do not overlap.

    Item i is the tokens i*L … (i+1)*L-1; a rest shorter than L at the end is left out. The file is
    memory-mapped: only the items that are asked for are read, and only they become int64. Pickling
    carries the path, not the tokens.

    Args:
        path: token file: a header of 64 bytes, then little-endian tokens.
        dtype: ``uint16`` or ``uint32``.
        num_tokens: tokens in the file.
        max_length: tokens per sequence.
    """

    def __init__(
        self, path: str | Path, dtype: str | np.dtype, num_tokens: int, max_length: int
    ) -> None:
        self.path = Path(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = num_tokens
        self.max_length = max_length
        self._map()

    def _map(self) -> None:
        self._tokens: NDArray[Any] = np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.num_tokens,)
        )
        length = self.max_length
        self._sequences = self._tokens[: len(self) * length].reshape(len(self), length)

    @property
    def tokens(self) -> NDArray[Any]:
        """Every token of the split, memory-mapped and read-only, shape (num_tokens,)."""
        return self._tokens

    def __len__(self) -> int:
        return self.num_tokens // self.max_length

    def __getitem__(self, index: int) -> Tensor:
        """Sequence ``index`` as int64, shape (max_length,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} is outside this split of {len(self)} sequences")
        return torch.from_numpy(self._sequences[index].astype(np.int64))

    def batch(self, indices: Sequence[int] | NDArray[Any]) -> Tensor:
        """Several sequences in one read, as int64, shape (len(indices), max_length)."""
        return torch.from_numpy(self._sequences[np.asarray(indices)].astype(np.int64))

    def examples(
        self, indices: Sequence[int] | NDArray[Any], seed: int, epochs: NDArray[Any]
    ) -> dict[str, Tensor]:
        """The same sequences in every epoch."""
        return {"input_ids": self.batch(indices)}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokens", "_sequences")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __repr__(self) -> str:
        return f"TokenDataset({len(self)} sequences of {self.max_length}, '{self.path}')"
