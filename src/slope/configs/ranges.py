"""The values that a setting may have, beyond their kind, and what to type instead of another.

What depends on several settings at once, on the model or on the machine is checked where it is
known, in `slope.training`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

LOGGERS = ("csv", "tensorboard", "wandb", "none")


@dataclass(frozen=True)
class _Whole:
    """A whole number between two ends, both included; ``null`` allows None too."""

    least: int
    most: int | None = None
    null: bool = False

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, int) or value < self.least:
            return False
        return self.most is None or value <= self.most

    def __str__(self) -> str:
        most = "" if self.most is None else f" and at most {self.most}"
        return _or_null(f"a whole number of at least {self.least}{most}", self.null)


@dataclass(frozen=True)
class _Number:
    """A finite number of at least ``least`` or, if that is open, above it; no end is None."""

    least: float | None = None
    most: float | None = None
    open: bool = False
    null: bool = False

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.null
        if not _is_finite(value) or (self.most is not None and value > self.most):
            return False
        if self.least is None:
            return True
        return bool(value > self.least if self.open else value >= self.least)

    def __str__(self) -> str:
        if self.least is None:
            return _or_null("a finite number", self.null)
        if self.most is not None:
            return _or_null(f"a number from {self.least} to {self.most}", self.null)
        side = "above" if self.open else "of at least"
        return _or_null(f"a finite number {side} {self.least}", self.null)


def _or_null(words: str, null: bool) -> str:
    return f"null or {words}" if null else words


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # an int may be larger than any float


_COUNT = _Whole(1)
_EVERY = _Whole(0)
_SHARE = _Number(0, 1)
_SEED = _Whole(0, 2**63 - 1)  # each process adds its rank, and torch takes no more than 64 bits
# Of each key what it may be, and what to type: the end of "type <key>=".
_RANGES: dict[str, tuple[_Whole | _Number, str]] = {
    "seed": (_SEED, "1111"),
    "train.global_batch_size": (_COUNT, "512"),
    "train.optimizer.lr": (_Number(0, open=True), "6e-4"),
    "train.optimizer.eps": (_Number(0, open=True), "1e-8"),
    "train.optimizer.weight_decay": (_Number(0), "0.1, or 0 for none"),
    "train.scheduler.warmup_steps": (_Whole(0, null=True), "null for a share of the steps"),
    "train.scheduler.warmup_ratio": (_SHARE, "0.01"),
    "train.scheduler.min_lr_ratio": (_SHARE, "0.1, the last learning rate over the peak"),
    "train.scheduler.degree": (_Number(0), "0.5"),
    "datamodule.batch_size": (_COUNT, "16"),
    "datamodule.batch_size_eval": (_COUNT, "16"),
    # One token to read, one to predict.
    "datamodule.max_length": (_Whole(2), "1024"),
    "datamodule.max_documents": (_Whole(1, null=True), "null for all"),
    "datamodule.val_split_seed": (_SEED, "2357"),
    "trainer.num_nodes": (_COUNT, "1"),
    # Tokens are counted in 64 bits.
    "trainer.max_steps": (_Whole(1, 10**12), "400000"),
    "trainer.gradient_clip_val": (
        _Number(0, open=True, null=True),
        "1.0, the norm to clip to, or null to clip nothing",
    ),
    "trainer.val_check_interval": (_COUNT, "1000"),
    "trainer.limit_val_batches": (
        _Whole(1, null=True),
        "null for the whole validation split; trainer.val_check_interval=<more optimizer steps> "
        "makes validations rare, and the last step has one",
    ),
    "trainer.log_every_n_steps": (_COUNT, "10"),
    "trainer.check_masks_every_n_steps": (_EVERY, "0 for never"),
    "callbacks.checkpoint.every_n_steps": (_EVERY, "1000, or 0 for the last step alone"),
    "callbacks.checkpoint.progress_every_n_steps": (_EVERY, "10000, or 0 for none"),
    "callbacks.checkpoint.save_top_k": (
        _EVERY,
        "3, or 0 for none; what is saved every callbacks.checkpoint.progress_every_n_steps steps "
        "is all kept",
    ),
    "pruner.lora_rank": (_Number(), "16"),
    "generate.max_new_tokens": (_COUNT, "64"),
}


def check(cfg: DictConfig) -> None:
    """Check every value that is wrong whatever the others are.

    Raises:
        ValueError: for the first that is; the text says what to type.
    """
    from omegaconf import ListConfig, OmegaConf

    absent = object()  # not every scheduler and optimizer has every key
    for key, (allowed, example) in _RANGES.items():
        value = OmegaConf.select(cfg, key, default=absent)
        if value is not absent and not allowed.holds(value):
            raise ValueError(f"{key}={value} must be {allowed}; type {key}={example}.")
    betas = OmegaConf.select(cfg, "train.optimizer.betas", default=absent)
    if betas is not absent and not (
        isinstance(betas, ListConfig)
        and len(betas) == 2
        and all(_is_finite(beta) and 0 <= beta < 1 for beta in betas)
    ):
        raise ValueError(
            f"train.optimizer.betas={betas} must be two numbers of at least 0 and below 1; type "
            "'train.optimizer.betas=[0.9,0.999]'."
        )
    if cfg.logger not in LOGGERS:
        raise ValueError(f"logger={cfg.logger!r} is unknown; choose one of {', '.join(LOGGERS)}.")
