"""``pruner.sparsity_increment``: blocks whose pattern is sparser than the rest.

A list of blocks b0, b1, …: with the pattern n:m, blocks b0 to b1 - 1 are n:2m, b1 to b2 - 1 n:4m,
and so on to the end of the model; before b0 the pattern stands. A last entry of -1 says that the
block before it goes back to the pattern: ``"0,12,-1"`` is 2:8 in blocks 0 to 11 and 2:4 behind
them. ``""`` and ``"-1"`` change nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from slope.pattern import MAX_GROUP, NMPattern

if TYPE_CHECKING:
    from torch import nn

    from slope.models import ModelStructure

_FORM = (
    'it lists the blocks at which the pattern gets sparser, for example "12", or "0,12,-1" to go '
    "back to pruner.pattern at block 12"
)


@dataclass(frozen=True)
class Increment:
    """A ``sparsity_increment`` that was read.

    Attributes:
        text: as it was given.
        blocks: ascending.
        closed: the last block ends the sparser part; else the end of the model does.
    """

    text: str
    blocks: tuple[int, ...]
    closed: bool

    @classmethod
    def parse(cls, value: Any) -> Increment:
        """Read a text, a whole number or a list of them.

        Raises:
            ValueError: if an entry is no whole number or below 0, or they do not ascend.

        Example:
            >>> Increment.parse("0, 12, -1")
            Increment(text='0,12,-1', blocks=(0, 12), closed=True)
        """
        parts = str(value).split(",") if isinstance(value, (str, int, float)) else list(value)
        texts = [str(part).strip() for part in parts]
        text = ",".join(texts)
        if text in ("", "-1"):
            return cls(text, (), True)
        given = f"pruner.sparsity_increment={text}"
        for part in texts:
            if not re.fullmatch(r"-?\d+", part):
                raise ValueError(f"{given} is not numeric at {part!r}; {_FORM}.")
        closed = texts[-1] == "-1"
        blocks = tuple(int(part) for part in (texts[:-1] if closed else texts))
        if min(blocks) < 0:
            raise ValueError(
                f"{given} has a block below 0; only the last entry may be -1: {_FORM}."
            )
        if any(a >= b for a, b in pairwise(blocks)):
            raise ValueError(f"{given} is not ascending; {_FORM}.")
        return cls(text, blocks, closed)

    def patterns(self, pattern: NMPattern) -> list[NMPattern]:
        """The pattern from each block to the next: n:2m, n:4m and so on; empty if none changes.

        Raises:
            ValueError: if m would grow beyond what there is.
        """
        levels = max(0, len(self.blocks) - self.closed)
        largest = pattern.m << levels
        if largest > MAX_GROUP:
            possible = (MAX_GROUP // pattern.m).bit_length() - 1
            raise ValueError(
                f"pruner.sparsity_increment={self.text} with pruner.pattern={pattern} doubles m "
                f"{levels} times, to {largest}, and m can be at most {MAX_GROUP}; give at most "
                f"{possible} blocks beside the one before -1."
            )
        return [NMPattern(pattern.n, pattern.m << level) for level in range(1, levels + 1)]

    def rules(
        self, pattern: NMPattern, model: nn.Module, parts: ModelStructure
    ) -> list[tuple[str, str]]:
        """A rule for each block that gets sparser.

        Raises:
            ValueError: if a block is beyond the last one.
        """
        count = len(parts.blocks)
        bounds = self.blocks if self.closed else (*self.blocks, count)
        for place, block in enumerate(self.blocks, 1):
            # One that ends the sparser part may be the one after the last.
            if block >= count + (self.closed and place == len(self.blocks)):
                raise ValueError(
                    f"pruner.sparsity_increment={self.text}: block {block} is beyond the last "
                    f"block; this model has {count} blocks, 0 to {count - 1}."
                )
        found: list[tuple[str, str]] = []
        for (start, stop), sparser in zip(pairwise(bounds), self.patterns(pattern), strict=True):
            for index in range(start, stop):
                names = [parts.blocks[index]] if index else _but_first_qkv(model, parts)
                found.extend((name, str(sparser)) for name in names)
        return found


def _but_first_qkv(model: nn.Module, parts: ModelStructure) -> list[str]:
    """Weight matrices of block 0 other than QKV, which a rule would make sparse."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{parts.blocks[0]}.")
        and name not in parts.first_qkv
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
