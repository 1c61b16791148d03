"""``slope inspect``: what is sparse in a checkpoint or a model, and whether its masks hold."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slope import configs
from slope.cli import common
from slope.spelling import did_you_mean

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from slope.diagnostics import LayerDiagnostics
    from slope.sparsity import LayerReport, SparsityReport

ABOUT = "show what is sparse in a checkpoint or model, and check its masks"
_EPILOG = f"""\
CHECKPOINT is the name of a run, a .ckpt file, a folder that holds some, or a folder of
slope.save_pretrained. MODEL is overrides as for `slope train`, or the name of a model, then with
pruner=slope unless a pruner is given; it is built without weights, so nothing is measured. Nothing
is unpickled. Exit code 1 if a layer breaks its n:m constraint.

{common.OVERRIDES}
examples:
  slope inspect my-run
  slope inspect checkpoints/my-run/step_1000.ckpt --json
  slope inspect gpt2/small pruner.pattern=2:8
  slope inspect experiment=owt/gpt2s pruner=slope pruner.skip_attention=True
  slope inspect llama3/8b --backend --tokens 16384
"""
# column of a table -> field of LayerDiagnostics
_NUMBERS = {
    "density": "density",
    "backward": "density_backward",
    "imposed": "imposed_sparsity",
    "lemma 2.1": "lemma",
    "kept energy": "kept_energy",
    "kept backward": "kept_energy_backward",
    "adapter norm": "adapter_norm",
}


@dataclass(frozen=True)
class _Inspected:
    """A model, and what there is to say of it.

    ``step`` is None for what is no checkpoint of a run. ``measured`` and ``violations`` are empty
    for a model without weights.
    """

    source: str
    step: int | None
    report: SparsityReport
    weights: bool
    measured: dict[str, LayerDiagnostics] = field(default_factory=dict)
    violations: dict[str, list[str]] = field(default_factory=dict)


def run(arguments: list[str]) -> int:
    """Find, load, measure, check and print; 1 if a constraint is broken."""
    parser = common.parser(
        "inspect", "Report on the sparse layers of a checkpoint or a model.", _EPILOG
    )
    parser.add_argument("what", metavar="CHECKPOINT|MODEL", help="see below")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="override", help="of a MODEL; see below"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--backend", action="store_true",
        help="who multiplies each shape on this machine, and why; measured on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, metavar="T",
        help="per micro-batch, with --backend; default: 8192",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)

    if options.tokens is not None and not options.backend:
        parser.error("--tokens goes with --backend, which measures products of so many tokens")
    tokens = 8192 if options.tokens is None else options.tokens
    if tokens < 1:
        error = ValueError(f"--tokens {tokens} must be at least 1, for example 8192.")
        return common.usage_error(error, options.traceback)
    path = _checkpoint(options.what)
    if path is not None:
        if options.overrides:
            error = ValueError(
                f"{options.what} is a checkpoint, which takes no overrides: "
                f"{options.overrides[0]!r}; name {options.what} alone."
            )
            return common.usage_error(error, options.traceback)
        found = _of_folder(path) if (path / "slope.json").is_file() else _of_run(path)
    else:
        given = [options.what, *options.overrides]
        try:
            found = _of_configuration(_compose(given), " ".join(given))
        except ValueError as error:
            return common.usage_error(error, options.traceback)
    paths = _paths(found, tokens) if options.backend else None
    if options.json:
        print(common.as_json(_as_json(found) | ({"backend": paths} if paths else {})))
    else:
        _show(found)
        _show_paths(paths or [], tokens)
    for name, broken in found.violations.items():
        print(f"slope: error: layer {name!r}: {'; '.join(broken)}.", file=sys.stderr)
    return 1 if found.violations else 0


# -- what is meant ---------------------------------------------------------------------------------


def _checkpoint(given: str) -> Path | None:
    """The file or folder that is meant, None for a model or an override."""
    for path in (Path(given), Path("checkpoints") / given):
        if path.is_file() or (path.is_dir() and _holds_weights(path)):
            return path
    if "=" in given or given in configs.choices("model"):
        return None
    if (Path(given) / "config.json").is_file():
        raise ValueError(
            f"{given} is a folder for transformers, whose weights are dense; `slope inspect` reads "
            "runs, checkpoints and what slope.save_pretrained or `slope export` to slope wrote."
        )
    runs = sorted(path.name for path in Path("checkpoints").glob("*") if _holds_weights(path))
    there = f"Runs under checkpoints/: {', '.join(runs)}" if runs else "No run under checkpoints/"
    near = did_you_mean(given, [*runs, *configs.choices("model")])
    raise FileNotFoundError(
        f"{given} is neither a checkpoint, nor a folder with one, nor a model{near} {there}; "
        f"models: {', '.join(configs.choices('model'))}."
    )


def _holds_weights(folder: Path) -> bool:
    return (folder / "slope.json").is_file() or any(folder.glob("*.ckpt"))


def _compose(given: list[str]) -> Any:
    models = [text for text in given if "=" not in text]
    if len(models) > 1:  # the last would win
        raise ValueError(f"{' and '.join(models)} are several models; name one.")
    overrides = [text if "=" in text else f"model={text}" for text in given]
    keys = {text.partition("=")[0] for text in overrides}
    if not keys & {"experiment", "pruner", "pruner.pruned_matrix"}:
        overrides.append("pruner=slope")
    return configs.compose(overrides)


def _of_configuration(cfg: Any, source: str) -> _Inspected:
    """A model that is sparsified without memory for its weights."""
    import torch

    from slope import sparsity_report
    from slope.models import build_model
    from slope.training import pruner

    with torch.device("meta"):
        # Nothing is read, so that how long the data's sequences are does not matter.
        model = build_model(cfg.model, _vocabulary(cfg), max_length=1)
        report = pruner.apply(cfg.pruner, model, choose_masks=False)
    return _Inspected(source, None, report or sparsity_report(model), weights=False)


def _vocabulary(cfg: Any) -> int:
    """Entries of the tokenizer; of one that is trained on the corpus, as many as it may have."""
    if cfg.model.config.get("vocab_size") is not None:
        return 1  # the model's own number counts
    from slope.data.tokenizer import vocabulary_entries

    return vocabulary_entries(str(cfg.datamodule.tokenizer))


def _of_run(path: Path) -> _Inspected:
    """A checkpoint: its own signature says how to build and sparsify the model."""
    import torch

    from slope import sparsity_report
    from slope.models import build_model
    from slope.training import checkpoint, initial, pruner

    found = checkpoint.find(path) if path.is_dir() else None
    if path.is_dir() and found is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint named last.ckpt or step_<k>.ckpt; give the file itself."
        )
    path, content = found or (path, checkpoint.load(path))
    saved, section = content["slope"]["signature"], initial.pruner_section(content)
    settings = initial.model_section(content)
    with torch.device("meta"):
        model = build_model(settings, int(saved["vocabulary"]), int(saved["datamodule.max_length"]))
        report = pruner.apply(section, model, choose_masks=False) or sparsity_report(model)
    state = {name.removeprefix("model."): t for name, t in content["state_dict"].items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model that it describes: {error}") from error
    step = int(content["global_step"])
    schedule = pruner.schedule(section, int(saved["trainer.max_steps"]))
    pruner.put_to_work(model, schedule, step)
    return _measured(str(path), step, report, model)


def _of_folder(path: Path) -> _Inspected:
    """A folder of save_pretrained; loading it checks the masks too, and names the layer."""
    from slope import load_pretrained, sparsity_report

    model = load_pretrained(path)
    return _measured(str(path), None, sparsity_report(model), model)


def _measured(
    source: str, step: int | None, report: SparsityReport, model: nn.Module
) -> _Inspected:
    from slope.diagnostics import layer_diagnostics, violations

    broken = violations(model)
    # Masks that are broken cannot be measured.
    measured = {} if broken else layer_diagnostics(model)
    return _Inspected(source, step, report, True, measured, broken)


# -- what is printed -------------------------------------------------------------------------------


def _as_json(found: _Inspected) -> dict[str, Any]:
    from slope.diagnostics import total

    report = found.report
    return {
        "source": found.source,
        "step": found.step,
        "weights": found.weights,
        "summary": report.summary(),
        "parameters_dense": report.parameters_dense,
        "parameters_stored": report.parameters_stored,
        "weight_bytes_sparse_layers": report.weight_bytes_sparse_layers,
        "weight_bytes_dense_equivalent": report.weight_bytes_dense_equivalent,
        "layers": [_layer_as_json(layer, found) for layer in report.layers],
        "total": total(found.measured).row() if found.measured else None,
        "violations": found.violations,
    }


def _layer_as_json(layer: LayerReport, found: _Inspected) -> dict[str, Any]:
    measured = found.measured.get(layer.name)
    return {
        "name": layer.name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "pattern": layer.kind,
        "method": layer.method,
        "reason": layer.reason,
        "rank": layer.rank,
        "bytes_dense": layer.bytes_dense,
        "bytes_stored": layer.bytes_stored,
        **({} if measured is None else measured.row()),
        "violations": found.violations.get(layer.name, []),
    }


def _show(found: _Inspected) -> None:
    """A table: by rich in a terminal, plain columns elsewhere."""
    from rich.console import Console

    step = "" if found.step is None else f", step {found.step}"
    print(f"{found.source}{step}: {found.report.summary()}")
    header, rows = _table(found)
    console = Console(markup=False, highlight=False)
    table = _rich_table(header, rows, found) if console.is_terminal else None
    # Too narrow a table would break words and lose digits; measured without the console's limit.
    unlimited = console.options.update(width=10_000)
    if table is not None and console.measure(table, options=unlimited).minimum <= console.width:
        console.print(table)
    else:
        _print_plain(header, rows)
    stored = found.report.weight_bytes_sparse_layers
    dense = found.report.weight_bytes_dense_equivalent
    if dense:
        print(
            f"weights of the sparse layers: {stored:,} bytes, {stored / dense:.4f} of dense "
            f"({dense:,})"
        )
    print(_verdict(found))


def _paths(found: _Inspected, tokens: int) -> list[dict[str, Any]]:
    from slope.paths import explain

    return [path.row() for path in explain(found.report.layers, tokens)]


def _show_paths(paths: list[dict[str, Any]], tokens: int) -> None:
    """One block per shape; the reasons are long, so they stand on lines of their own."""
    if not paths:
        return
    print(f"backend=auto on this machine, bf16, {tokens:,} tokens:")
    for path in paths:
        print(
            f"  {path['shape']} {path['pattern']}, {path['layers']} layers: forward "
            f"{path['forward']}, input gradient {path['input_gradient']}"
        )
        print(f"    {path['reason']}")


def _rich_table(header: list[str], rows: list[list[str]], found: _Inspected) -> Table:
    """Names and numbers stay whole; only notes are wrapped."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=0, pad_edge=False)
    for name in header[:-1]:
        justify: Literal["left", "right"] = "left" if name == "layer" else "right"
        table.add_column(name.replace(" ", "\n", 1), justify=justify, no_wrap=True)
    table.add_column(header[-1], min_width=16, overflow="fold")
    for row in rows:
        table.add_row(*row, style="red" if row[0] in found.violations else None)
    return table


def _table(found: _Inspected) -> tuple[list[str], list[list[str]]]:
    """Header and rows; numbers that no layer has are left out."""
    from slope.diagnostics import total

    measured = dict(found.measured)
    if measured:
        measured["total"] = total(found.measured)
    columns = {
        title: {name: getattr(layer, number) for name, layer in measured.items()}
        for title, number in _NUMBERS.items()
    }
    columns = {t: c for t, c in columns.items() if any(v is not None for v in c.values())}
    header = ["layer", "d_out x d_in", "pattern", *columns, "note"]
    rows = [
        [
            layer.name,
            f"{layer.out_features} x {layer.in_features}",
            layer.kind,
            *(_number(column.get(layer.name)) for column in columns.values()),
            "BROKEN" if layer.name in found.violations else layer.note,
        ]
        for layer in found.report.layers
    ]
    if measured:
        totals = [_number(column["total"]) for column in columns.values()]
        rows.append(["total", "", "", *totals, "mean over the sparse weights"])
    return header, rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _print_plain(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *middle, last = row
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        print("  ".join([f"  {first:<{widths[0]}}", *cells, last]).rstrip())


def _verdict(found: _Inspected) -> str:
    count = len(found.report.sparse)
    if not found.weights:
        return "built without weights: there are no masks to check"
    if not count:
        return "no sparse layer: there are no masks to check"
    if found.violations:
        return f"{len(found.violations)} of {count} sparse layers break a constraint"
    return f"the constraints of all {count} sparse layers hold"
