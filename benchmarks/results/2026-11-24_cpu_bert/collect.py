"""Copy what the runs wrote beside this file and fill README.md: ``python collect.py RUNS``.

RUNS is the folder with ``logs`` in which the commands of README.md were run; without it, what was
copied before is read. In README.md, what stands between ``<!-- begin X -->`` and ``<!-- end -->``
is written anew.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DENSE, SPARSE, UNTRAINED = "dense", "2:4 SLoPe", "untrained"
SUFFIX = {DENSE: "-dense", SPARSE: ""}
SEEDS = {
    1111: "",
    1112: "-1112",
    1113: "-1113",
}  # of pretraining, and the end of the names of its runs
TASKS = {"rte": ("accuracy",), "squad": ("exact_match", "f1")}
TABLES = ("modules", "ranks", "mixed")

RUN = ("config.yaml", "metrics.csv", "summary.json", "report.txt", "run.log")
TRIAL = ("config.yaml", "metrics.csv", "summary.json")
FINETUNE = ("results.md", "results.csv", "settings.json", "summary.json")
COMPARISON = ("comparison.md", "comparison.csv", "methods.csv", "env.json", "compare.log")

PHASE1_TRIALS = {  # dense, 1,024 tokens per step, in the order of the runs
    "eB": "AdamW, rate 1e-3",
    "eA": "LAMB, rate 6e-3",
    "eC": "LAMB, rate 1e-2",
    "eD": "LAMB, rate 6e-3, initializer_range 0.08",
}
PHASE2_TRIALS = {  # folder -> model, learning rate
    "trials/phase2_4e-3": (DENSE, "4e-3"),
    "trials/phase2_2e-3": (DENSE, "2e-3"),
    "runs/bert-demo2-dense": (DENSE, "1e-3"),
    "trials/phase2_5e-4": (DENSE, "5e-4"),
    "trials/phase2_4e-3_sparse": (SPARSE, "4e-3"),
    "runs/bert-demo2": (SPARSE, "1e-3"),
}
OTHER_SETS = (  # set, metric; folders trials/<set>_<start>
    ("sst2", "accuracy"),
    ("cola", "matthews"),
)
OTHER_TRIALS = {  # run -> folder beside this file, files
    "p2-dense-5e-4": ("trials/phase2_5e-4", TRIAL),
    "try-shuffle-demo2-dense": ("trials/cola_dense", FINETUNE),
    "try-shuffle-untrained": ("trials/cola_untrained", FINETUNE),
}


def copy(logs: Path, run: str, folder: str, names: Sequence[str]) -> None:
    """Copy those of the files that are there; nothing for a run that is not."""
    if not (logs / run).is_dir():
        return
    (HERE / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        if (logs / run / name).is_file():
            shutil.copy(logs / run / name, HERE / folder / name)


def copy_all(logs: Path) -> None:
    """Everything that is read below."""
    for seed in SEEDS.values():
        for model in SUFFIX.values():
            for run in (f"bert-demo{model}", f"bert-demo2{model}"):
                copy(logs, run + seed, f"runs/{run}{seed}", RUN)
            copy(logs, f"eval1{model}{seed}", f"runs/eval1{model}{seed}", TRIAL)
    for task in TASKS:
        for _, _, run in finetuned(task):
            copy(logs, run, f"finetune/{run}", FINETUNE)
    for run, (folder, names) in OTHER_TRIALS.items():
        copy(logs, run, folder, names)
    for table in TABLES:
        copy(logs, f"bert-table_{table}_small", f"table_{table}_small", COMPARISON)


def finetuned(task: str) -> Iterable[tuple[str, str, str]]:
    """Start, seed of its pretraining, run."""
    yield UNTRAINED, "–", f"ft-{task}-untrained"
    for seed, end in SEEDS.items():
        for model, middle in SUFFIX.items():
            yield model, str(seed), f"ft-{task}-demo2{middle}{end}"


def summary(folder: str) -> dict[str, Any] | None:
    """``summary.json`` of a folder beside this file; None: it is not there."""
    path = HERE / folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def evaluations(folder: str) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` with a validation."""
    with open(HERE / folder / "metrics.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["val/loss"]]


def write(name: str, rows: list[dict[str, Any]]) -> str:
    """``name.csv`` with all digits; the table for readers, rounded."""
    columns = list(rows[0])
    with open(HERE / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    numbers = [any(isinstance(row[column], int | float) for row in rows) for column in columns]
    lines = [columns, ["---:" if number else "---" for number in numbers]]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def pretraining() -> list[dict[str, Any]]:
    """A row per phase, seed and model; phase 1 also on the examples of phase 2."""
    rows = []
    for phase, run in (("1", "bert-demo"), ("1, examples of 2", "eval1"), ("2", "bert-demo2")):
        for seed, end in SEEDS.items():
            dense = None
            for model, middle in SUFFIX.items():
                folder = f"runs/{run}{middle}{end}"
                found = summary(folder)
                if found is None:
                    continue
                dense = found["val_loss"] if dense is None else dense
                trained = run != "eval1"  # its one step is of no size
                order = float(evaluations(folder)[-1]["val/next_sentence_accuracy"])
                rows.append(
                    {
                        "phase": phase,
                        "seed": seed,
                        "model": model,
                        "loss of the hidden tokens, nats": found["val_loss"],
                        "over dense": found["val_loss"] - dense,
                        "guessing by frequency": found["unigram_val_loss"],
                        "below it": found["unigram_val_loss"] - found["val_loss"],
                        "sentence order, accuracy": order,
                        "steps": found["steps"] if trained else None,
                        "tokens": found["tokens"] if trained else None,
                        "seconds": round(found["wall_seconds"]) if trained else None,
                        "parameters stored": found["parameters_stored"],
                        "run": folder.removeprefix("runs/"),
                    }
                )
    return rows


def distances(rows: list[dict[str, Any]]) -> str:
    """In words: below guessing, sparse from dense, and what phase 2 gained."""

    def losses(phase: str, model: str, key: str) -> dict[int, float]:
        return {r["seed"]: r[key] for r in rows if (r["phase"], r["model"]) == (phase, model)}

    gains, apart = [], {}
    for model in SUFFIX:
        before = losses("1, examples of 2", model, "below it")
        after = losses("2", model, "below it")
        gains += [after[seed] - before[seed] for seed in before]
    for phase in ("1", "2"):
        values = list(losses(phase, SPARSE, "over dense").values())
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        each = ", ".join(f"{value:+.4f}" for value in values)
        apart[phase] = f"{mean:+.3f} ± {spread:.3f} ({each})"
    loss, order = "loss of the hidden tokens, nats", "sentence order, accuracy"
    below = [row["below it"] for row in rows if row["phase"] in ("1", "2")]
    longer = [
        value - losses("1", model, loss)[seed]
        for model in SUFFIX
        for seed, value in losses("1, examples of 2", model, loss).items()
    ]
    dense, sparse = losses("2", DENSE, order), losses("2", SPARSE, order)
    orders = [f"{sparse[seed]:.3f} sparse to {dense[seed]:.3f} dense" for seed in sparse]
    return (
        f"All models end {min(below):.2f} to {max(below):.2f} nats below guessing by frequency, "
        f"which costs {rows[0]['guessing by frequency']:.3f}. Sparse minus dense is "
        f"{apart['1']} after phase 1 and {apart['2']} after phase 2, mean ± standard deviation "
        f"over the seeds; the order of two texts is told right {', '.join(orders)}. "
        "Phase 2 ends above phase 1 on examples that are twice as long: on these the models of "
        f"phase 1 are {min(longer):.2f} to {max(longer):.2f} nats worse than on their own, and "
        f"phase 2 wins {min(gains):.2f} to {max(gains):.2f} back.\n"
    )


def phase1_trials() -> list[dict[str, Any]]:
    """A row per short run that the settings of phase 1 were chosen by."""
    rows = []
    for run, about in PHASE1_TRIALS.items():
        losses = {row["step"]: float(row["val/loss"]) for row in evaluations(f"trials/{run}")}
        steps = ("500", "1000", "1500")
        rows.append({"trial": about, **{f"loss at step {k}": losses.get(k) for k in steps}})
    return rows


def phase2_trials() -> list[dict[str, Any]]:
    """A row per learning rate of phase 2."""
    rows = []
    for folder, (model, rate) in PHASE2_TRIALS.items():
        last = evaluations(folder)[-1]
        row = {"model": model, "learning rate": rate, "loss": float(last["val/loss"])}
        order = float(last["val/next_sentence_accuracy"])
        rows.append(row | {"sentence order, accuracy": order, "folder": folder})
    return rows


def finetuning() -> list[dict[str, Any]]:
    """A row per task, metric and start."""
    rows = []
    for task, metrics in TASKS.items():
        for metric in metrics:
            for model, seed, run in finetuned(task):
                found = summary(f"finetune/{run}")
                if found is None:
                    continue
                entry = found["metrics"][metric]
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "from": model,
                        "pretraining seed": seed,
                        "mean": entry["mean"],
                        "standard deviation": entry["std"],
                        "seeds": len(entry["values"]),
                        "seconds per seed": round(found["metrics"]["seconds"]["mean"]),
                        "run": run,
                    }
                )
    return rows


def other_sets() -> list[dict[str, Any]]:
    """A row per start of the sets that told nothing."""
    rows = []
    for name, metric in OTHER_SETS:
        for start in ("untrained", "dense", "sparse"):
            found = summary(folder := f"trials/{name}_{start}")
            if found is not None:
                entry = found["metrics"][metric]
                row = {"set": name, "metric": metric, "from": start, "mean": entry["mean"]}
                row |= {"standard deviation": entry["std"], "seeds": len(entry["values"])}
                rows.append(row | {"folder": folder})
    return rows


def differences() -> str:
    """In words: over the untrained model, and sparse from dense with the error of the mean."""
    lines = []
    for task, metrics in TASKS.items():
        metric = metrics[-1]
        values = {}
        for model, seed, run in finetuned(task):
            found = summary(f"finetune/{run}")
            if found is not None:
                values[model, seed] = found["metrics"][metric]["values"]
        untrained = statistics.fmean(values[UNTRAINED, "–"])
        over = {
            model: statistics.fmean(
                v for key, many in values.items() if key[0] == model for v in many
            )
            - untrained
            for model in SUFFIX
        }
        apart = []
        for (model, seed), ours in values.items():
            if model == SPARSE:
                theirs = values[DENSE, seed]
                error = (statistics.variance(ours) + statistics.variance(theirs)) / len(ours)
                mean = statistics.fmean(ours) - statistics.fmean(theirs)
                apart.append(f"{mean:+.1f} ± {error**0.5:.1f} (pretraining seed {seed})")
        lines.append(
            f"- {task}, {metric}: over the untrained model, dense {over[DENSE]:+.1f} and sparse "
            f"{over[SPARSE]:+.1f} points; sparse minus dense {', '.join(apart)}.\n"
        )
    return "".join(lines)


def small_table(name: str) -> str:
    """The first columns of a comparison's table, with its command."""
    text = (HERE / f"table_{name}_small" / "comparison.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:6] for line in text.splitlines() if line.startswith("|")]
    table = "".join(f"|{'|'.join(row)}|\n" for row in rows)
    about = text.splitlines()[2].partition(" A seed has")[0]
    return (
        f"`slope compare --jobs 1 experiment=bert/table_{name}_small`: {about} "
        f"[All columns](table_{name}_small/comparison.md).\n\n{table}\n"
    )


def fill(parts: dict[str, str]) -> None:
    """Put each part between its marks in README.md."""
    path = HERE / "README.md"
    parts = {name: "".join(map(_wrap, part.splitlines())) for name, part in parts.items()}
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, part=part: m[1] + part.rstrip() + "\n" + m[2], text)
        if count != 1:
            raise ValueError(f"README.md needs the marks of {name} once, and has {count}.")
    path.write_text(text, encoding="utf-8")


def _wrap(line: str) -> str:
    if line.startswith("|"):
        return f"{line}\n"
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 118, subsequent_indent=indent, break_on_hyphens=False) + "\n"


def main() -> None:
    """Copy and write."""
    if len(sys.argv) > 1:
        copy_all(Path(sys.argv[1]) / "logs")
    phases, tuned = pretraining(), finetuning()
    fill(
        {
            "pretraining": write("pretraining", phases),
            "distances": distances(phases),
            "phase1_trials": write("trials", phase1_trials()),
            "phase2_trials": write("trials_phase2", phase2_trials()),
            "finetuning": write("finetuning", tuned),
            "differences": differences(),
            "other_sets": write("trials_sets", other_sets()),
            "tables": "".join(map(small_table, TABLES)),
        }
    )


if __name__ == "__main__":
    main()
