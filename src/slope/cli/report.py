"""``slope report``: one HTML page of a run."""

from __future__ import annotations

from pathlib import Path

from slope.cli import common

ABOUT = "write one HTML page of a run: numbers, curves, layers, configuration"
_EPILOG = """\
The page holds its figures and needs neither network nor other files. It works on a run that goes
on, with what there is.

examples:
  slope report my-run
  slope report my-run --force --output shared/my-run.html
  slope report my-run --json
"""


def run(arguments: list[str]) -> int:
    """Write the page, and print its path."""
    parser = common.parser("report", "Write one self-contained HTML page of a run.", _EPILOG)
    parser.add_argument("run", metavar="RUN", help="a run's name, or the folder with metrics.csv")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the run's folder"
    )
    parser.add_argument("--force", action="store_true", help="replace the page if it exists")
    parser.add_argument(
        "--json", action="store_true", help="print the summary and the page's path as JSON"
    )
    options = parser.parse_intermixed_args(arguments)
    folder = common.find_run(options.run)

    from slope.report import summary_of, write_report

    path = write_report(folder, options.output, options.force)
    if options.json:
        found = {"run": str(folder), "report": str(path), "summary": summary_of(folder)}
        print(common.as_json(found))
    else:
        print(path)
    return 0
