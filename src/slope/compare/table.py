"""The tables of a comparison: one CSV row per run, one per method, and Markdown for readers."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from slope.compare.plan import Comparison
from slope.compare.results import MethodResult, RunResult, Spread

RUNS, METHODS, MARKDOWN = "comparison.csv", "methods.csv", "comparison.md"

_RUN_COLUMNS = tuple(
    field.name for field in fields(RunResult) if field.name not in ("scores", "curve")
)
_METHOD_COLUMNS = (
    "method",
    "about",
    "finished",
    "diverged",
    "failed",
    "val_loss_mean",
    "val_loss_std",
    "difference_mean",
    "difference_stderr",
    "val_perplexity_mean",
    "val_perplexity_std",
    "step_ms",
    "step_ratio",
    "peak_memory_bytes",
    "optimizer_state_bytes",
    "parameters_stored",
)


def write(comparison: Comparison, results: Sequence[MethodResult]) -> list[Path]:
    """Write ``comparison.csv`` (runs), ``methods.csv`` and ``comparison.md``; their paths."""
    texts = {
        RUNS: runs_csv(results),
        METHODS: methods_csv(results),
        MARKDOWN: markdown(comparison, results),
    }
    for name, text in texts.items():
        replace(comparison.directory / name, text)
    return [comparison.directory / name for name in texts]


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def runs_csv(results: Sequence[MethodResult]) -> str:
    """One row per run; the curve is in the run's own ``metrics.csv``."""
    runs, scores = [run for result in results for run in result.runs], _scores(results)
    rows = (
        [*(getattr(run, name) for name in _RUN_COLUMNS), *map(run.scores.get, scores)]
        for run in runs
    )
    return _csv((*_RUN_COLUMNS, *scores), rows)


def methods_csv(results: Sequence[MethodResult]) -> str:
    """One row per method."""
    scores = _scores(results)
    names = (f"{name}_{what}" for name in scores for what in ("mean", "std"))
    rows = (
        [*_method_row(r), *(x for name in scores for x in r.scores.get(name, (None, None)))]
        for r in results
    )
    return _csv((*_METHOD_COLUMNS, *names), rows)


def _scores(results: Iterable[MethodResult]) -> list[str]:
    """Columns and tasks that were fine-tuned, in the order of the comparison."""
    return list(dict.fromkeys(name for result in results for name in result.scores))


def _method_row(result: MethodResult) -> list[Any]:
    loss, difference, perplexity = (
        pair or (None, None) for pair in (result.val_loss, result.difference, result.val_perplexity)
    )
    return [
        result.method.label,
        result.method.about,
        *(len(result.having(status)) for status in ("finished", "diverged", "failed")),
        *loss,
        *difference,
        *perplexity,
        result.step_ms,
        result.step_ratio,
        result.peak_memory_bytes,
        result.optimizer_state_bytes,
        result.parameters_stored,
    ]


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def document(comparison: Comparison, results: Sequence[MethodResult]) -> dict[str, Any]:
    """All of it for a program: each method with its numbers and its runs, their curves left out."""
    folders = {(run.method, run.seed): str(run.log_dir) for run in comparison.runs}
    return {
        "comparison": comparison.name,
        "baseline": comparison.baseline,
        "reference": comparison.reference,
        "seeds": list(comparison.seeds),
        "methods": [
            {
                **dict(zip(_METHOD_COLUMNS, _method_row(result), strict=True)),
                "scores": {k: dict(v._asdict()) for k, v in result.scores.items()},
                "published": dict(result.method.published),
                "runs": [
                    {
                        **{name: getattr(run, name) for name in _RUN_COLUMNS if name != "method"},
                        "scores": dict(run.scores),
                        "log_dir": folders[run.method, run.seed],
                    }
                    for run in result.runs
                ],
            }
            for result in results
        ],
    }


def markdown(comparison: Comparison, results: Sequence[MethodResult]) -> str:
    """The table for readers, with what was run and what the columns mean."""
    baseline = comparison.baseline
    head = (
        "method",
        "what it is",
        "validation loss",
        f"over {baseline}",
        "perplexity",
        "step, ms",
        f"step / {baseline}",
        "peak memory, MB",
        "optimizer state, MB",
        "parameters stored",
        "diverged",
    )
    lines = [
        f"# Comparison {comparison.name}",
        "",
        f"{_count(results)} of {len(comparison.runs)} runs ended: {len(comparison.methods)} "
        f"methods, seeds {', '.join(map(str, comparison.seeds))}. {_what_a_run_is(comparison)} "
        "A seed has the same data order and the same initial weights in every method.",
        "",
        _markdown_line(head),
        _markdown_line(["---", "---", *["---:"] * (len(head) - 2)]),
        *(_markdown_line(_markdown_row(result)) for result in results),
        "",
        "Validation loss (nats per token) and perplexity: mean ± standard deviation over the "
        "seeds that did not diverge. "
        f"Over {baseline}: mean of the differences to {baseline} of the same seed ± standard error "
        "of that mean. Step: median over the logged optimizer steps, validation and saving left "
        "out, with as many runs at once as env.json says. Peak memory: of the whole process, "
        "Python and torch included. Parameters stored: adapters included.",
    ]
    if comparison.columns:
        lines += ["", "## Fine-tuned", "", *_fine_tuned(comparison, results)]
    failed = [run for result in results for run in result.having("failed")]
    if failed:
        lines += ["", "Failed, and left out above:", ""]
        lines += [f"- {run.method} seed {run.seed}: {run.message}" for run in failed]
    return "\n".join(lines) + "\n"


def _fine_tuned(comparison: Comparison, results: Sequence[MethodResult]) -> list[str]:
    """The table of scores, as papers print it: a column each, with what was published beside it."""
    columns = comparison.columns
    tasks = [task for column in columns if len(column.tasks) > 1 for task in column.tasks]
    published = [c.label for c in columns if any(c.label in r.method.published for r in results)]
    head, rows = ["method", "what it is"], [[r.method.label, r.method.about] for r in results]
    for name in [*(column.label for column in columns), *tasks]:
        head.append(name)
        for row, result in zip(rows, results, strict=True):
            row.append(_plus_minus(result.scores.get(name), ".2f"))
        if name in published:
            head.append(f"{name}, published")
            for row, result in zip(rows, results, strict=True):
                row.append(_number(result.method.published.get(name)))
    means = "; ".join(
        f"{column.label} is the score of {column.tasks[0]}"
        if len(column.tasks) == 1
        else f"{column.label} is the mean over {len(column.tasks)} tasks"
        for column in columns
    )
    seeds = {chosen.task: chosen.seeds for chosen in comparison.runs[0].fine_tunings}
    how_many = "; ".join(f"{task} {', '.join(map(str, own))}" for task, own in seeds.items())
    return [
        _markdown_line(head),
        _markdown_line(["---", "---", *["---:"] * (len(head) - 2)]),
        *map(_markdown_line, rows),
        "",
        f"Percent, by `slope finetune` from the checkpoint of each run, zeros kept. {means}. A "
        "score is the mean over the seeds of fine-tuning, which decide the head, the order of the "
        f"examples and dropout ({how_many}); ± is the standard deviation over the seeds of the "
        "comparison. Each run's folder has the tables of its tasks.",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _what_a_run_is(comparison: Comparison) -> str:
    cfg = comparison.runs[0].cfg
    tokens = int(cfg.train.global_batch_size) * int(cfg.datamodule.max_length)
    by_method = {run.method: run.steps for run in comparison.runs}
    steps = max(by_method.values())
    fewer = ", ".join(f"{label} {n:,}" for label, n in by_method.items() if n < steps)
    but = f" (fewer steps: {fewer})" if fewer else ""
    return (
        f"Each run: {cfg.model.family}, data set {cfg.datamodule.dataset}, tokenizer "
        f"{cfg.datamodule.tokenizer}, {steps:,} optimizer steps of {tokens:,} tokens = "
        f"{steps * tokens:,} tokens{but}."
    )


def _count(results: Sequence[MethodResult]) -> int:
    return sum(len(result.having(s)) for result in results for s in ("finished", "diverged"))


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _markdown_row(result: MethodResult) -> list[str]:
    return [
        result.method.label,
        result.method.about,
        *_numbers(result),
        _megabytes(result.peak_memory_bytes),
        _megabytes(result.optimizer_state_bytes),
        "–" if result.parameters_stored is None else f"{result.parameters_stored:,.0f}",
        _diverged(result),
    ]


def _numbers(result: MethodResult) -> list[str]:
    return [
        _plus_minus(result.val_loss, ".4f"),
        _plus_minus(result.difference, "+.4f"),
        _plus_minus(result.val_perplexity, ".2f"),
        "–" if result.step_ms is None else f"{result.step_ms:.1f}",
        "–" if result.step_ratio is None else f"{result.step_ratio:.2f}",
    ]


def _plus_minus(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "–"
    mean = f"{spread.mean:{form}}"
    if spread.deviation is None:
        return mean
    return f"{mean} ± {spread.deviation:{form.lstrip('+')}}"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:.0f}"


def _diverged(result: MethodResult) -> str:
    runs = result.having("diverged")
    if not runs:
        return "–"
    steps = ", ".join(str(run.diverged_at_step) for run in runs)
    return f"{len(runs)} of {len(result.runs)}, at step {steps}"


def console_table(comparison: Comparison, results: Sequence[MethodResult]) -> Table:
    """What is printed at the end, methods in order of their loss.

    It is made for 80 columns: where it would be wider, cells are wrapped and lose no digit.
    """
    table = Table(title=comparison.name, box=SIMPLE, pad_edge=False, collapse_padding=True)
    columns = [column.label for column in comparison.columns]
    table.add_column("method", overflow="fold")
    for head in ("val loss", f"over {comparison.baseline}"):
        table.add_column(head, justify="right", overflow="fold")
    for head in ("perplexity", "step ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in columns:
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("runs", overflow="fold")
    infinite = float("inf")
    for result in sorted(results, key=lambda r: r.val_loss.mean if r.val_loss else infinite):
        loss, difference, perplexity, step_ms, _ = _numbers(result)
        perplexity = perplexity.partition(" ")[0]
        runs = f"{len(result.having('finished'))}/{len(result.runs)}"
        if result.having("diverged"):
            steps = ", ".join(str(run.diverged_at_step) for run in result.having("diverged"))
            runs += f", diverged at step {steps}"
        scores = [_plus_minus(result.scores.get(name), ".2f") for name in columns]
        table.add_row(result.method.label, loss, difference, perplexity, step_ms, *scores, runs)
    return table


def add_session(path: Path, session: dict[str, Any]) -> None:
    """Add where and how some of the runs were done to ``env.json``, a list of such entries."""
    sessions = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    replace(path, json.dumps([*sessions, session], indent=2, ensure_ascii=False) + "\n")
