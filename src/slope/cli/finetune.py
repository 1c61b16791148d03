"""``slope finetune``: GLUE and SQuAD from a pretrained BERT."""

from __future__ import annotations

import logging
import sys

from slope.cli import common

ABOUT = "fine-tune a pretrained BERT on GLUE or SQuAD"
_EPILOG = """\
Tasks: glue/cola, glue/sst2, glue/mrpc, glue/stsb, glue/qqp, glue/rte, glue/mnli, glue/qnli, squad;
their published learning rate, batch, length and epochs are the defaults. init_from is a checkpoint
of a run or a folder of save_pretrained. Zeros stay zeros, unless dense=True. Results are in
logs/<name>; the same command goes on where it was stopped. docs/finetune.md lists the settings.

examples:
  slope finetune task=glue/sst2 init_from=checkpoints/bert data=glue/SST-2 tokenizer=vocab.txt
  slope finetune task=squad init_from=exported/bert data=squad 'seeds=[0,1,2,3,4]'
  slope finetune task=glue/mrpc init_from=exported/bert data=hub dense=True name=mrpc-dense --json
"""


def run(arguments: list[str]) -> int:
    """Read the settings, fine-tune, and print the table."""
    parser = common.parser("finetune", "Fine-tune a pretrained BERT, zeros kept.", _EPILOG)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    parser.add_argument(
        "--json", action="store_true", help="print JSON; the table goes to standard error"
    )
    options = parser.parse_intermixed_args(arguments)
    from slope.finetune import finetune, markdown, settings

    try:
        chosen = settings(options.settings)
    except ValueError as error:
        return common.usage_error(error, options.traceback)
    console = sys.stderr if options.json else sys.stdout
    print(f"slope: finetune task={chosen.task} in {chosen.directory}", file=console, flush=True)
    from slope.training.progress import console_handler

    logger, handler = logging.getLogger("slope"), console_handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        summary = finetune(chosen)
    finally:
        logger.removeHandler(handler)
    print(markdown(summary), file=console)
    print(f"written: {chosen.directory}", file=console)
    if options.json:
        print(common.as_json(summary | {"directory": str(chosen.directory)}))
    return 0
