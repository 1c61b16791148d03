"""``slope export``: a checkpoint as a folder to keep, to ship, or for other people's code."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from slope.cli import common
from slope.cli.generate import EPILOG_CHECKPOINT, add_source, open_source
from slope.pattern import NMPattern

ABOUT = "write a checkpoint as a folder for slope, transformers or peft"
_EPILOG = f"""\
{EPILOG_CHECKPOINT}
formats:
  slope   kept values and a bitmask in safetensors; slope.load_pretrained reads it
  hf      dense with zeros, for transformers; active adapters go into OUTPUT/adapter, or with --fold
          into the weights
  peft    the active adapters as a LoRA, for peft, to put on the hf export

A dense checkpoint is made sparse with --sparsify: magnitude and wanda choose masks, zeros takes
those that the weights have. docs/formats.md describes the formats.

examples:
  slope export my-run --format slope --dtype bfloat16 --output exported
  slope export my-run --format hf --output dense-with-zeros
  slope export gpt2/ --sparsify wanda --calibration text.txt --format slope --output pruned
  slope export step_400000.ckpt --tokenizer gpt2/ --format slope --output theirs
"""


def parse(arguments: list[str]) -> Namespace:
    """Read the command line."""
    parser = common.parser("export", "Write a checkpoint as a folder.", _EPILOG)
    add_source(parser)
    add = parser.add_argument
    add("--format", choices=("slope", "hf", "peft"), required=True, help="see below")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    add("--fold", action="store_true", help="hf: add the adapters into the weights")
    add("--sparsify", choices=("magnitude", "wanda", "zeros"), help="for a dense checkpoint")
    add("--pattern", metavar="N:M", help="of --sparsify; default: 2:4")
    add("--calibration", type=Path, metavar="FILE", help="text for --sparsify wanda")
    add("--force", action="store_true", help="replace an earlier export of that name")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    if options.fold and options.format != "hf":
        parser.error("--fold goes with --format hf: the other formats keep adapters apart")
    if options.pattern is not None and options.sparsify is None:
        parser.error("--pattern goes with --sparsify, which makes a dense checkpoint sparse")
    if options.calibration is not None and options.sparsify != "wanda":
        parser.error("--calibration goes with --sparsify wanda: only wanda reads text")
    if options.calibration is None and options.sparsify == "wanda":
        parser.error("--sparsify wanda needs --calibration <a text file>")
    options.pattern = options.pattern or "2:4"
    try:
        NMPattern.parse(options.pattern)
    except ValueError as error:
        parser.error(str(error))
    return options


def run(arguments: list[str]) -> int:
    """Load, prune if asked to, and write."""
    options = parse(arguments)

    from slope.export.folder import check_target

    # What would fail after the work fails before it, and before seconds of imports.
    _check_parents(options.output)
    check_target(options.output, options.force)

    from slope.deploy import read_calibration
    from slope.deploy.source import quiet_transformers

    text = None if options.calibration is None else read_calibration(options.calibration)
    source = open_source(options)
    facts: dict[str, Any] = {} if options.sparsify is None else _prune(source, options, text)
    with quiet_transformers():
        facts = _write(source, options) | facts
    if options.json:
        print(common.as_json(facts))
    else:
        _print(facts, source, options)
    return 0


def _check_parents(output: Path) -> None:
    """See that no part of the path is a file: the system's own error does not say which one."""
    for parent in output.resolve().parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(
                f"'{parent}', a part of --output {output}, is a file; type another --output."
            )


def _prune(source: Any, options: Namespace, text: str | None) -> dict[str, Any]:
    """Make a dense model sparse; what it was measured on, for the JSON."""
    from slope.deploy import calibration_ids, prune
    from slope.deploy.prune import CALIBRATION_SEQUENCES

    if text is None:
        prune(source.model, options.sparsify, options.pattern)
        return {}
    ids = calibration_ids(source.model, source.tokenizer, text)
    prune(source.model, options.sparsify, options.pattern, calibration=ids)
    sequences, tokens = ids.shape
    said = f"calibrated on {sequences} x {tokens} tokens (sequences x length)"
    if sequences < CALIBRATION_SEQUENCES:
        said += (
            f"; note: {CALIBRATION_SEQUENCES} sequences are usual, and fewer give less certain "
            "masks; give --calibration a longer text"
        )
    print(said, file=sys.stderr)
    return {"calibration": {"sequences": sequences, "tokens": tokens}}


def _print(facts: dict[str, Any], source: Any, options: Namespace) -> None:
    from slope.export.lora import ADAPTER_FOLDER

    print(facts["summary"])
    if source.tokenizer is None and options.format != "peft":
        print("no tokenizer came with the checkpoint: none was written (--tokenizer PATH adds it)")
    if (options.output / ADAPTER_FOLDER).is_dir():
        print(f"the adapters are in {options.output / ADAPTER_FOLDER}, for peft")
    print(f"written: {facts['output']} ({facts['bytes'] / 1e6:.1f} MB)")


def _write(source: Any, options: Namespace) -> dict[str, Any]:
    import slope
    from slope.export import save_dense, save_peft
    from slope.export.card import contents
    from slope.export.lora import active_adapters
    from slope.layers import pruned_layers, sparse_layers

    model, output, force = source.model, options.output, options.force
    methods = {layer.method.name for _, layer in pruned_layers(model)}
    if options.format == "slope" and not methods and not any(True for _ in sparse_layers(model)):
        raise ValueError(
            f"'{source.path}' is dense, so there is nothing to compress; type --sparsify magnitude "
            "to make it sparse (--sparsify zeros: by the zeros that it has), or --format hf."
        )
    for method in sorted(methods & {"static-input", "dynamic-input"}):
        print(f"note: what {method} prunes of inputs is in no weight; it is lost", file=sys.stderr)
    if options.format == "slope":
        if methods:
            slope.compress_weights(model, fold_adapters=True)
        for _, layer in sparse_layers(model):
            # Training would refresh it before its next use; as it is, it only takes room.
            if layer.column_mask_interval == 1:
                layer.refresh_column_mask()
        path = slope.save_pretrained(model, output, source.tokenizer, force=force)
    elif options.format == "hf":
        path = save_dense(model, output, source.tokenizer, fold_adapters=options.fold, force=force)
    else:
        path = save_peft(model, output, force=force)
    adapters, held = len(active_adapters(model)), contents(model, folded=options.fold)
    return {
        "source": str(source.path),
        "format": options.format,
        "output": str(path),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "summary": _summary(held, adapters, options),
        "sparse_layers": 0 if options.format == "peft" else len(held.sparse),
        "adapters": adapters,
        "tokenizer": source.tokenizer is not None,
    }


def _summary(held: Any, adapters: int, options: Namespace) -> str:
    """What was written, in a line."""
    if options.format == "peft":
        return f"the adapters of {adapters} linear layers"
    kept = f"{held.summary()}, written dense with their zeros"
    if options.fold and adapters:
        layers = f"{adapters} of {len(held.layers)} linear layers"
        folded = f"written dense, adapters added into the weights of {layers}"
        return f"{folded}; {kept}" if held.sparse else folded
    return kept if options.format == "hf" and held.sparse else str(held.summary())
