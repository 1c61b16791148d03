"""``slope plot``: pictures of a run."""

from __future__ import annotations

from pathlib import Path

from slope.cli import common

ABOUT = "draw the curves of a run"
_EPILOG = """\
examples:
  slope plot my-run
  slope plot /elsewhere/logs/my-run
"""


def run(arguments: list[str]) -> int:
    """Draw ``curves.png``, and ``diagnostics.png`` of the masks, and print their paths."""
    parser = common.parser(
        "plot",
        "Draw curves.png from a run's metrics.csv, and diagnostics.png from its diagnostics.csv.",
        _EPILOG,
    )
    parser.add_argument("run", help="a run's name, or the folder with its metrics.csv")
    options = parser.parse_intermixed_args(arguments)
    folders = [Path(options.run), Path("logs") / options.run]
    folder = next((path for path in folders if (path / "metrics.csv").is_file()), None)
    if folder is None:
        runs = sorted(path.parent.name for path in Path("logs").glob("*/metrics.csv"))
        raise FileNotFoundError(
            f"no metrics.csv in {' or '.join(map(str, folders))}; "
            + (f"runs under logs/: {', '.join(runs)}." if runs else "give a run's folder.")
        )

    from slope.plotting import DIAGNOSTICS, plot_run

    print(plot_run(folder))
    if (folder / DIAGNOSTICS).is_file():
        print(folder / DIAGNOSTICS)
    return 0
