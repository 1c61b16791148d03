"""One HTML page of a run that needs no other file and no network.

Reads what a run leaves behind: the tables of its pictures, `report.txt`, `config.yaml` and
`sample.txt`; what is not there yet is said to be missing. The figures are inside the page.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain, repeat, zip_longest
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from slope.disk import check_folder_of
from slope.plotting import curves, masks
from slope.plotting.runs import TOTAL, Run, in_words, number, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
"""The page in a run's folder."""

# The policy keeps a browser from fetching anything, whatever a run has written into its files.
_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$name</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 85rem; margin: 0 auto;
  padding: 1rem 1.5rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; height: auto; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid #eee; text-align: left;
  vertical-align: top; white-space: nowrap; }
thead th { border-bottom-color: #999; vertical-align: bottom; white-space: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 0.85rem; }
pre.text { white-space: pre-wrap; }
</style>
</head>
<body>
<h1>$name</h1>
<h2>Summary</h2>
$summary
<h2>Curves</h2>
$figures
<h2>Sparsity</h2>
$sparsity
<h2>Sample of text</h2>
$sample
<h2>Configuration</h2>
$config
</body>
</html>
""")
_NUMBER = re.compile(r"[\d.,]+( \w+)?|[\d:]+ h")  # of a cell, with its unit
# What `metrics.csv` says of a run that has not been summed up.
_LAST = ("step", "tokens", "seconds", "train/loss", "val/loss", "tokens_per_second")


def write_report(
    log_dir: str | Path, output: str | Path | None = None, force: bool = False
) -> Path:
    """Write the page of a run.

    Args:
        log_dir: its folder, with `metrics.csv`.
        output: the page; None takes `report.html` in the run's folder.
        force: replace a page that exists.

    Returns:
        The page's path.

    Raises:
        FileExistsError: if the page exists and `force` is not given.
        FileNotFoundError: if there is no `metrics.csv`, or the folder of `output` is missing.
        ValueError: if it holds no measured step, or a file cannot be read.
    """
    folder = Path(log_dir)
    path = folder / FILE if output is None else Path(output)
    if path.exists() and not force:
        raise FileExistsError(f"'{path}' exists; give --force to replace it, or another --output.")
    if output is not None:
        check_folder_of(path)
    (run,) = read_runs([folder])
    figures = {
        "Loss, perplexity, learning rate, gradient norm, throughput and memory": curves.draw([run]),
        "Density, flips, kept energy and adapter norm of the masks": masks.draw([run]),
    }
    page = _PAGE.substitute(
        name=escape(run.label),
        summary=_summary(run),
        figures="\n".join(_image(f, about) for about, f in figures.items() if f is not None),
        sparsity=_sparsity(run),
        sample=_file(folder / "sample.txt", "text"),
        config=_file(folder / "config.yaml", "code"),
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def summary_of(log_dir: str | Path) -> dict[str, Any]:
    """What is known of a run: its summary, before its end the last measurements."""
    (run,) = read_runs([log_dir])
    return run.summary or _measured(run)


def _measured(run: Run) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for row in run.rows:
        found = {name: number(row.get(name)) for name in _LAST}
        last |= {name: value for name, value in found.items() if value is not None}
    return last


def _summary(run: Run) -> str:
    known = run.summary
    note = "" if known else "<p>Not finished: the last measurements.</p>\n"
    rows = [[name, *_readable(name, value)] for name, value in (known or _measured(run)).items()]
    return note + _table((), rows)


def _readable(name: str, value: Any) -> tuple[str, str]:
    """A value, and the same in larger units."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ("–" if value is None else str(value)), ""
    text = f"{value:,.4f}" if not float(value).is_integer() else f"{value:,.0f}"
    if "bytes" in name:
        large = value >= 2**30
        return text, f"{value / 2**30:,.1f} GiB" if large else f"{value / 2**20:,.1f} MiB"
    if name.endswith("seconds"):
        minutes, seconds = divmod(round(value), 60)
        return text, f"{minutes // 60}:{minutes % 60:02}:{seconds:02} h"
    return text, in_words(value)


def _image(figure: Figure, about: str) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    data = base64.b64encode(drawn.getvalue()).decode("ascii")
    return f'<p><img alt="{escape(about)}" src="data:image/svg+xml;base64,{data}"></p>'


def _sparsity(run: Run) -> str:
    """The layers of `report.txt`, with what was last measured of their masks."""
    path = run.folder / "report.txt"
    if not path.is_file():
        return _missing(path)
    about, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    rows = [re.split(r" {2,}", line.strip(), maxsplit=3) for line in lines if line.strip()]
    measured = {layer: table[-1] for layer, table in run.layers.items()}
    columns = [
        name
        for name in measured.get(TOTAL, {})
        if name not in ("step", "layer") and any(number(row[name]) for row in measured.values())
    ]
    wide = [[*row, *[""] * (4 - len(row))] for row in rows]
    if columns:
        wide = [
            [*row, *(_share(measured.get(row[0], {}).get(name)) for name in columns)]
            for row in [*wide, [TOTAL, "", "", "mean over the sparse weights"]]
        ]
        wide[0][4:] = [name.replace("_", " ") for name in columns]
        about += f"; masks as measured at step {measured[TOTAL]['step']}"
    return f"<p>{escape(about)}</p>\n{_table(wide[0] if wide else (), wide[1:])}"


def _share(text: str | None) -> str:
    value = number(text)
    return "" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first cell of each row names it, and columns of numbers stand on the right."""
    rows = list(rows)
    styles = [_style(column) for column in zip_longest(*rows, fillvalue="")]

    def line(cells: Sequence[str], tags: Iterable[str]) -> str:
        made = (
            f"<{tag}{style}>{escape(cell)}</{tag}>"
            for tag, style, cell in zip(tags, chain(styles, repeat("")), cells, strict=False)
        )
        return f"<tr>{''.join(made)}</tr>"

    head = f"<thead>{line(header, repeat('th'))}</thead>" if header else ""
    body = [line(row, chain(["th"], repeat("td"))) for row in rows]
    return "\n".join(["<div><table>", head, "<tbody>", *body, "</tbody></table></div>"])


def _style(column: Iterable[str]) -> str:
    """The attribute of a column's cells: that of numbers where most of them are."""
    numeric = [bool(_NUMBER.fullmatch(cell)) for cell in column if cell]
    return ' class="number"' if 2 * sum(numeric) > len(numeric) else ""


def _file(path: Path, kind: str) -> str:
    if not path.is_file():
        return _missing(path)
    return f'<pre class="{kind}">{escape(path.read_text(encoding="utf-8", errors="replace"))}</pre>'


def _missing(path: Path) -> str:
    return f"<p>There is no {escape(path.name)}; a run writes it when it ends.</p>"
