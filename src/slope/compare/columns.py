"""Columns of the table that fine-tuning gives: tasks learned from the checkpoint of every run.

In the section ``compare`` of an experiment::

    finetune:
      SQuAD:
        tasks: [squad]
        data: squad             # folder with the official files, or hub
        settings: {seeds: [0]}  # more of `slope finetune`; may be left out
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from slope.finetune import Settings, results, settings

_OURS = ("task", "init_from", "data", "name", "root", "accelerator", "progress_bar")
_KEYS = ("tasks", "data", "settings")


@dataclass(frozen=True)
class Column:
    """A column: the mean of the scores of its tasks.

    Attributes:
        label: its head.
        tasks: of ``slope finetune``.
        data: folder with their official files, or ``hub``.
        settings: further ones of ``slope finetune``.
    """

    label: str
    tasks: tuple[str, ...]
    data: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def read(section: Any) -> tuple[Column, ...]:
    """The columns of ``compare.finetune``; none where it is null.

    Raises:
        ValueError: for what is no column, or a setting that is the comparison's to choose.
    """
    if section is None:
        return ()
    where = "compare.finetune"
    if not isinstance(section, dict):
        raise ValueError(
            f"{where}={section!r} must be a section, for example {{SQuAD: {{tasks: [squad], data: "
            "hub}}."
        )
    found = [_column(f"{where}.{label}", str(label), own) for label, own in section.items()]
    tasks = [task for column in found for task in column.tasks]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"{where} has {', '.join(twice)} in more than one column; choose one.")
    return tuple(found)


def _column(where: str, label: str, own: Any) -> Column:
    if not isinstance(own, dict) or not {"tasks", "data"} <= own.keys() <= set(_KEYS):
        raise ValueError(
            f"{where}={own!r} must have tasks and data, and may have settings, for example "
            "{tasks: [squad], data: hub}."
        )
    tasks, more = own["tasks"], own.get("settings", {})
    texts = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
    if not texts or not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"{where}.tasks={tasks!r} must name different tasks, for example [squad].")
    if not isinstance(more, dict):
        raise ValueError(
            f"{where}.settings={more!r} must be a section, for example {{epochs: 2, seeds: [0]}}."
        )
    for key in more:
        if key in _OURS:
            raise ValueError(
                f"{where}.settings sets {key}, which follows from the comparison; leave it out"
                f"{f' and set {where}.data' if key == 'data' else ''}."
            )
    return Column(label, tuple(tasks), str(own["data"]), more)


def fine_tunings(columns: Iterable[Column], cfg: DictConfig, name: str) -> tuple[Settings, ...]:
    """What is fine-tuned from the checkpoint of a run, in the order of the columns.

    Args:
        columns: of the comparison.
        cfg: the run's resolved configuration.
        name: of the run's folder under ``logs``.

    Raises:
        ValueError: if a setting is wrong, or the model cannot be fine-tuned so.
    """
    found = []
    for column in columns:
        where = f"compare.finetune.{column.label}"
        if cfg.model.family != "bert":
            raise ValueError(
                f"{where} needs a BERT, and model.family is {cfg.model.family}; take "
                "the section out: type ~compare.finetune."
            )
        wanted = str(cfg.trainer.accelerator)
        positions = int(cfg.model.config.max_position_embeddings)
        for task in column.tasks:
            try:
                chosen = settings(
                    [
                        *(f"{key}={json.dumps(value)}" for key, value in column.settings.items()),
                        f"task={task}",
                        f"data={column.data}",
                        f"init_from={cfg.paths.checkpoint_dir}",
                        f"name={name}/finetune-{task.replace('/', '-')}",
                        f"root={cfg.paths.root}",
                        f"accelerator={'cuda' if wanted == 'gpu' else wanted}",
                        "progress_bar=false",
                    ]
                )
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if chosen.max_length > positions:
                raise ValueError(
                    f"{where}: max_length={chosen.max_length} of {task} is longer than the "
                    f"model's {positions} positions; add max_length={positions} to "
                    f"{where}.settings."
                )
            found.append(chosen)
    return tuple(found)


def task_scores(fine_tunings: Sequence[Settings]) -> dict[str, float]:
    """Score of each task of a run in percent, mean over the seeds of fine-tuning.

    Args:
        fine_tunings: those of the run; what is not finished is left out.
    """
    return {
        chosen.task: statistics.fmean(
            result["score"] for result in results(chosen) if result["seed"] in chosen.seeds
        )
        for chosen in fine_tunings
        if not chosen.unfinished()
    }


def column_scores(columns: Sequence[Column], by_task: Mapping[str, float]) -> dict[str, float]:
    """Score of each column, the mean over its tasks, where all of them are there."""
    return {
        column.label: statistics.fmean(by_task[task] for task in column.tasks)
        for column in columns
        if by_task.keys() >= set(column.tasks)
    }
