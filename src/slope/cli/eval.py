"""``slope eval``: perplexity and zero-shot tasks of checkpoints, side by side."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slope.cli import common
from slope.cli.generate import EPILOG_CHECKPOINT, add_source, open_source, prepared
from slope.disk import check_folder_of

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
    add("--text-field", metavar="NAME", help="of JSON lines and parquet; default: text")
    add("--window", type=int, metavar="W", help="tokens seen at once; default: the context")
    add("--stride", type=int, metavar="S", help="from window to window; default: no overlap")
    add("--tasks", action="append", default=[], metavar="TASK,TASK", help="may be repeated")
    add("--fewshot", type=int, metavar="N", help="solved examples; default: 0")
    add("--limit", type=int, metavar="N", help="only the first examples of each task")
    add("--batch-size", type=int, default=8, metavar="N", help="windows at once; default: 8")
    add("--fold", action="store_true", help="make the model dense, adapters added into the weights")
    add("--device", type=common.device, default="auto",
        help="cpu, cuda or cuda:N; default: cuda if there is one")  # fmt: skip
    add("--output", action="append", default=[], type=Path, metavar="FILE",
        help="write the table: .md, .csv or .json; may be repeated")  # fmt: skip
    add("--force", action="store_true", help="replace a FILE of --output")
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    options.tasks = [name for given in options.tasks for name in given.split(",") if name]
    if not options.data and not options.tasks:
        parser.error("give --data FILE or --tasks TASK")
    for name in ("text_field", "window", "stride"):
        if getattr(options, name) is not None and not options.data:
            parser.error(f"--{name.replace('_', '-')} goes with --data: tasks do not use it")
    for name in ("fewshot", "limit"):
        if getattr(options, name) is not None and not options.tasks:
            parser.error(f"--{name} goes with --tasks: files of --data have no examples")
    if options.text_field is not None:
        from slope.evaluation.heldout import has_fields

        if not any(map(has_fields, options.data)):
            parser.error(
                f"--text-field {options.text_field} goes with JSON lines or parquet, and no FILE "
                "of --data is any; leave it out"
            )
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
    options.fewshot = options.fewshot or 0
    options.text_field = "text" if options.text_field is None else options.text_field
    return options


@dataclass(frozen=True)
class _Opened:
    """A checkpoint with what is wanted of it: each file's tokens, of its own tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    held_out: Mapping[str, Any]


@dataclass(frozen=True)
class _Found:
    """Measurements; how each file and task was counted is in ``said[file or task][checkpoint]``."""

    measured: list[Any] = field(default_factory=list)
    said: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, checkpoint: str, label: str, measured: list[Any], counting: str) -> None:
        self.measured.extend(measured)
        self.said.setdefault(label, {})[checkpoint] = counting


def run(arguments: list[str]) -> int:
    """Measure one checkpoint after the other."""
    options = parse(arguments)
    _check_paths(options)

    from slope.deploy.source import find
    from slope.evaluation.heldout import labels
    from slope.evaluation.tasks import load_tasks

    for checkpoint in options.checkpoint:
        find(checkpoint)
    files = dict(zip(labels(options.data), options.data, strict=True))
    tasks = load_tasks(options.tasks) if options.tasks else {}
    # All are opened before the first is measured, one at a time; the first has its turn below.
    for checkpoint in options.checkpoint[1:]:
        _open(checkpoint, options, files)
    found = _Found()
    for checkpoint in options.checkpoint:
        try:
            _measure(_open(checkpoint, options, files), options, tasks, found)
        except (Exception, KeyboardInterrupt) as error:
            if found.measured:
                _write(options, found, {"checkpoint": checkpoint, "error": _message(error)})
            raise
    _write(options, found)
    return 0


def _check_paths(options: Namespace) -> None:
    """What would fail after the work, or after seconds of imports, fails before."""
    for path in options.output:
        if path.exists() and not options.force:
            raise FileExistsError(f"'{path}' exists; give another name, or type --force.")
        check_folder_of(path)
    for path in options.data:
        if not path.is_file():
            raise FileNotFoundError(f"no file '{path}' to evaluate on; give an existing one.")

    from slope.evaluation.tasks import task_names

    task_names(options.tasks)


def _open(checkpoint: str, options: Namespace, files: Mapping[str, Path]) -> _Opened:
    """Load a checkpoint, and read the files with its tokenizer; what does not fit is an error."""
    from slope.evaluation import heldout

    source = open_source(Namespace(**vars(options) | {"checkpoint": checkpoint}), training=False)
    if options.tasks and source.tokenizer is None:
        raise ValueError(
            f"tasks are text, and '{source.path}' comes without a tokenizer; type --tokenizer <a "
            "tokenizer.json, or a folder that holds one>."
        )
    if options.tasks and not heldout.is_causal(source.model):
        raise ValueError(
            f"tasks need a causal language model, and '{source.path}' holds a "
            f"{type(source.model).__name__}."
        )
    held_out = {}
    for label, path in files.items():
        held_out[label] = heldout.read_held_out(path, source.tokenizer, options.text_field)
        try:
            heldout.check(source.model, held_out[label].ids, options.window, options.stride)
        except ValueError as error:
            raise ValueError(f"{checkpoint} on '{path}': {error}") from error
    return _Opened(checkpoint, source.model, source.tokenizer, held_out)


def _measure(
    opened: _Opened, options: Namespace, tasks: Mapping[str, Mapping[str, Any]], found: _Found
) -> None:
    """Add what is wanted of one checkpoint, file by file and task by task."""
    from rich.console import Console
    from rich.progress import track

    from slope.evaluation import heldout
    from slope.evaluation.tasks import run_tasks

    name, model = opened.name, prepared(opened.model, options)
    console = Console(stderr=True)
    for label, held_out in opened.held_out.items():
        score = heldout.score(
            model,
            held_out.ids,
            options.window,
            options.stride,
            options.batch_size,
            lambda batches: track(batches, name, console=console, disable=not console.is_terminal),
        )
        measured = heldout.measurements(name, label, held_out, score)
        found.add(name, label, measured, heldout.counting(held_out, score))
    if not tasks:
        return
    for done in run_tasks(
        model,
        opened.tokenizer,
        tasks,
        name,
        fewshot=options.fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
    ):
        found.add(name, done.name, done.measured, done.counting)
    print(f"{name}: tasks done", file=sys.stderr)


def _write(options: Namespace, found: _Found, failed: Mapping[str, str] | None = None) -> None:
    """Write the tables and print one; ``failed`` says which checkpoint ended it, and why."""
    from slope.compare.table import replace
    from slope.evaluation import table

    notes = _notes(found)
    said = notes
    if failed is not None:
        said = [*notes, f"Incomplete: {failed['checkpoint']} failed: {failed['error']}"]
    document = {"results": [*map(asdict, found.measured)], "notes": notes, "failed": failed}
    texts = {
        ".md": table.to_markdown(found.measured, said),
        ".csv": table.to_csv(found.measured),
        ".json": common.as_json(document) + "\n",
    }
    for path in options.output:
        replace(path, texts[path.suffix])
    print(texts[".json" if options.json else ".md"], end="")


def _message(error: BaseException) -> str:
    return common.message(error) if isinstance(error, Exception) else "stopped by Ctrl-C"


def _notes(found: _Found) -> list[str]:
    """How each file and task was counted: once, or for each checkpoint where they differ."""
    files = {one.data for one in found.measured if one.window is not None}
    notes = []
    for label, of in found.said.items():
        if len(set(of.values())) == 1:
            notes.append(f"{label}: {next(iter(of.values()))}")
            continue
        notes += [f"{label}, {checkpoint}: {text}" for checkpoint, text in of.items()]
        if label in files:
            notes.append(
                f"{label} was counted in different ways: compare bits_per_byte of the same text, "
                "not loss or perplexity."
            )
    return notes
