"""N:M sparsity patterns: n entries are kept in each group of m consecutive ones.

Pure standard library. The group runs along ``d_in`` for row pruning and along ``d_out`` for column
pruning (SLoPe, arXiv:2405.16325, section 2.1). 2:4 is the pattern that GPUs multiply in hardware.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MAX_GROUP = 32


@dataclass(frozen=True, order=True)
class NMPattern:
    """Keep ``n`` of every ``m`` consecutive entries; ``m`` is a power of two up to 32, ``n < m``.

    Raises:
        ValueError: if the two numbers make no such pattern.

    Example:
        >>> NMPattern.parse("2:4").density
        0.5
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m < 2 or self.m > MAX_GROUP or self.m & (self.m - 1):
            raise ValueError(
                f"pattern {self.n}:{self.m} has m={self.m}; m must be a power of two "
                f"from 2 to {MAX_GROUP}, for example 2:4."
            )
        if not 0 < self.n < self.m:
            hint = f" Did you mean {self.m}:{self.n}?" if self.n > self.m else ""
            raise ValueError(
                f"pattern {self.n}:{self.m} keeps n={self.n} of m={self.m}; "
                f"n must be at least 1 and less than m.{hint}"
            )

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """Read ``"n:m"``, for example ``"2:4"``; a pattern is returned as it is.

        Raises:
            ValueError: if the text is not two whole numbers with a colon between them.
        """
        if isinstance(text, cls):
            return text
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if match is None:
            raise ValueError(
                f"pattern {text!r} is not of the form n:m (n kept of every m); write for example "
                "pattern='2:4'."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Share of entries kept, n/m."""
        return self.n / self.m

    @property
    def bits(self) -> int:
        """Bits that hold one position inside a group, log2(m)."""
        return self.m.bit_length() - 1

    def kept(self, features: int) -> int:
        """Number of entries kept of ``features`` (divisible by m)."""
        return features // self.m * self.n

    def metadata_bytes(self, features: int) -> int:
        """Bytes of packed positions for one row of ``features`` entries."""
        return math.ceil(self.kept(features) * self.bits / 8)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def imposed_sparsity(pattern: NMPattern) -> float:
    """Extra share of zeros that the second pruning adds to W^R, on average (Lemma 2.1).

    ``sum_{j=n+1}^{m} C(m,j) s^j (1-s)^(m-j) (j-n)/m`` with ``s = n/m``: a column group of a random
    row-pruned matrix holds j kept entries with binomial probability, and j - n of them are dropped.
    12.5 % for 1:2, 9.375 % for 2:4, 5.84 % for 2:8.
    """
    n, m, s = pattern.n, pattern.m, pattern.density
    return sum(
        math.comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1)
    )
