"""Zero-shot tasks by lm-eval, on a model that is in memory, sparse or dense."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slope.evaluation.table import Measurement
from slope.spelling import did_you_mean

PAPER = (
    "mmlu", "arc_challenge", "openbookqa", "winogrande", "hellaswag", "mathqa", "piqa", "race",
)  # fmt: skip
"""The tasks of the paper's tables, by lm-eval's names."""

Tasks = Mapping[str, Mapping[str, Any]]
"""Names of the tasks and groups whose numbers are wanted; what lm-eval loaded of each."""


@dataclass(frozen=True)
class TaskScore:
    """What a model made of a task.

    Attributes:
        name: of the task or group.
        measured: one entry per metric.
        counting: on how many examples, and how they were asked, in words.
    """

    name: str
    measured: list[Measurement]
    counting: str


def task_names(given: Sequence[str]) -> list[str]:
    """The names with ``paper`` spelt out, checked as far as it goes without lm-eval.

    Raises:
        FileNotFoundError: if a task file is missing.
        ValueError: if a name or file is given twice.

    Example:
        >>> task_names(["boolq", "paper"])[:3]
        ['boolq', 'mmlu', 'arc_challenge']
    """
    names = [each for name in given for each in (PAPER if name == "paper" else (name,))]
    for name in names:
        if _is_file(name) and not Path(name).is_file():
            raise FileNotFoundError(f"no task file '{name}'; give an existing one, or a name.")
    _check_once([str(Path(name).resolve()) if _is_file(name) else name for name in names], names)
    return names


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
    wanted = task_names(names)
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'tasks need lm-eval, which is not installed; type: pip install "slope-llm[eval]"'
        ) from error

    with _quiet():
        # The names of lm-eval are read from thousands of files.
        manager = TaskManager(include_defaults=not all(map(_is_file, wanted)))
        for name in wanted:
            if not _is_file(name) and name not in manager.all_tasks:
                raise ValueError(_unknown(name, manager.all_tasks))
        loaded = [one for name in wanted for one in _load(manager, name).items()]
    found = [name for name, _ in loaded]
    _check_once(found, found)
    return dict(loaded)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    label: str,
    *,
    fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
) -> Iterator[TaskScore]:
    """Do the tasks, one after the other.

    Args:
        model: causal language model of `transformers`; dense, or sparsified and in memory.
        tokenizer: of `transformers`.
        tasks: from :func:`load_tasks`.
        label: name of the model in the results.
        fewshot: solved examples before each question; a task file that says 0 keeps it.
        limit: only the first examples of each task; None: all.
        batch_size: requests at once.

    Raises:
        ValueError: if a task cannot be done with this model or these options.
    """
    with _quiet():
        from slope.evaluation.harness import CountingLM

    for name, parts in tasks.items():
        with _quiet():
            lm = CountingLM(model, tokenizer, batch_size)
            results = _evaluate(lm, name, parts, fewshot, limit)
        leaves = list(parts["tasks"])
        shots = sorted({results["n-shot"][leaf] or 0 for leaf in leaves})
        samples = [results["n-samples"][leaf] for leaf in leaves]
        measured = _measurements(label, name, results, shots[0] if len(shots) == 1 else None)
        yield TaskScore(name, measured, _counting(samples, shots, limit, lm))


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _check_once(keys: Sequence[str], names: Sequence[str]) -> None:
    for key, name in zip(keys, names, strict=True):
        if keys.count(key) > 1:
            raise ValueError(f"task {name!r} is given {keys.count(key)} times; give it once.")


def _unknown(name: str, known: Sequence[str]) -> str:
    return (
        f"unknown task {name!r}{did_you_mean(name, known)} Give a name of lm-eval (`lm-eval ls "
        "tasks` lists them), the path of a task file ending in .yaml, or paper for "
        f"{', '.join(PAPER)}."
    )


def _load(manager: Any, name: str) -> dict[str, Mapping[str, Any]]:
    """A task or group by its own name; of a name that stands for several tasks, each of them."""
    try:
        parts = manager.load([name])
    except Exception as error:  # whatever YAML, datasets, its download and lm-eval raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _is_file(name):
            raise ValueError(
                f"task file '{name}' cannot be used ({type(error).__name__}: {reason}); paths in "
                "it are relative to the folder that you are in."
            ) from error
        raise RuntimeError(
            f"the examples of task {name!r} cannot be had ({type(error).__name__}: {reason}); they "
            "come from the Hugging Face hub. Without it, give a task file with local data: "
            "--tasks my_task.yaml."
        ) from error
    if parts["groups"]:
        return {next(iter(parts["groups"])): parts}  # the first group holds the others
    return {task: {"tasks": {task: loaded}} for task, loaded in parts["tasks"].items()}


def _evaluate(
    lm: Any, name: str, parts: Mapping[str, Any], fewshot: int, limit: int | None
) -> dict[str, Any]:
    """What lm-eval's ``simple_evaluate`` does, less the questions to git and the machine."""
    import torch
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in parts["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            # A 0 would be taken for the file's own, and hold for the next call as well.
            task.set_config("num_fewshot", fewshot or None)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    try:
        results: Any = evaluate(lm=lm, task_dict=parts, limit=limit, log_samples=False)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"task {name!r} cannot be done: {error}") from error
    return dict(results)


def _measurements(
    label: str, name: str, results: Mapping[str, Any], fewshot: int | None
) -> list[Measurement]:
    numbers = results["results"][name]
    count = results["n-samples"].get(name, {}).get("effective")
    measured = []
    for key, value in numbers.items():
        metric, _, of = key.partition(",")
        if not of or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{of}")
        stderr = float(error) if isinstance(error, (int, float)) else None
        shown = metric if of == "none" else f"{metric} ({of})"
        measured.append(
            Measurement(label, name, shown, float(value), stderr, count, fewshot=fewshot)
        )
    return measured


def _counting(
    samples: Sequence[Mapping[str, int]], shots: Sequence[int], limit: int | None, lm: Any
) -> str:
    """How many examples were asked, after how many solved ones, and what did not fit."""
    from lm_eval import __version__

    done, there = (sum(one[key] for one in samples) for key in ("effective", "original"))
    text = f"{done:,} example{'s' if done > 1 else ''}"
    if done < there:
        text = f"{done:,} of {there:,} examples (the first {limit:,} of each task)"
    text += f", {'-, '.join(map(str, shots))}-shot, by lm-eval {__version__}"
    if lm.cut:
        text += (
            f"; {lm.cut:,} of {lm.asked:,} requests were longer than the context of "
            f"{lm.max_length:,} tokens and lost their beginning"
        )
    return f"{text}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Of the libraries only errors; no progress bars where nobody watches them."""
    loggers = [*map(logging.getLogger, ("lm_eval", "transformers", "huggingface_hub"))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with _no_bars():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Unless standard error is a terminal: lm-eval has an option for some of its bars only."""
    from tqdm import tqdm

    draw: Any = tqdm.__init__

    def hide(self: Any, *args: Any, **options: Any) -> None:
        draw(self, *args, **options | {"disable": True})

    if not sys.stderr.isatty():
        tqdm.__init__ = hide
    try:
        yield
    finally:
        tqdm.__init__ = draw
