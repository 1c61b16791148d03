"""Where things are in a transformers model, by name: what the skip options are about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class _Family:
    """Module paths, relative to the block or, for ``blocks``, ends of the path in the model."""

    blocks: str
    qkv: tuple[str, ...]
    output: str
    # ends of the paths of linear layers outside the blocks that stay dense beside the head
    outside: tuple[str, ...] = ()
    # those of them that a rule may prune
    optional: tuple[str, ...] = ()


_LLAMA = _Family(
    blocks="layers",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
)
_FAMILIES = {
    "gpt2": _Family(blocks="h", qkv=("attn.c_attn",), output="attn.c_proj"),
    "opt": _Family(
        blocks="layers",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.out_proj",
        # OPT-350m: between the narrow embedding and the blocks, and back.
        outside=("project_in", "project_out"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "bert": _Family(
        blocks="encoder.layer",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        output="attention.output.dense",
        outside=("pooler.dense", "predictions.transform.dense", "seq_relationship"),
        optional=("pooler.dense", "predictions.transform.dense"),
    ),
}


@dataclass(frozen=True)
class ModelStructure:
    """Names of a model's parts, in the model's order.

    Attributes:
        blocks: each transformer block.
        attention: per block, its Q, K, V (or fused QKV) and its output projection.
        first_qkv: Q, K, V of the first block, the first linear layers after the embedding.
        head: the output head, or None for a model without one.
        outside: further linear layers outside the blocks that stay dense: the projections
            around OPT-350m's embedding, BERT's pooler, prediction transform and next-sentence
            head.
        optional: those of them that a rule may prune: BERT's pooler and prediction transform.
    """

    blocks: list[str]
    attention: list[list[str]]
    first_qkv: list[str]
    head: str | None
    outside: list[str]
    optional: list[str]


def structure(model: nn.Module) -> ModelStructure:
    """The parts of a transformers model of a known family, dense or sparse.

    Raises:
        ValueError: if the model is of another family.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"the parts of {type(model).__name__} (model type {family!r}) are not known; known "
            f"types: {', '.join(_FAMILIES)}. Name the layers yourself with "
            "slope.SparsityConfig(skip=[...])."
        )
    names = _FAMILIES[family]
    modules = dict(model.named_modules())
    path, size = next(
        (path, len(module))
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and f".{path}".endswith(f".{names.blocks}")
    )
    blocks = [f"{path}.{index}" for index in range(size)]
    attention = [[f"{block}.{part}" for part in (*names.qkv, names.output)] for block in blocks]
    return ModelStructure(
        blocks=blocks,
        attention=attention,
        first_qkv=attention[0][: len(names.qkv)],
        head=_head(model, modules),
        outside=_ending(modules, names.outside),
        optional=_ending(modules, names.optional),
    )


def _ending(names: Iterable[str], ends: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]


def block_names(model: nn.Module) -> list[str]:
    """Module names of the transformer blocks, first to last."""
    return structure(model).blocks


def attention_names(model: nn.Module) -> list[str]:
    """Module names of QKV and output projection of every block."""
    return [name for block in structure(model).attention for name in block]


def tied_weights(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of parameter names that are one parameter, such as embedding and head.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> model["b"].weight = model["a"].weight
        >>> tied_weights(model)
        [('a.weight', 'b.weight')]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def _head(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return next((name for name, module in modules.items() if module is head), None)
