"""``slope eval``: perplexity and zero-shot tasks of checkpoints, side by side."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from slope.cli import common
from slope.cli.generate import EPILOG_CHECKPOINT, add_source, open_source, prepared

ABOUT = "perplexity and zero-shot tasks of checkpoints, side by side"
_EPILOG = f"""\
{EPILOG_CHECKPOINT}
FILE is text, JSON lines (each also .gz, .zst, .xz), parquet, or token ids: a .npy of whole numbers,
or train.bin or val.bin of a token cache. TASK is a name of lm-eval (its data come from the Hugging
Face hub), `paper` for the tasks of the paper, or a task file of your own (.yaml), for which no hub
is needed; lm-eval runs the Python code that a task file names. The table goes to standard output.

examples:
  slope eval my-run --data heldout.txt
  slope eval my-run dense-run --data heldout.jsonl --stride 256 --output table.md --output table.csv
  slope eval exported/ --tasks my_task.yaml --json
  slope eval my-run --tasks paper --batch-size 16
"""
_FORMATS = (".md", ".csv", ".json")


def parse(arguments: list[str]) -> Namespace:
    """Read the command line."""
    parser = common.parser("eval", "Measure perplexity, and zero-shot tasks by lm-eval.", _EPILOG)
    add_source(parser, nargs="+")
    add = parser.add_argument
    add("--data", action="append", default=[], type=Path, metavar="FILE", help="may be repeated")
    add("--text-field", default="text", metavar="NAME", help="of JSON lines; default: text")
    add("--window", type=int, metavar="W", help="tokens seen at once; default: the context")
    add("--stride", type=int, metavar="S", help="from window to window; default: no overlap")
    add("--tasks", action="append", default=[], metavar="TASK,TASK", help="may be repeated")
    add("--fewshot", type=int, default=0, metavar="N", help="solved examples; default: 0")
    add("--limit", type=int, metavar="N", help="only the first examples of each task")
    add("--batch-size", type=int, default=8, metavar="N", help="windows at once; default: 8")
    add("--fold", action="store_true", help="make the model dense, adapters added into the weights")
    add("--device", default="auto", help="cpu, cuda or cuda:N; default: cuda if there is one")
    add("--output", action="append", default=[], type=Path, metavar="FILE",
        help="write the table: .md, .csv or .json; may be repeated")  # fmt: skip
    add("--force", action="store_true", help="replace a FILE of --output")
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    options.tasks = [name for given in options.tasks for name in given.split(",") if name]
    if not options.data and not options.tasks:
        parser.error("give --data FILE or --tasks TASK")
    for name, least in (("window", 2), ("stride", 1), ("fewshot", 0), ("limit", 1),
                        ("batch_size", 1)):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    for path in options.output:
        if path.suffix not in _FORMATS:
            parser.error(f"--output {path} must end in one of {', '.join(_FORMATS)}")
    return options


def run(arguments: list[str]) -> int:
    """Measure one checkpoint after the other."""
    options = parse(arguments)
    for path in options.output:
        if path.exists() and not options.force:
            raise FileExistsError(f"'{path}' exists; give another name, or type --force.")
    for path in options.data:
        if not path.is_file():
            raise FileNotFoundError(f"no file '{path}' to evaluate on; give an existing one.")

    from slope.compare.table import replace
    from slope.deploy.source import find
    from slope.evaluation import table
    from slope.evaluation.tasks import load_tasks

    for checkpoint in options.checkpoint:
        find(checkpoint)
    tasks = load_tasks(options.tasks) if options.tasks else None
    measured: list[table.Measurement] = []
    notes: list[str] = []
    for checkpoint in options.checkpoint:
        new, said = _measure(checkpoint, options, tasks)
        measured += new
        notes += [note for note in said if note not in notes]
    texts = {
        ".md": table.to_markdown(measured, notes),
        ".csv": table.to_csv(measured),
        ".json": table.to_json(measured, notes) + "\n",
    }
    for path in options.output:
        replace(path, texts[path.suffix])
    print(texts[".json" if options.json else ".md"], end="")
    return 0


def _measure(checkpoint: str, options: Namespace, tasks: Any) -> tuple[list[Any], list[str]]:
    """What is wanted of one checkpoint, and how it was counted."""
    from rich.console import Console
    from rich.progress import track

    from slope.evaluation.heldout import read_held_out, score
    from slope.evaluation.perplexity import perplexity
    from slope.evaluation.table import Measurement
    from slope.evaluation.tasks import run_tasks

    source = open_source(Namespace(**vars(options) | {"checkpoint": checkpoint}), training=False)
    if tasks is not None and source.tokenizer is None:
        raise ValueError(
            f"tasks are text, and '{source.path}' comes without a tokenizer; type --tokenizer <a "
            "tokenizer.json, or a folder that holds one>."
        )
    model = prepared(source.model, options)
    console = Console(stderr=True)
    measured: list[Measurement] = []
    notes: list[str] = []
    for path in options.data:
        held_out = read_held_out(path, source.tokenizer, options.text_field)
        found = score(
            model,
            held_out.ids,
            options.window,
            options.stride,
            options.batch_size,
            lambda batches: track(
                batches, checkpoint, console=console, disable=not console.is_terminal
            ),
        )
        value = perplexity(found.loss)
        numbers = [
            ("perplexity", value, None if found.stderr is None else value * found.stderr),
            ("loss", found.loss, found.stderr),
        ]
        if held_out.text_bytes is not None:
            share = len(held_out.ids) / (held_out.text_bytes * math.log(2))
            error = None if found.stderr is None else share * found.stderr
            numbers.append(("bits_per_byte", share * found.loss, error))
        data = path.name
        measured += [Measurement(checkpoint, data, *each, found.predicted) for each in numbers]
        notes.append(f"{data}: {_counting(held_out, found)}")
    if tasks is not None:
        measured += run_tasks(
            model,
            source.tokenizer,
            tasks,
            checkpoint,
            fewshot=options.fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
        )
        print(f"{checkpoint}: tasks done", file=sys.stderr)
    return measured, notes


def _counting(held_out: Any, found: Any) -> str:
    """Which tokens were scored, in words."""
    tokens = f"{len(held_out.ids):,} tokens"
    if held_out.documents is not None:
        tokens += f" in {held_out.documents:,} documents joined by the end-of-text token"
    least = max(1, found.window - found.stride)
    return (
        f"{tokens}; windows of {found.window:,}, {found.stride:,} apart; {found.predicted:,} "
        "tokens predicted, each once, after the first window from at least "
        f"{least:,} tokens of context."
    )
