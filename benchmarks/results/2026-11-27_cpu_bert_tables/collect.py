"""Copy the comparisons beside this file and fill README.md: ``python collect.py RUNS``.

RUNS is the folder with ``logs`` in which the commands of README.md were run; without it, what was
copied before is read. What stands between ``<!-- begin X -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
TABLES = ("modules", "ranks", "mixed")
COMPARISON = ("comparison.md", "comparison.csv", "comparison.png", "methods.csv", "env.json")
TUNED = ("results.csv", "settings.json")


def copy(logs: Path) -> None:
    """Tables, and of each run what its fine-tunings gave; of phase 1 the summaries."""
    for table in TABLES:
        folder = logs / f"bert-table_{table}_small"
        files = [folder / name for name in (*COMPARISON, "compare.log")]
        files += [f for name in TUNED for f in folder.glob(f"*/seed*/finetune-*/{name}")]
        for file in files:
            target = HERE / table / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for run in ("bert-demo", "bert-demo-dense", "bert-demo2-dense-200"):
        (HERE / "phase1" / run).mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "config.yaml"):
            shutil.copy(logs / run / name, HERE / "phase1" / run / name)


def table(name: str) -> str:
    """The first columns of a comparison's two tables, and how many runs they are of."""
    text = (HERE / name / "comparison.md").read_text(encoding="utf-8")
    about = text.splitlines()[2].partition(" A seed has")[0]
    losses, tuned = text.split("## Fine-tuned")
    rows = [line.split("|")[1:5] for line in losses.splitlines() if line.startswith("|")]
    scores = [line.split("|")[3:-1] for line in tuned.splitlines() if line.startswith("|")]
    both = [f"|{'|'.join(a + b)}|\n" for a, b in zip(rows, scores, strict=True)]
    return f"{about}\n\n{''.join(both)}"


def main() -> None:
    """Copy and write."""
    if len(sys.argv) > 1:
        copy(Path(sys.argv[1]) / "logs")
    path = HERE / "README.md"
    text = path.read_text(encoding="utf-8")
    for name in TABLES:
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, name=name: m[1] + table(name) + m[2], text)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
