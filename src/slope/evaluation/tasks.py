"""Zero-shot tasks by lm-eval, on a model that is in memory, sparse or dense."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope import configs
from slope.evaluation.table import Measurement

PAPER = (
    "mmlu", "arc_challenge", "openbookqa", "winogrande", "hellaswag", "mathqa", "piqa", "race",
)  # fmt: skip
"""The tasks of the paper's tables, by lm-eval's names."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their examples.

    Attributes:
        names: of the tasks and groups whose numbers are wanted.
        loaded: lm-eval's objects.
        manager: that loaded them; without one, lm-eval reads the names of all tasks once more.
    """

    names: tuple[str, ...]
    loaded: tuple[Any, ...]
    manager: Any


def load_tasks(names: Sequence[str]) -> Tasks:
    """Find the tasks and load their examples.

    Args:
        names: names of lm-eval, whose data come from the Hugging Face hub; paths of task files
            (YAML), whose data may be local; ``paper`` for :data:`PAPER`.

    Raises:
        FileNotFoundError: if a task file is missing.
        ValueError: if a name is unknown or given twice, or a task file is wrong.
        RuntimeError: if lm-eval is not installed, or the examples cannot be had.
    """
    wanted = [each for name in names for each in (PAPER if name == "paper" else (name,))]
    files = {name for name in wanted if Path(name).suffix in (".yaml", ".yml")}
    for name in sorted(files):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no task file '{name}'; give an existing one, or a name.")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'tasks need lm-eval, which is not installed; type: pip install "slope-llm[eval]"'
        ) from error

    found: list[str] = []
    loaded: list[Any] = []
    with _quiet():
        # The names of lm-eval are read from thousands of files.
        manager = TaskManager(include_defaults=any(name not in files for name in wanted))
        for name in wanted:
            if name not in files and name not in manager.all_tasks:
                near = configs.nearest(name, manager.all_tasks)
                raise ValueError(
                    f"unknown task {name!r}; did you mean {near!r}? Give a name of lm-eval "
                    "(`lm-eval ls tasks` lists them), the path of a task file ending in .yaml, or "
                    f"paper for {', '.join(PAPER)}."
                )
        for name in wanted:
            parts = _load(manager, name, name in files)
            members = list(parts["groups"].values())[:1] or list(parts["tasks"].values())
            loaded += members
            found += list(parts["groups"])[:1] or list(parts["tasks"])
    for name in found:
        if found.count(name) > 1:
            raise ValueError(f"task {name!r} is given {found.count(name)} times; give it once.")
    return Tasks(tuple(found), tuple(loaded), manager)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    label: str,
    *,
    fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[Measurement]:
    """Do the tasks.

    Args:
        model: causal language model of `transformers`; dense, or sparsified and in memory.
        tokenizer: of `transformers`.
        tasks: from :func:`load_tasks`.
        label: name of the model in the results.
        fewshot: solved examples before each question; a task file with a number of its own wins.
        limit: only the first examples of each task; None: all.
        batch_size: requests at once.

    Returns:
        One entry per metric of each task, in the order of the tasks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        results: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.loaded),
            task_manager=tasks.manager,
            num_fewshot=fewshot,
            limit=limit,
            log_samples=False,
        )
    measured = []
    for name in tasks.names:
        numbers = results["results"][name]
        count = results.get("n-samples", {}).get(name, {}).get("effective")
        for key, value in numbers.items():
            metric, _, of = key.partition(",")
            if not of or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = numbers.get(f"{metric}_stderr,{of}")
            stderr = float(error) if isinstance(error, (int, float)) else None
            shown = metric if of == "none" else f"{metric} ({of})"
            measured.append(Measurement(label, name, shown, float(value), stderr, count))
    return measured


def _load(manager: Any, name: str, is_file: bool) -> dict[str, Any]:
    try:
        parts: dict[str, Any] = manager.load([name])
    except Exception as error:  # whatever YAML, datasets, its download and lm-eval raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_file:
            raise ValueError(
                f"task file '{name}' cannot be used ({type(error).__name__}: {reason}); paths in "
                "it are relative to the folder that you are in."
            ) from error
        raise RuntimeError(
            f"the examples of task {name!r} cannot be had ({type(error).__name__}: {reason}); they "
            "come from the Hugging Face hub. Without it, give a task file with local data: "
            "--tasks my_task.yaml."
        ) from error
    return parts


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from lm-eval's log, only errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
