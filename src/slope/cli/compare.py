"""``slope compare``: several methods side by side."""

from __future__ import annotations

import sys
from dataclasses import asdict

from slope.cli import common

ABOUT = "train several methods on the same data and seeds; table and figure"
_EPILOG = f"""\
{common.OVERRIDES}
The overrides hold for every method. Runs are under logs/<name>/<method>/seed<k>, tables and figure
in logs/<name>. Ctrl-C saves all runs, and the same command goes on; what has finished is not
repeated. Exit code 1 if a run failed; one that diverged is a result, not a failure.

examples:
  slope compare experiment=compare/smoke
  slope compare experiment=compare/small --list
  slope compare experiment=compare/small --only dense,slope --jobs 2
  slope compare experiment=compare/small name=longer trainer.max_steps=6400 'compare.seeds=[0,1]'
  slope compare experiment=compare/smoke --json > smoke.json
  slope compare experiment=bert/table_ranks trainer.devices=8 compare.finetune.SQuAD.data=squad
"""


def run(arguments: list[str]) -> int:
    """Do the runs that are still to do, and show all results."""
    parser = common.parser(
        "compare",
        "Train several methods on the same data order, initial weights, steps and seeds.",
        _EPILOG,
    )
    parser.add_argument("overrides", nargs="*", metavar="override", help="see below")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once; default: one per core on a CPU, 1 on a GPU",
    )
    parser.add_argument(
        "--only", metavar="METHOD,METHOD", help="run these methods; the table shows all that exist"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the methods, or the comparisons, and do nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; the table goes to standard error"
    )
    options = parser.parse_intermixed_args(arguments)

    from slope.compare import plan

    if options.list and not options.overrides:
        names = plan.choices()
        if options.json:
            print(common.as_json({"experiments": names}))
        else:
            print("\n".join(f"experiment={name}" for name in names))
        return 0
    try:
        comparison = plan.load(options.overrides)
        comparison.check_jobs(options.jobs)
        runs = plan.select(comparison, options.only and options.only.split(","))
    except ValueError as error:
        return common.usage_error(error, options.traceback)
    if options.list:
        methods = list(comparison.methods.values())
        if options.json:
            print(common.as_json({"methods": [asdict(method) for method in methods]}))
        else:
            print("\n".join(f"{method.label:<20} {method.about}" for method in methods))
        return 0
    print(
        f"slope: compare name={comparison.name}: {len(runs)} runs, "
        f"{sum(run.state() in plan.ENDED for run in runs)} of them ended before",
        file=sys.stderr if options.json else sys.stdout,
        flush=True,
    )

    from rich.console import Console

    from slope.compare import table
    from slope.compare.program import compare

    command = ["slope", "compare", *arguments]
    outcome = compare(comparison, runs, options.jobs, command, Console(stderr=options.json))
    if options.json:
        found = table.document(comparison, outcome.results)
        print(common.as_json(found | {"files": [*map(str, outcome.files)]}))
    if outcome.interrupted:
        return 130
    if outcome.failed:
        for name, reason in outcome.failed.items():
            print(f"slope: error: {name} failed: {reason}", file=sys.stderr)
        return 1
    return 0
