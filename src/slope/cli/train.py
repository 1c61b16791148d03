"""``slope train``: a whole run."""

from __future__ import annotations

import argparse
import contextlib
import sys

from slope import configs
from slope.cli import common

ABOUT = "pretrain a model"
_EPILOG = f"""\
{common.OVERRIDES}
examples:
  slope train experiment=demo
  slope train experiment=smoke name=first datamodule=text datamodule.data_files=corpus.txt
  slope train experiment=owt/gpt2s pruner=slope trainer.devices=8 name=my-run resume=True
  slope train experiment=smoke --json > smoke.json
"""


def run(arguments: list[str]) -> int:
    """Compose the configuration, say so, and train."""
    parser = common.parser("train", "Pretrain a model.", _EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="override", help="see below")
    parser.add_argument(
        "--cfg", action="store_true", help="print the resolved configuration and do nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; all else goes to standard error"
    )
    # Hydra's options, for those who know them from the authors' program.
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.multirun:
        return common.fail(
            "one command is one run, so there is no --multirun; repeat it in the shell: for seed "
            "in 1 2; do slope train ... seed=$seed name=run-$seed; done. `slope compare` does it "
            "for methods and seeds: slope compare experiment=compare/small 'compare.seeds=[1,2]'.",
            2,
        )
    if options.cfg and "job" in options.overrides:
        options.overrides.remove("job")  # Hydra's --cfg job
    if not options.overrides:
        several = configs.comparisons()
        listed = ", ".join(name for name in configs.choices("experiment") if name not in several)
        return common.fail(f"nothing to train; add experiment=demo or another of {listed}.", 2)
    if options.cfg:
        return common.print_config(options.overrides, options.traceback, options.json)
    from slope.training.pruner import check_pruner

    try:
        cfg = configs.compose(options.overrides)
        if cfg.compare is not None:
            raise ValueError(
                f"{cfg.name} is a comparison of several methods; type `slope compare "
                f"{' '.join(options.overrides)}`."
            )
        check_pruner(cfg.pruner)
    except ValueError as error:
        return common.usage_error(error, options.traceback)
    first = common.is_first_process()
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        if first:
            chosen = [o.partition("=")[2] for o in options.overrides if o.startswith("experiment=")]
            experiment = chosen[-1] if chosen else "none"
            print(f"slope: train experiment={experiment} name={cfg.name}", flush=True)

        from slope.training import run as train

        summary = train(cfg)
    if options.json and first:
        folders = {"run": cfg.paths.log_dir, "checkpoints": cfg.paths.checkpoint_dir}
        print(common.as_json({**folders, "summary": summary}))
    return 130 if summary.get("interrupted") else 0
