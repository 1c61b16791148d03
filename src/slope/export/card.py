"""The model card: what a folder holds and how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from slope.layers import adapted_layers
from slope.linear import AdaptedLinear
from slope.methods import PrunedLinear
from slope.sparsity import LayerReport, sparsity_report

CARD_FILE = "README.md"
MARK = "<!-- slope export -->"  # says that the folder may be replaced by another export
_DENSE = "dense"
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


@dataclass(frozen=True)
class Contents:
    """The linear layers as they lie in an export.

    Attributes:
        layers: a report on each; one whose weight is written without its pattern is dense.
    """

    layers: tuple[LayerReport, ...]

    @property
    def sparse(self) -> list[LayerReport]:
        """Those whose weights hold the zeros of a pattern, or of an unstructured mask."""
        return [layer for layer in self.layers if layer.kind != _DENSE]

    @property
    def kinds(self) -> list[str]:
        """``"2:4"`` and the like, each once."""
        return sorted({layer.kind for layer in self.sparse})

    def summary(self) -> str:
        """How many layers are what, in a few words."""
        if not self.sparse:
            return f"all {len(self.layers)} linear layers are dense"
        kinds = " and ".join(self.kinds)
        return f"{len(self.sparse)} of {len(self.layers)} linear layers are {kinds}"


def contents(model: nn.Module, folded: bool = False) -> Contents:
    """What an export of ``model`` holds; ``folded``: active adapters are added into the weights."""
    filled = {name for name, layer in adapted_layers(model) if _is_filled(layer, folded)}
    plain: dict[str, Any] = {"pattern": None, "sparsity": None}
    if folded:
        plain["rank"] = 0
    return Contents(
        tuple(
            replace(layer, **plain) if layer.name in filled else layer
            for layer in sparsity_report(model).layers
        )
    )


def _is_filled(layer: AdaptedLinear, folded: bool) -> bool:
    """Whether the weight of a sparse layer is written without zeros."""
    if folded and layer.adapter is not None and layer.adapter.active:
        return True
    # Some methods prune inputs or gradients alone.
    return isinstance(layer, PrunedLinear) and bool(layer.masks()[0].all())


def write_card(folder: Path, model: nn.Module, kind: str, note: str, folded: bool = False) -> None:
    """Write the model card.

    Args:
        folder: where.
        model: as it was before the export, sparse.
        kind: ``"slope"``, ``"hf"`` or ``"peft"``.
        note: a sentence on what the folder holds.
        folded: its active adapters are added into the weights.
    """
    held, architecture = contents(model, folded), type(model).__name__
    rows = [
        f"| `{layer.name}` | {layer.out_features} x {layer.in_features} | {layer.kind} | "
        f"{layer.rank or ''} |"
        for layer in held.layers
    ]
    what = " and ".join(held.kinds) + " sparse" if held.kinds else _DENSE
    title = f"Adapters of {architecture}" if kind == "peft" else architecture
    lines = [
        "---",
        f"library_name: {LIBRARIES[kind]}",
        f"tags: {json.dumps(['sparsity', *held.kinds] if held.kinds else [])}",
        "---",
        MARK,
        f"# {title}, {what}",
        "",
        f"{note} Made with SLoPe (arXiv:2405.16325); {held.summary()}.",
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
