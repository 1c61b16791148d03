"""What checkpoints cost a run: none, written in the foreground, written by a thread.

    python benchmarks/async_checkpoint.py --output logs/async_checkpoint --rounds 5

Runs of the demo take turns. The cost is the wall time of the optimizer steps over that of the run
of the same round that writes none, as a share of a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "none": ["callbacks.checkpoint.every_n_steps=0"],
    "foreground": ["callbacks.checkpoint.asynchronous=false"],
    "thread": ["callbacks.checkpoint.asynchronous=true"],
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="new folder of the report")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    rows = []
    for number in range(options.rounds):
        names = list(KINDS)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = run(KINDS[name], options.steps, options.every)
            rows.append({"round": number, "checkpoints": name, "seconds": seconds})
            print(rows[-1], flush=True)
    with (options.output / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (options.output / "result.json").write_text(json.dumps(summary(rows, options), indent=1))
    print((options.output / "result.json").read_text())


def run(settings: list[str], steps: int, every: int) -> float:
    """Seconds from the end of the first optimizer step to that of the last but one.

    The last step ends in a validation and a checkpoint in any case.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "training" / "run.py"), "experiment=demo", "name=run",
            f"paths.root={folder}", f"datamodule.cache_dir={ROOT / '.slope-cache'}",
            f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
            "trainer.log_every_n_steps=1", "callbacks.diagnostics.every_n_steps=0", "plot=false",
            "trainer.enable_progress_bar=false", "generate.max_new_tokens=1",
            f"callbacks.checkpoint.every_n_steps={every}", *settings,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        with (Path(folder) / "logs" / "run" / "metrics.csv").open(encoding="utf-8") as file:
            seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    return seconds[steps - 1] - seconds[1]


def summary(rows: list[dict[str, object]], options: argparse.Namespace) -> dict[str, object]:
    """Medians, and the cost as a share of a step."""
    times = {name: [r["seconds"] for r in rows if r["checkpoints"] == name] for name in KINDS}
    found: dict[str, object] = {
        "steps": options.steps, "every": options.every, "rounds": options.rounds,
        "cores": os.cpu_count(), "python": platform.python_version(),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }  # fmt: skip
    for name in ("foreground", "thread"):
        shares = sorted(
            own / none - 1 for own, none in zip(times[name], times["none"], strict=True)
        )
        found[f"{name}_over_none"] = {
            "median": statistics.median(shares), "low": shares[0], "high": shares[-1],
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
