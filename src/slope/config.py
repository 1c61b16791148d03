"""What to sparsify and how: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slope.pattern import NMPattern

MASKS = ("magnitude", "random")
BACKENDS = ("auto", "dense")


@dataclass(frozen=True)
class SparsityConfig:
    """Settings of :func:`slope.sparsify`.

    Attributes:
        pattern: ``"n:m"``, n kept of every m, for example ``"2:4"``.
        mask: how the row mask is chosen, once: ``"magnitude"`` of the given weights (on a random
            initialisation a uniformly random support) or ``"random"``.
        seed: of random masks and of the adapters' initialisation, each layer its own stream.
        column_mask_interval: optimizer steps between refreshes of the backward's column mask;
            1 each step, 0 never.
        adapter_rank: 0 for no adapters; a whole number is a rank; a number in (0, 1) is a ratio of
            d_in.
        adapter_scale: factor of the adapter's product; None means 1/rank.
        skip: name patterns (``fnmatch``) of modules that stay dense; a pattern that names a parent
            covers all below it.
        rules: ordered (name pattern, ``"n:m"`` or ``"dense"``); the first that matches wins and may
            sparsify a layer that is dense by default.
        backend: ``"auto"`` or a backend's name.

    Raises:
        ValueError: for any value outside these.
    """

    pattern: str = "2:4"
    mask: str = "magnitude"
    seed: int = 0
    column_mask_interval: int = 1
    adapter_rank: int | float = 0
    adapter_scale: float | None = None
    skip: Sequence[str] = ()
    rules: Sequence[tuple[str, str]] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        NMPattern.parse(self.pattern)
        if self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r} is unknown; choose one of {', '.join(MASKS)}.")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend={self.backend!r} is unknown; choose one of {', '.join(BACKENDS)}."
            )
        if int(self.column_mask_interval) != self.column_mask_interval or (
            self.column_mask_interval < 0
        ):
            raise ValueError(
                f"column_mask_interval={self.column_mask_interval} must be a whole number of "
                "optimizer steps: 1 for each step, 100 for every hundredth, 0 for never."
            )
        rank = self.adapter_rank
        if not 0 <= rank < float("inf") or (rank > 1 and int(rank) != rank):
            raise ValueError(
                f"adapter_rank={rank} must be 0 (no adapters), a whole number, or a ratio of d_in "
                "between 0 and 1, for example 16 or 0.0156."
            )
        if isinstance(self.skip, str):
            raise ValueError(f"skip={self.skip!r} must be a list of patterns: skip=[{self.skip!r}]")
        for rule in self.rules:
            if len(rule) != 2:
                raise ValueError(
                    f"rule {rule!r} must be a pair (name pattern, 'n:m' or 'dense'), for example "
                    "('*.mlp.*', '2:4')."
                )
            if rule[1] != "dense":
                NMPattern.parse(rule[1])
