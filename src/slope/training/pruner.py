"""From the ``pruner`` section of a configuration to a :class:`slope.SparsityConfig`.

The names are the published ones. What this version does not do yet is an error, never ignored:
a run that silently pruned something else would be worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from slope.config import SparsityConfig
    from slope.models import ModelStructure

# published spelling -> method
PRUNED_MATRIX = {
    "none": "dense",
    "dense": "dense",
    "static-weight": "static-weight",
    "weight-static": "static-weight",
    "dynamic-weight": "dynamic-weight",
    "weight-dynamic": "dynamic-weight",
    "static-input": "static-input",
    "input-static": "static-input",
    "dynamic-input": "dynamic-input",
    "input-dynamic": "dynamic-input",
    "dynamic-output-grad": "dynamic-output-grad",
    "output-grad-dynamic": "dynamic-output-grad",
    "dynamic-grad": "dynamic-output-grad",
    "grad-dynamic": "dynamic-output-grad",
}
_IMPLEMENTED = ("dense", "static-weight")
_USE_SLOPE = "use pruner.pruned_matrix=static-weight pruner.reduction_dim=True (SLoPe)"


def sparsity_config(cfg: Mapping[str, Any], model: nn.Module) -> SparsityConfig | None:
    """What to sparsify in ``model``, or None for dense training.

    Args:
        cfg: the ``pruner`` section.
        model: a model from :func:`slope.models.build_model`, still dense; the meta device will do.

    Returns:
        The library's settings. ``skip`` holds what the skip options name; that embeddings, norms,
        tied weights, the head and block 0's QKV stay dense is the library's default.

    Raises:
        ValueError: for a value that is wrong, or that this version has no method for.
    """
    if not check_pruner(cfg):
        return None
    from slope.config import SparsityConfig
    from slope.models import structure

    return SparsityConfig(
        pattern=cfg["pattern"],
        mask=cfg["mask"],
        seed=int(cfg.get("mask_seed", 0)),
        column_mask_interval=cfg["column_mask_interval"],
        adapter_rank=_rank(cfg["lora_rank"]) if cfg["add_lora"] else 0,
        skip=_skip(cfg, structure(model)),
        rules=_rules(cfg["rules"]),
        backend=cfg["backend"],
    )


def check_pruner(cfg: Mapping[str, Any]) -> bool:
    """Check the ``pruner`` section without a model; True if it asks for a sparse one.

    Raises:
        ValueError: for a value that is wrong, or that this version has no method for.
    """
    method = _method(cfg["pruned_matrix"])
    if method == "dense":
        return False  # the same command is the dense baseline, whatever the other keys say
    if not cfg["reduction_dim"]:
        raise ValueError(
            "pruner.reduction_dim=False (forward pruned along d_out) is not implemented in this "
            f"version; {_USE_SLOPE}."
        )
    if cfg["unstructured_masking"]:
        raise ValueError(
            "pruner.unstructured_masking=True is not implemented in this version; leave it False "
            "and choose an N:M pattern, for example pruner.pattern=2:4."
        )
    if str(cfg["sparsity_increment"]).strip() not in ("", "-1"):
        raise ValueError(
            f"pruner.sparsity_increment={cfg['sparsity_increment']!r} is not implemented in this "
            "version; give blocks patterns of their own with pruner.rules, for example "
            '\'pruner.rules=[["transformer.h.0","2:8"]]\'.'
        )
    if cfg["accelerate"]:
        raise ValueError(
            "pruner.accelerate=True is not implemented in this version; leave it False, "
            "pruner.backend=auto picks the fastest backend there is."
        )
    _check_pattern(cfg["pattern"])
    _rules(cfg["rules"])
    if cfg["add_lora"]:
        _rank(cfg["lora_rank"])
        _check_start(cfg["lora_start"])
        _check_lr(cfg["lora_lr"])
    return True


def _method(value: Any) -> str:
    name = "none" if value is None else str(value).lower()
    if name not in PRUNED_MATRIX:
        raise ValueError(
            f"pruner.pruned_matrix={value!r} is unknown; choose static-weight (SLoPe) or none "
            f"(dense). The published names are {', '.join(PRUNED_MATRIX)}."
        )
    method = PRUNED_MATRIX[name]
    if method not in _IMPLEMENTED:
        raise ValueError(
            f"pruner.pruned_matrix={name} is not implemented in this version; {_USE_SLOPE}, or "
            "pruner.pruned_matrix=none for dense training."
        )
    return method


def _check_pattern(pattern: Any) -> None:
    from slope.pattern import NMPattern

    if isinstance(pattern, int):
        raise ValueError(
            f"pruner.pattern={pattern} is a number; YAML reads 2:4 as 124, so write it in quotes: "
            'pattern: "2:4".'
        )
    NMPattern.parse(pattern)


def _rank(rank: Any) -> int | float:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ValueError(f"pruner.lora_rank={rank!r} must be a number, for example 16 or 0.0156.")
    if rank == 0:
        raise ValueError(
            "pruner.lora_rank=0 is no adapter; set pruner.add_lora=False, or a rank of at least 1."
        )
    if 0 < rank < 1:
        return rank
    if rank < 0 or rank != int(rank):
        raise ValueError(
            f"pruner.lora_rank={rank} must be a whole number of at least 1 (the rank) or a number "
            "between 0 and 1 (rank / d_in), for example 16 or 0.0156."
        )
    return int(rank)


def _check_start(start: Any) -> None:
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 < start <= 1:
        raise ValueError(
            f"pruner.lora_start={start} is outside (0, 1]; it is the share of the steps before "
            "the adapters start, for example pruner.lora_start=0.99."
        )


def _check_lr(lr: Any) -> None:
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or lr <= 0):
        raise ValueError(f"pruner.lora_lr={lr} must be a number above 0, or null.")


def _rules(rules: Sequence[Any] | None) -> tuple[tuple[str, str], ...]:
    for rule in rules or ():
        pair = not isinstance(rule, str) and len(rule) == 2
        if not pair or not all(isinstance(part, str) for part in rule):
            shown = rule if isinstance(rule, str) else list(rule)
            raise ValueError(
                f"pruner.rules has {shown!r}; a rule is a pair of texts [name pattern, n:m or "
                'dense], for example \'pruner.rules=[["*.mlp.*","2:8"]]\'.'
            )
        if rule[1] != "dense":
            _check_pattern(rule[1])
    return tuple((rule[0], rule[1]) for rule in rules or ())


def _skip(cfg: Mapping[str, Any], parts: ModelStructure) -> tuple[str, ...]:
    """Names that the skip options keep dense, in the model's order, none inside another."""
    skip = list(parts.outside)
    whole = set()
    if cfg["skip_first_block"]:
        whole.add(parts.blocks[0])
    if cfg["skip_last_block"]:
        whole.add(parts.blocks[-1])
    for block, attention in zip(parts.blocks, parts.attention, strict=True):
        if block in whole:
            skip.append(block)
        elif cfg["skip_attention"]:
            skip.extend(attention)
    return tuple(skip)
