"""``slope plot``: pictures of runs."""

from __future__ import annotations

from pathlib import Path

from slope.cli import common

ABOUT = "draw the curves of one or several runs"
_EPILOG = """\
One run is drawn into its own folder: curves.png, and diagnostics.png where masks were measured.
Several runs are drawn over each other into OUTPUT, and their masks into <OUTPUT>-masks. Each
picture is written as PNG and as SVG.

examples:
  slope plot my-run
  slope plot dense sparse --against tokens --output compared.png
  slope plot /elsewhere/logs/my-run --against time --json
"""


def run(arguments: list[str]) -> int:
    """Draw, and print the paths of the pictures."""
    parser = common.parser(
        "plot", "Draw loss, learning rate, speed, memory and masks of runs.", _EPILOG
    )
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="a run's name, or the folder with its metrics.csv"
    )
    parser.add_argument(
        "--against",
        choices=("steps", "tokens", "time"),
        default="steps",
        help="what is on the horizontal axis; default: steps",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.png",
        help="where to write; default: the run's folder, for several runs ./runs.png",
    )
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--json", action="store_true", help="print JSON instead of paths")
    options = parser.parse_intermixed_args(arguments)
    if options.output is not None and options.output.suffix not in (".png", ".svg"):
        parser.error(f"--output {options.output} must end in .png or .svg")
    folders = [common.find_run(given) for given in options.run]
    if len({folder.resolve() for folder in folders}) < len(folders):
        parser.error("a run is named twice; name each run once")

    from slope.plotting import plot_run, plot_runs

    if len(folders) == 1 and options.output is None:
        files = plot_run(folders[0], options.against)
    else:
        output = options.output or Path("runs.png")
        files = plot_runs(folders, output, options.against, options.force)
    if options.json:
        print(common.as_json({"runs": [*map(str, folders)], "files": [*map(str, files)]}))
    else:
        print("\n".join(map(str, files)))
    return 0
