"""The model card: what a folder holds and how to load it."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from slope.layers import adapted_layers
from slope.sparsity import sparsity_report

CARD_FILE = "README.md"
MARK = "<!-- slope export -->"  # says that the folder may be replaced by another export
LIBRARIES = {"slope": "slope-llm", "hf": "transformers", "peft": "peft"}
_USAGE = {
    "slope": 'import slope\n\nmodel = slope.load_pretrained("this folder")',
    "hf": (
        "from transformers import {architecture}\n\n"
        'model = {architecture}.from_pretrained("this folder")'
    ),
    "peft": (
        "from peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(model, "this folder")  # model: the dense export'
    ),
}


def write_card(folder: Path, model: nn.Module, kind: str, note: str) -> None:
    """Write the model card.

    Args:
        folder: where.
        model: as it was before the export, sparse.
        kind: ``"slope"``, ``"hf"`` or ``"peft"``.
        note: a sentence on what the folder holds.
    """
    report, architecture = sparsity_report(model), type(model).__name__
    patterns = sorted({str(layer.pattern) for _, layer in adapted_layers(model)})
    rows = [
        f"| `{layer.name}` | {layer.out_features} x {layer.in_features} | {layer.kind} | "
        f"{layer.rank or ''} |"
        for layer in report.layers
    ]
    lines = [
        "---",
        f"library_name: {LIBRARIES[kind]}",
        f"tags: {json.dumps(['sparsity', *patterns])}",
        "---",
        MARK,
        f"# {architecture}, {' and '.join(patterns) or 'not'} sparse",
        "",
        f"{note} Made with SLoPe (arXiv:2405.16325); {report.summary()}.",
        "",
        "```python",
        _USAGE[kind].format(architecture=architecture),
        "```",
        "",
        "| linear layer | d_out x d_in | pattern | adapter rank |",
        "|---|---|---|---|",
        *rows,
    ]
    (folder / CARD_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
