"""Copy what the runs wrote beside this file and make its tables: ``python collect.py RUNS``.

RUNS is the folder with ``logs`` in which the commands of README.md were run.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PHASES = {  # model -> runs of phase 1 and phase 2
    "dense": ("bert-demo-dense", "bert-demo2-dense"),
    "2:4 SLoPe": ("bert-demo", "bert-demo2"),
}
STARTS = {"dense": "demo2-dense", "2:4 SLoPe": "demo2", "untrained": "untrained"}
TRIALS = {  # dense, phase 1, 1,024 tokens per step, in the order of the runs
    "eB": "AdamW, rate 1e-3",
    "eA": "LAMB, rate 6e-3",
    "eC": "LAMB, rate 1e-2",
    "eD": "LAMB, rate 6e-3, initializer_range 0.08",
}
TASKS = {"sst2": ("accuracy",), "squad": ("exact_match", "f1")}
COMPARISONS = ("table_ranks_small", "table_mixed_small", "table_modules_small")


def copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those of the files that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """``name.csv`` with all digits, ``name.md`` rounded."""
    columns = list(rows[0])
    with open(HERE / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        lines.append([_cell(value) for value in row.values()])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (HERE / f"{name}.md").write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def pretraining(logs: Path) -> list[dict[str, Any]]:
    """A row per phase and model."""
    rows = []
    for phase in (0, 1):
        dense = None
        for model, runs in PHASES.items():
            run = runs[phase]
            files = ["config.yaml", "metrics.csv", "summary.json", "report.txt", "run.log"]
            copy(logs / run, HERE / "runs" / run, files)
            found = json.loads((logs / run / "summary.json").read_text(encoding="utf-8"))
            with open(logs / run / "metrics.csv", encoding="utf-8") as file:
                last = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
            dense = found["val_loss"] if dense is None else dense
            rows.append(
                {
                    "phase": phase + 1,
                    "model": model,
                    "loss of the hidden tokens, nats": found["val_loss"],
                    "over dense": found["val_loss"] - dense,
                    "guessing by frequency": found["unigram_val_loss"],
                    "below it": found["unigram_val_loss"] - found["val_loss"],
                    "sentence order, accuracy": float(last["val/next_sentence_accuracy"]),
                    "steps": found["steps"],
                    "tokens": found["tokens"],
                    "seconds": round(found["wall_seconds"]),
                    "parameters stored": found["parameters_stored"],
                }
            )
    return rows


def trials(logs: Path) -> list[dict[str, Any]]:
    """A row per short run that the settings of the demo were chosen by."""
    rows = []
    for run, about in TRIALS.items():
        copy(logs / run, HERE / "trials" / run, ["config.yaml", "metrics.csv", "summary.json"])
        with open(logs / run / "metrics.csv", encoding="utf-8") as file:
            losses = {row["step"]: row["val/loss"] for row in csv.DictReader(file)}
        steps = ("500", "1000", "1500")
        found = {f"loss at step {k}": float(losses[k]) if k in losses else None for k in steps}
        rows.append({"trial": about, **found})
    return rows


def finetuning(logs: Path) -> list[dict[str, Any]]:
    """A row per task, checkpoint and metric."""
    rows = []
    for task, metrics in TASKS.items():
        for model, start in STARTS.items():
            folder = logs / f"ft-{task}-{start}"
            if not (folder / "summary.json").is_file():
                continue
            files = ["results.md", "results.csv", "settings.json", "summary.json"]
            copy(folder, HERE / "finetune" / folder.name, files)
            found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            for metric in metrics:
                entry = found["metrics"][metric]
                rows.append(
                    {
                        "task": task,
                        "from": model,
                        "metric": metric,
                        "mean": entry["mean"],
                        "standard deviation": entry["std"],
                        "seeds": len(entry["values"]),
                        "seconds per seed": round(found["metrics"]["seconds"]["mean"]),
                    }
                )
    return rows


def main() -> None:
    """Copy and write."""
    logs = Path(sys.argv[1]) / "logs"
    write("pretraining", pretraining(logs))
    write("finetuning", finetuning(logs))
    write("trials", trials(logs))
    for name in COMPARISONS:
        files = ["comparison.md", "comparison.csv", "methods.csv", "env.json", "compare.log"]
        copy(logs / f"bert-{name}", HERE / name, files)


if __name__ == "__main__":
    main()
