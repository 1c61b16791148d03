"""Perplexity of other texts while a run trains: ``callbacks.evaluation``.

It counts as ``slope eval`` does, by the same functions. Nothing of it is seen by the training: no
generator moves on, and the model is left in the mode that it was in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from slope.evaluation import heldout
from slope.training import rng
from slope.training.metrics import EVALUATED
from slope.training.module import LanguageModule

log = logging.getLogger(__name__)

_KEY = "callbacks.evaluation"


@dataclass(frozen=True)
class Settings:
    """What ``callbacks.evaluation`` asks for.

    Attributes:
        files: by what their columns are called; at least one.
        every: optimizer steps between two evaluations.
        window: tokens that the model sees at once.
        stride: tokens from one window to the next; None: ``window``.
        batch_size: windows at once on each process.
        text_field: field of JSON lines, column of a table.
    """

    files: Mapping[str, Path]
    every: int
    window: int
    stride: int | None
    batch_size: int
    text_field: str


def settings(cfg: DictConfig) -> Settings | None:
    """Read and check what can be known before the files are read; None if there are none.

    Raises:
        ValueError: if a number is out of range, a file is given twice, or the model is a BERT.
        FileNotFoundError: if a file does not exist.
    """
    given: Any = OmegaConf.select(cfg, f"{_KEY}.files")
    paths = [Path(str(file)) for file in ([given] if isinstance(given, str) else given or ())]
    if not paths:
        return None
    if str(cfg.model.family) == "bert":
        raise ValueError(
            f"{_KEY}.files={[*map(str, paths)]} with a BERT model, which predicts hidden tokens "
            f"and not the next one, so that no text has a perplexity; type {_KEY}.files=[]."
        )
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{_KEY}.files names '{path}', which is no file; type the paths of files to "
                f"evaluate on, or {_KEY}.files=[]."
            )
    try:
        labels = heldout.labels(paths)
    except ValueError as error:
        raise ValueError(f"{_KEY}.files: {error}") from error
    every, window, batch_size = (
        _number(cfg, name, least) or int(OmegaConf.select(cfg, default))
        for name, least, default in (
            ("every_n_steps", 1, "trainer.val_check_interval"),
            ("window", 2, "datamodule.max_length"),
            ("batch_size", 1, "datamodule.batch_size_eval"),
        )
    )
    text_field = OmegaConf.select(cfg, f"{_KEY}.text_field", default="text")
    return Settings(
        dict(zip(labels, paths, strict=True)),
        every, window, _number(cfg, "stride", 1), batch_size, str(text_field),
    )  # fmt: skip


def _number(cfg: DictConfig, name: str, least: int) -> int | None:
    value: Any = OmegaConf.select(cfg, f"{_KEY}.{name}")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{_KEY}.{name}={value} must be a whole number of at least {least}; type {_KEY}.{name}="
            "null for its default."
        )
    return value


def check(cfg: DictConfig, model: Any) -> None:
    """Find what is wrong before the data are read.

    Args:
        cfg: the run's.
        model: may be on the meta device.

    Raises:
        ValueError: as :func:`settings`, or if a window does not fit the model.
        FileNotFoundError: as :func:`settings`.
    """
    chosen = settings(cfg)
    if chosen is None:
        return
    try:
        heldout.check_window(model, chosen.window, chosen.stride)
    except ValueError as error:
        given = f"{_KEY}.window={chosen.window}"
        if chosen.stride is not None:
            given += f" {_KEY}.stride={chosen.stride}"
        raise ValueError(f"{given}: {error}") from error


class TextEvaluation:
    """Scores files at the steps that are due; the processes share out the windows.

    Args:
        settings: what to do.
        texts: the tokens of each file.
    """

    def __init__(self, settings: Settings, texts: Mapping[str, heldout.HeldOut]) -> None:
        self.every = settings.every
        self.texts = texts
        self._settings = settings
        self._described = False

    @classmethod
    def open(cls, cfg: DictConfig, model: Any, tokenizer: Any) -> TextEvaluation | None:
        """Read the files of a configuration; None if there are none.

        Args:
            cfg: the run's.
            model: the one that is trained, not yet shared out.
            tokenizer: of the run's data.

        Raises:
            ValueError: as :func:`settings`, or if a file holds no text, lacks the field, or holds
                tokens of another tokenizer.
            FileNotFoundError: as :func:`settings`.
        """
        chosen = settings(cfg)
        if chosen is None:
            return None
        texts = {}
        for label, path in chosen.files.items():
            try:
                texts[label] = heldout.read_held_out(path, tokenizer, chosen.text_field)
                heldout.check(model, texts[label].ids, chosen.window, chosen.stride)
            except ValueError as error:
                text = str(error).replace("--text-field ", f"{_KEY}.text_field=")
                text = text.replace("--data", f"{_KEY}.files")
                raise ValueError(f"{_KEY}.files: '{path}' cannot be used: {text}") from error
        return cls(chosen, texts)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of ``metrics.csv``: loss, perplexity and, of text, bits per byte of each file."""
        return tuple(
            f"{EVALUATED}{label}/{metric}"
            for label, held_out in self.texts.items()
            for metric in heldout.metrics(held_out)
        )

    def measure(self, trainer: pl.Trainer, module: LanguageModule) -> dict[str, float]:
        """Score all files; every process takes part and gets the same numbers."""
        chosen, row = self._settings, {}
        with rng.untouched(), trainer.precision_plugin.forward_context():
            for label, held_out in self.texts.items():
                found = heldout.score(
                    module.model,
                    held_out.ids,
                    chosen.window,
                    chosen.stride,
                    chosen.batch_size,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                )
                for one in heldout.measurements("", label, held_out, found):
                    row[f"{EVALUATED}{label}/{one.metric}"] = one.value
                if not self._described:
                    log.info("%s: %s", label, heldout.counting(held_out, found))
        self._described = True
        return row
