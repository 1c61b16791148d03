"""``slope eval``: perplexity and zero-shot tasks of checkpoints, side by side."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
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
    for name in options.checkpoint:
        if options.checkpoint.count(name) > 1:
            parser.error(f"checkpoint {name} is named twice; name each checkpoint once")
    for path in options.output:
        if path.suffix not in _FORMATS:
            parser.error(f"--output {path} must end in one of {', '.join(_FORMATS)}")
    return options


def run(arguments: list[str]) -> int:
    """Measure one checkpoint after the other."""
    options = parse(arguments)
    # What would fail after the work fails before it.
    for path in options.output:
        if path.exists() and not options.force:
            raise FileExistsError(f"'{path}' exists; give another name, or type --force.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder '{path.parent}' for --output {path}; make it.")
    for path in options.data:
        if not path.is_file():
            raise FileNotFoundError(f"no file '{path}' to evaluate on; give an existing one.")

    from slope.compare.table import replace
    from slope.deploy.source import find
    from slope.evaluation import table
    from slope.evaluation.heldout import labels
    from slope.evaluation.tasks import load_tasks

    for checkpoint in options.checkpoint:
        find(checkpoint)
    files = dict(zip(labels(options.data), options.data, strict=True))
    tasks = load_tasks(options.tasks) if options.tasks else None
    measured: list[table.Measurement] = []
    said: dict[str, dict[str, str]] = {}
    for checkpoint in options.checkpoint:
        measured += _measure(checkpoint, options, files, tasks, said)
    notes = _notes(said)
    texts = {
        ".md": table.to_markdown(measured, notes),
        ".csv": table.to_csv(measured),
        ".json": common.as_json({"results": [*map(asdict, measured)], "notes": notes}) + "\n",
    }
    for path in options.output:
        replace(path, texts[path.suffix])
    print(texts[".json" if options.json else ".md"], end="")
    return 0


def _measure(
    checkpoint: str,
    options: Namespace,
    files: Mapping[str, Path],
    tasks: Any,
    said: dict[str, dict[str, str]],
) -> list[Any]:
    """What is wanted of one checkpoint; how a file was counted goes to ``said[file][checkpoint]``.

    Files and tasks are read before any is measured.
    """
    from rich.console import Console
    from rich.progress import track

    from slope.evaluation import heldout
    from slope.evaluation.tasks import run_tasks

    source = open_source(Namespace(**vars(options) | {"checkpoint": checkpoint}), training=False)
    if tasks is not None and source.tokenizer is None:
        raise ValueError(
            f"tasks are text, and '{source.path}' comes without a tokenizer; type --tokenizer <a "
            "tokenizer.json, or a folder that holds one>."
        )
    model = prepared(source.model, options)
    console = Console(stderr=True)
    wanted = []
    for label, path in files.items():
        held_out = heldout.read_held_out(path, source.tokenizer, options.text_field)
        try:
            heldout.check(model, held_out.ids, options.window, options.stride)
        except ValueError as error:
            raise ValueError(f"{checkpoint} on '{path}': {error}") from error
        wanted.append((label, held_out))
    measured = []
    for label, held_out in wanted:
        found = heldout.score(
            model,
            held_out.ids,
            options.window,
            options.stride,
            options.batch_size,
            lambda batches: track(
                batches, checkpoint, console=console, disable=not console.is_terminal
            ),
        )
        measured += heldout.measurements(checkpoint, label, held_out, found)
        said.setdefault(label, {})[checkpoint] = heldout.counting(held_out, found)
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
    return measured


def _notes(said: Mapping[str, Mapping[str, str]]) -> list[str]:
    """How each file was counted: once, or for each checkpoint where they differ."""
    notes = []
    for label, of in said.items():
        if len(set(of.values())) == 1:
            notes.append(f"{label}: {next(iter(of.values()))}")
            continue
        notes += [f"{label}, {checkpoint}: {text}" for checkpoint, text in of.items()]
        notes.append(
            f"{label} was counted in different ways: compare bits_per_byte of the same text, not "
            "loss or perplexity."
        )
    return notes
