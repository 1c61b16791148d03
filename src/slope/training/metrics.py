"""The CSV files of a run, to which restarts append without repeating or losing a step."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slope.diagnostics import COLUMNS as MASK_COLUMNS
from slope.disk import sync_file

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
    *(f"mask/{column}" for column in MASK_COLUMNS),
    "val/next_sentence_accuracy",
)
"""Of ``metrics.csv``: one row per step."""
EVALUATED = "eval/"
"""What the columns of other texts begin with, which each run names itself."""
DIAGNOSTICS_COLUMNS = ("step", "layer", *MASK_COLUMNS)
"""Of ``diagnostics.csv``: one row per step and layer, and one for the layer ``total``."""

Value = float | int | None


class MetricsFile:
    """Append-only table of a run; a context manager that closes the file.

    Args:
        path: the CSV file.
        step: the optimizer step from which the run goes on. Rows of later steps, written by a
            process that died after its last checkpoint, and a torn last line are dropped.
        columns: what it holds; the first is the step. A file that was begun with fewer of them gets
            the others, empty in the rows that it has; one that was begun with other texts to
            evaluate keeps their columns.

    Raises:
        ValueError: if the file exists and is not a metrics file.
        RuntimeError: if the file system refuses, now or later.
    """

    def __init__(self, path: Path, step: int = 0, columns: Sequence[str] = COLUMNS) -> None:
        self.path = path
        self.columns = tuple(columns)
        with clearly(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            known = _rows_until(path, step, self.columns) if path.exists() else []
            if known:
                self.columns += tuple(name for name in known[0] if name not in self.columns)
            rows = [[row.get(column, "") for column in self.columns] for row in known]
            temporary = path.with_name(path.name + ".partial")
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(self.columns)
                writer.writerows(rows)
                sync_file(file)
            os.replace(temporary, path)
            self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def append(self, *rows: Mapping[str, Value | str]) -> None:
        """Write rows and flush them; a column that was not measured stays empty."""
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(
            ["" if row.get(name) is None else _text(row[name]) for name in self.columns]
            for row in rows
        )
        with clearly(self.path):
            self._file.write(lines.getvalue())
            self._file.flush()

    def sync(self) -> None:
        """Make the rows safe from a power cut; called before a checkpoint is written."""
        with clearly(self.path):
            sync_file(self._file)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        # What could not be written is reported already, and closing tries again.
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def clearly(path: Path) -> Iterator[None]:
    """Report what the file system refuses about a file of a run, and what to do then.

    Raises:
        RuntimeError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path}: {error.strerror or error}; make room or check its permissions, "
            "and run the same command with resume=True: what it lacks is written again from the "
            "last checkpoint on."
        ) from error


def _text(value: Value | str) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _rows_until(path: Path, step: int, columns: tuple[str, ...]) -> list[dict[str, str]]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines:
        return []
    header = lines[0]
    if header[:1] != ["step"] or not all(
        name in columns or name.startswith(EVALUATED) for name in header
    ):
        raise ValueError(
            f"{path} is not a metrics file of slope (first columns: {header[:4]}); move it away "
            "or choose another name=."
        )
    good = [row for row in lines[1:] if len(row) == len(header) and row[0].isdigit()]
    return [dict(zip(header, row, strict=True)) for row in good if 0 < int(row[0]) <= step]
