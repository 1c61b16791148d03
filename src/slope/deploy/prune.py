"""Make a dense checkpoint sparse in one shot: by magnitude, by Wanda, or by the zeros it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope.config import SparsityConfig
from slope.convert import sparsify
from slope.deploy.adapted import AdaptedDense, apart
from slope.layers import adapted_layers
from slope.linear import dense_weight
from slope.pattern import NMPattern
from slope.sparsity import SparsityReport, sparsity_report

WAYS = ("magnitude", "wanda", "zeros")
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH, _BATCH = 128, 2048, 8
# A weight with fewer zeros than this was never pruned; a pruned one has half or more.
_DENSE_ZEROS = 0.01


def prune(
    model: nn.Module,
    by: str,
    pattern: str = "2:4",
    *,
    calibration: Tensor | None = None,
) -> SparsityReport:
    """Sparsify a trained dense model in place, without training.

    The adapters of a dense export stay where they are; one whose layer stays dense is added into
    the weight.

    Args:
        model: dense.
        by: ``"magnitude"``; ``"wanda"`` (arXiv:2306.11695), which reads text; ``"zeros"``, see
            :func:`prune_by_zeros`.
        pattern: N:M pattern.
        calibration: for Wanda, from :func:`calibration_ids`.

    Raises:
        ValueError: if the model is sparse already, or an argument does not fit.
    """
    if by not in WAYS:
        raise ValueError(f"prune by {by!r} is unknown; choose one of {', '.join(WAYS)}.")
    if any(not isinstance(layer, AdaptedDense) for _, layer in adapted_layers(model)):
        raise ValueError("the model is sparse already; leave --sparsify away.")
    if (by == "wanda") != (calibration is not None):
        raise ValueError(
            "--sparsify wanda needs --calibration <a text file> to measure the layers' inputs."
            if by == "wanda"
            else f"--calibration with --sparsify {by} has no meaning: only wanda reads text."
        )
    if by == "zeros":
        try:
            return prune_by_zeros(model, pattern)
        except ValueError as error:
            raise ValueError(
                f"{error} Are the zeros of another pattern (--pattern)? To choose masks anew, type "
                "--sparsify magnitude."
            ) from error
    batches = None
    if calibration is not None:
        batches = [{"input_ids": batch} for batch in calibration.split(_BATCH)]
    with apart(model):
        return sparsify(model, SparsityConfig(pattern=pattern, mask=by), batches)


def prune_by_zeros(model: nn.Module, pattern: str = "2:4") -> SparsityReport:
    """Sparsify the layers whose zeros are n:m, in place; no weight changes.

    A kept weight that is 0.0 cannot be told from a pruned one: of such a group the first zeros are
    kept. Adapters are treated as by :func:`prune`.

    Raises:
        ValueError: if a layer is neither dense nor n:m, or none is n:m.
    """
    parsed = NMPattern.parse(pattern)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    names = [layer.name for layer in sparsity_report(model).layers]
    linears = {name: model.get_submodule(name) for name in names}
    chosen = [
        (name, str(parsed))
        for name, linear in linears.items()
        if linear is not head and _has_zeros(name, dense_weight(linear), parsed)
    ]
    if not chosen:
        raise ValueError(f"no linear layer holds the zeros of {pattern}.")
    with apart(model):
        return sparsify(model, SparsityConfig(pattern=pattern, rules=(*chosen, ("*", "dense"))))


def _has_zeros(name: str, weight: Tensor, pattern: NMPattern) -> bool:
    """Whether the layer is n:m; False if it is dense."""
    zeros = float((weight == 0).float().mean())
    if zeros < _DENSE_ZEROS:
        return False
    rows, columns = weight.shape
    if columns % pattern.m == 0 and rows % pattern.m == 0:
        kept = (weight != 0).unflatten(1, (-1, pattern.m)).sum(-1)
        crowded = torch.nonzero(kept > pattern.n)
        if not len(crowded):
            return True
        row, group = crowded[0].tolist()
        found = f"row {row}, group {group} holds {int(kept[row, group])} non-zeros of {pattern.m}"
    else:
        found = f"its {rows} x {columns} weights make no groups of {pattern.m}"
    raise ValueError(f"layer {name!r} is {zeros:.1%} zeros and not {pattern}: {found}.")


def read_calibration(path: Path) -> str:
    """The beginning of a text, as much as 128 sequences can need.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text in UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no text file '{path}' for --calibration.")
    # No token has more than some tens of characters; a whole corpus need not be read.
    limit = CALIBRATION_SEQUENCES * CALIBRATION_LENGTH * 16
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(limit)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is no text in UTF-8 ({error.reason}); convert it with iconv -t UTF-8, or "
            "give --calibration another file."
        ) from error
    if not text.strip():
        raise ValueError(f"'{path}' holds no text to calibrate with.")
    return text


def calibration_ids(model: Any, tokenizer: Any, text: str) -> Tensor:
    """Tokens to measure the layers' inputs on, (S, L) int64.

    Args:
        model: L is its context, but 2048 at most.
        tokenizer: of the model.
        text: cut into sequences without overlap, of which the first 128 are taken; the rest of the
            tokens, too few for one, is left out. A text shorter than one sequence is one.

    Raises:
        ValueError: if there is no tokenizer, or the text is a single token.
    """
    if tokenizer is None:
        raise ValueError("wanda has text to read, but no tokenizer; type --tokenizer <path>.")
    context = getattr(model.config, "max_position_embeddings", None) or CALIBRATION_LENGTH
    length = min(int(context), CALIBRATION_LENGTH)
    # As much as is needed and not more is encoded.
    wanted = CALIBRATION_SEQUENCES * length
    ids = tokenizer(text[: wanted * 16], verbose=False)["input_ids"][:wanted]
    if len(ids) < 2:
        raise ValueError("the text for --calibration is one token long; give more of it.")
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
