"""What the runs of a comparison left, and the numbers of each method over its seeds.

Read from ``summary.json``, ``metrics.csv`` and ``outcome.json`` alone, so that a comparison that
was stopped is summed up like a complete one.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from slope.compare.columns import Column, column_scores, task_scores
from slope.compare.plan import Comparison, Method, Run, read_outcome


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        method: label.
        seed: its seed.
        status: ``finished``, ``diverged``, ``failed``, ``begun`` or ``new``.
        message: why it failed, or where it diverged; "" otherwise.
        diverged_at_step: the optimizer step, counted from 1.
        val_loss: last validation loss, nats per token.
        val_perplexity: its exponential.
        step_ms: median time of an optimizer step, validation and saving left out.
        peak_memory_bytes: of the run's process.
        optimizer_state_bytes: of the optimizer's tensors.
        parameters_stored: trainable numbers that the model keeps, adapters among them.
        scores: of its fine-tunings in percent, by column and by task; each is the mean over the
            seeds of fine-tuning.
        curve: (optimizer step, validation loss) in order of step.
    """

    method: str
    seed: int
    status: str
    message: str = ""
    diverged_at_step: int | None = None
    val_loss: float | None = None
    val_perplexity: float | None = None
    step_ms: float | None = None
    peak_memory_bytes: int | None = None
    optimizer_state_bytes: int | None = None
    parameters_stored: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()


class Spread(NamedTuple):
    """A mean over seeds; ``deviation`` is None where there is one seed only, or one is infinite."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class MethodResult:
    """One method over its seeds; a number is None where nothing was measured.

    Attributes:
        method: label, and what it is.
        runs: its runs, in order of seed, those that were never begun left out.
        val_loss: mean and standard deviation over the finished runs.
        val_perplexity: likewise.
        difference: mean over seeds of loss minus the baseline's loss of the same seed, and the
            standard error of that mean.
        step_ms: median over the finished runs.
        step_ratio: that over the baseline's.
        peak_memory_bytes: median over the finished runs.
        optimizer_state_bytes: likewise.
        parameters_stored: likewise.
        scores: of fine-tuning, mean and standard deviation over the finished runs.
    """

    method: Method
    runs: tuple[RunResult, ...]
    val_loss: Spread | None
    val_perplexity: Spread | None
    difference: Spread | None
    step_ms: float | None
    step_ratio: float | None
    peak_memory_bytes: int | None
    optimizer_state_bytes: int | None
    parameters_stored: int | None
    scores: Mapping[str, Spread]

    def having(self, status: str) -> list[RunResult]:
        """The runs of one status."""
        return [run for run in self.runs if run.status == status]


def read(comparison: Comparison) -> list[MethodResult]:
    """The results so far, one per method that has a run, in the order of the comparison."""
    runs = [read_run(run, comparison.columns) for run in comparison.runs]
    return summarise(list(comparison.methods.values()), runs, comparison.baseline)


def read_run(run: Run, columns: Sequence[Column] = ()) -> RunResult:
    """What one run left.

    Args:
        run: of a comparison.
        columns: what it is fine-tuned on.
    """
    status, outcome = run.state(), read_outcome(run.log_dir)
    curve, step_ms = read_metrics(run.log_dir / "metrics.csv")
    if status != "finished":
        return RunResult(
            run.method,
            run.seed,
            status,
            message=str(outcome["message"]) if outcome else "",
            diverged_at_step=outcome.get("step") if outcome else None,
            curve=curve,
        )
    summary, by_task = run.summary(), task_scores(run.fine_tunings)
    loss = float(summary["val_loss"])
    if not math.isfinite(loss):
        message = f"validation loss is {loss}"
        return RunResult(run.method, run.seed, "diverged", message, summary["steps"], curve=curve)
    return RunResult(
        run.method,
        run.seed,
        status,
        val_loss=loss,
        val_perplexity=float(summary["val_perplexity"]),
        step_ms=step_ms,
        peak_memory_bytes=summary["peak_memory_bytes"],
        optimizer_state_bytes=summary["optimizer_state_bytes"],
        parameters_stored=summary["parameters_stored"],
        scores=column_scores(columns, by_task) | by_task,
        curve=curve,
    )


def read_metrics(path: Path) -> tuple[tuple[tuple[int, float], ...], float | None]:
    """The validation curve, and the median of milliseconds per optimizer step over the rows."""
    if not path.is_file():
        return (), None
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
    curve = [(int(row["step"]), float(row["val/loss"])) for row in rows if row.get("val/loss")]
    times = [
        1000 * int(row["tokens"]) / int(row["step"]) / float(row["tokens_per_second"])
        for row in rows
        if row.get("tokens_per_second")
    ]
    return tuple(curve), statistics.median(times) if times else None


def summarise(
    methods: Sequence[Method], runs: Sequence[RunResult], baseline: str
) -> list[MethodResult]:
    """Numbers of each method over its seeds; methods without a run are left out.

    Args:
        methods: in the order wanted.
        runs: in any order.
        baseline: label of the method that losses and times are measured against.
    """
    finished = {(run.method, run.seed): run for run in runs if run.status == "finished"}
    base_time = _median([run.step_ms for key, run in finished.items() if key[0] == baseline])
    results = []
    for method in methods:
        begun = [run for run in runs if run.method == method.label and run.status != "new"]
        if not begun:
            continue
        begun.sort(key=lambda run: run.seed)
        own = [run for run in begun if run.status == "finished"]
        differences = [
            run.val_loss - base.val_loss
            for run in own
            if method.label != baseline
            and (base := finished.get((baseline, run.seed))) is not None
            and run.val_loss is not None
            and base.val_loss is not None
        ]
        step_ms = _median([run.step_ms for run in own])
        results.append(
            MethodResult(
                method,
                tuple(begun),
                val_loss=_spread([run.val_loss for run in own]),
                val_perplexity=_spread([run.val_perplexity for run in own]),
                difference=_with_standard_error(differences),
                step_ms=step_ms,
                step_ratio=step_ms / base_time if step_ms and base_time else None,
                peak_memory_bytes=_middle([run.peak_memory_bytes for run in own]),
                optimizer_state_bytes=_middle([run.optimizer_state_bytes for run in own]),
                parameters_stored=_middle([run.parameters_stored for run in own]),
                scores=_scores(own),
            )
        )
    return results


def _scores(runs: Sequence[RunResult]) -> dict[str, Spread]:
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        spread = _spread([run.scores.get(name) for run in runs])
        if spread is not None:
            found[name] = spread
    return found


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    # A perplexity may be infinite, of which `statistics` makes an AttributeError.
    several = len(known) > 1 and all(map(math.isfinite, known))
    return Spread(statistics.fmean(known), statistics.stdev(known) if several else None)


def _with_standard_error(values: Sequence[float]) -> Spread | None:
    spread = _spread(values)
    if spread is None or spread.deviation is None:
        return spread
    return Spread(spread.mean, spread.deviation / math.sqrt(len(values)))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _middle(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return statistics.median_low(known) if known else None
