"""Settings of a fine-tuning: what is typed as ``key=value``, over the recipe of its task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from slope.spelling import did_you_mean

TASKS = (
    *(f"glue/{name}" for name in ("cola", "sst2", "mrpc", "stsb", "qqp", "rte", "mnli", "qnli")),
    "squad",
)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "cuda")
RESULT = "result.json"
"""File that a finished seed leaves in its folder."""
_RECIPES = Path(__file__).with_name("tasks.yaml")
# least value, and whether it is allowed
_RANGES: dict[str, tuple[float, bool]] = {
    "lr": (0, False),
    "epochs": (0, False),
    "batch_size": (1, True),
    "batch_size_eval": (1, True),
    "max_length": (8, True),
    "warmup_ratio": (0, True),
    "weight_decay": (0, True),
    "gradient_clip_val": (0, False),
    "doc_stride": (1, True),
    "max_query_length": (1, True),
    "n_best_size": (1, True),
    "max_answer_length": (1, True),
}


@dataclass
class Settings:
    """What ``slope finetune`` reads; the numbers of a task are in ``tasks.yaml``.

    Attributes:
        task: one of ``TASKS``.
        init_from: a checkpoint (file, or folder of a run), or a folder of save_pretrained.
        data: folder with the official files, or ``hub``: the Hugging Face hub, through `datasets`.
        tokenizer: vocab.txt (uncased), tokenizer.json, a folder with one of them, or a name that
            ``datamodule.tokenizer`` takes; None: what lies beside the checkpoint.
        name: of the run's folder; None: the task's.
        root: the run's folder is ``<root>/logs/<name>``.
        dense: True: all weights are trained, the zeros too.
        seeds: one run each; a seed decides the head's weights, the order of the data and dropout.
        lr: peak learning rate.
        epochs: passes over the training set; not necessarily whole.
        batch_size: examples (SQuAD: windows) per optimizer step.
        batch_size_eval: examples per forward of an evaluation.
        max_length: longest input, in word pieces; a longer sentence is cut, a SQuAD context
            becomes several windows.
        warmup_ratio: share of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        gradient_clip_val: largest norm of the gradient.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        doc_stride: SQuAD: word pieces between the beginnings of two windows.
        max_query_length: SQuAD: word pieces of a question that are read.
        n_best_size: SQuAD: best starts and ends of a window that are paired.
        max_answer_length: SQuAD: word pieces of an answer.
        save: True: write each fine-tuned model to ``<run>/seed<k>/model``.
        progress_bar: draw one, in a terminal.
    """

    task: str
    init_from: str
    data: str = "hub"
    tokenizer: Optional[str] = None  # noqa: UP045 - OmegaConf reads it, on Python 3.10 too
    name: Optional[str] = None  # noqa: UP045
    root: str = "."
    dense: bool = False
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    lr: float = 3e-5
    epochs: float = 3
    batch_size: int = 16
    batch_size_eval: int = 32
    max_length: int = 128
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    gradient_clip_val: float = 1.0
    precision: str = "32-true"
    accelerator: str = "auto"
    doc_stride: int = 128
    max_query_length: int = 64
    n_best_size: int = 20
    max_answer_length: int = 30
    save: bool = False
    progress_bar: bool = True

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.root) / "logs" / (self.name or f"finetune-{self.task.replace('/', '-')}")

    def unfinished(self) -> list[int]:
        """The seeds that have no result yet."""
        return [s for s in self.seeds if not (self.directory / f"seed{s}" / RESULT).is_file()]


def settings(overrides: Sequence[str]) -> Settings:
    """Read ``key=value`` arguments.

    Raises:
        ValueError: for a key, a task or a value that cannot be, or if one that is needed is
            missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [field.name for field in fields(Settings)]
    typed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form key=value.")
        if key not in known:
            near = did_you_mean(key, known, "{}=")
            raise ValueError(f"{override!r}: unknown key{near} Keys: {', '.join(known)}.")
        typed[key] = value
    task = typed.get("task")
    for key, example in (("task", "glue/sst2"), ("init_from", "checkpoints/my-run")):
        if not typed.get(key):
            raise ValueError(f"{key} must be given; add for example {key}={example}.")
    if task not in TASKS:
        raise ValueError(
            f"task={task} is unknown{did_you_mean(str(task), TASKS, 'task={}')} "
            f"Tasks: {', '.join(TASKS)}."
        )
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Settings), _recipe(task), OmegaConf.from_dotlist(list(overrides))
        )
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]
        kind = _KINDS[key]
        raise ValueError(
            f"{key}={typed.get(key, '')} must be {kind}, for example {key}={_show(_DEFAULTS[key])}."
        ) from error
    assert isinstance(found, Settings)
    _check(found)
    return found


_DEFAULTS = {field.name: getattr(Settings("squad", ""), field.name) for field in fields(Settings)}
_KINDS = {
    name: {bool: "True or False", int: "a whole number", float: "a number", list: "a list of "
           "whole numbers"}.get(type(value), "a text")
    for name, value in _DEFAULTS.items()
}  # fmt: skip


def _show(value: Any) -> str:
    return str(value).replace(" ", "")


def _recipe(task: str) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    recipes = OmegaConf.to_container(OmegaConf.load(_RECIPES))
    assert isinstance(recipes, dict)
    names = ("all", task.partition("/")[0], task)
    return {key: value for name in names for key, value in recipes.get(name, {}).items()}


def _check(found: Settings) -> None:
    for key, (least, allowed) in _RANGES.items():
        value = getattr(found, key)
        if not (math.isfinite(value) and (value > least or (allowed and value == least))):
            bound = "at least" if allowed else "above"
            raise ValueError(f"{key}={value} must be {bound} {least}, and finite.")
    if found.name is not None and not {"", ".", ".."}.isdisjoint(found.name.split("/")):
        raise ValueError(f"name={found.name!r} must be a folder inside logs, for example my-run.")
    if found.warmup_ratio > 1:
        raise ValueError(f"warmup_ratio={found.warmup_ratio} must be at most 1.")
    for key, allowed_values in (("precision", PRECISIONS), ("accelerator", ACCELERATORS)):
        if getattr(found, key) not in allowed_values:
            raise ValueError(
                f"{key}={getattr(found, key)!r} must be one of {', '.join(allowed_values)}."
            )
    if not found.seeds or len(set(found.seeds)) < len(found.seeds) or min(found.seeds) < 0:
        raise ValueError(f"seeds={found.seeds} must be different numbers from 0 on, as [0,1,2].")
    if found.task == "squad" and found.max_length < found.max_query_length + 4:
        raise ValueError(
            f"max_length={found.max_length} leaves no room for a context beside a question of "
            f"max_query_length={found.max_query_length} and 3 special tokens; set a smaller one."
        )
