"""One CSV per run name, to which restarts append without repeating or losing a step."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

COLUMNS = (
    "step",
    "tokens",
    "epoch",
    "seconds",
    "train/loss",
    "train/perplexity",
    "val/loss",
    "val/perplexity",
    "lr",
    "lora_lr",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "adapters_active",
)

Value = float | int | None


class MetricsFile:
    """Append-only table of a run; a context manager that closes the file.

    Args:
        path: the CSV file.
        step: the optimizer step from which the run goes on. Rows of later steps, written by a
            process that died after its last checkpoint, and a torn last line are dropped.

    Raises:
        ValueError: if the file exists and is not a metrics file.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _rows_until(path, step) if path.exists() else []
        temporary = path.with_name(path.name + ".partial")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def append(self, row: Mapping[str, Value]) -> None:
        """Write one row and flush it; a column that was not measured stays empty."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(
            ["" if row.get(name) is None else _text(row[name]) for name in COLUMNS]
        )
        self._file.write(line.getvalue())
        self._file.flush()

    def sync(self) -> None:
        """Make the rows safe from a power cut; called before a checkpoint is written."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _text(value: Value) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _rows_until(path: Path, step: int) -> list[list[str]]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if lines and tuple(lines[0]) != COLUMNS:
        raise ValueError(
            f"{path} is not a metrics file of slope (first columns: {lines[0][:4]}); move it away "
            "or choose another name=."
        )
    good = [row for row in lines[1:] if len(row) == len(COLUMNS) and row[0].isdigit()]
    return [row for row in good if 0 < int(row[0]) <= step]
