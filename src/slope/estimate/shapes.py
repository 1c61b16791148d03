"""The sizes of a model that bytes and times follow from; counted on a model without weights.

The model is built and sparsified on the meta device by the functions that a run uses, so counts are
exact and the same layers stay dense. Shape letters: I = d_in, O = d_out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slope.estimate.request import Request
from slope.pattern import NMPattern

COMPUTE = 2  # bytes of bf16, in which products are computed
# Tensors of the MLP's width that autograd keeps, by activation, as transformers computes it: ReLU
# keeps its output, which is the next layer's input; GELU its input as well; gelu_new is eight
# separate operations that keep five; SwiGLU keeps gate, SiLU(gate), up and their product.
_KEPT = {"relu": 1, "gelu": 2, "gelu_new": 5, "silu": 4}
_KERNELS = NMPattern(2, 4)


@dataclass(frozen=True)
class LinearShape:
    """A linear layer.

    Attributes:
        out_features: O.
        in_features: I.
        pattern: None if it stays dense.
        rank: of its adapter, 0 without.
        bias: whether it has one.
    """

    out_features: int
    in_features: int
    pattern: NMPattern | None
    rank: int
    bias: bool

    @property
    def size(self) -> int:
        """Weights of the dense layer, O I."""
        return self.out_features * self.in_features

    @property
    def density(self) -> float:
        """Share of the weights kept."""
        return self.pattern.density if self.pattern else 1.0

    @property
    def values(self) -> int:
        """Weights kept."""
        return round(self.size * self.density)

    @property
    def metadata(self) -> int:
        """Bytes of the packed positions."""
        return (
            self.out_features * self.pattern.metadata_bytes(self.in_features) if self.pattern else 0
        )

    @property
    def column_mask(self) -> int:
        """Bytes of the column mask."""
        return self.out_features * -(-self.values // self.out_features // 8) if self.pattern else 0

    @property
    def adapter(self) -> int:
        """Parameters of the adapter, (I + O) r."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def has_kernels(self) -> bool:
        """Whether 2:4 kernels serve the layer: 2:4, and whole tiles of 64."""
        tiles = self.out_features % 64 == 0 and self.in_features % 64 == 0
        return self.pattern == _KERNELS and tiles

    @property
    def operand(self) -> float:
        """Bytes of a sparse layer's operand: packed, or expanded where there are no kernels."""
        return COMPUTE * self.size * (0.5625 if self.has_kernels else 1.0)


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes.

    Attributes:
        linears: its linear layers, head included, in order.
        parameters: of the dense model, adapters not counted, tied ones once.
        width: of the residual stream.
        blocks: number of transformer blocks.
        heads: query heads.
        query: width of the queries.
        key_value: width of the keys, and of the values.
        mlp: width inside the MLP.
        kept: tensors of that width kept for the backward, per block.
        gated: whether blocks are LLaMA's: a gate in the MLP, rotated queries and keys, and RMSNorm,
            computed in fp32 step by step by transformers.
        shared_inputs: per block, layers that read what another one has read: K and V beside Q, up
            beside gate.
        dropout: whether there is dropout after attention and MLP.
        causal: whether attention looks back only, and there is a key/value cache.
        vocabulary: width of the logits.
    """

    linears: tuple[LinearShape, ...]
    parameters: int
    width: int
    blocks: int
    heads: int
    query: int
    key_value: int
    mlp: int
    kept: int
    gated: bool
    shared_inputs: int
    dropout: bool
    causal: bool
    vocabulary: int

    @property
    def sparse(self) -> tuple[LinearShape, ...]:
        """The sparse layers."""
        return tuple(layer for layer in self.linears if layer.pattern)

    @property
    def in_sparse_layers(self) -> int:
        """Weights of the sparse layers, were they dense."""
        return sum(layer.size for layer in self.sparse)

    @property
    def values(self) -> int:
        """Weights kept in the sparse layers."""
        return sum(layer.values for layer in self.sparse)

    @property
    def adapters(self) -> int:
        """Parameters of all adapters."""
        return sum(layer.adapter for layer in self.linears)

    @property
    def root(self) -> int:
        """Parameters outside linear layers, embeddings above all; a tied head is one of them."""
        linear = sum(layer.size for layer in self.linears)
        head = sum(x.size for x in self.linears if x.out_features == self.vocabulary)
        tied = self.parameters - linear < head
        return self.parameters - linear + (head if tied else 0)

    def stored(self, sparse: bool, adapters: bool = True) -> int:
        """Parameters of one of the two models that are compared."""
        if not sparse:
            return self.parameters
        kept = self.parameters - self.in_sparse_layers + self.values
        return kept + (self.adapters if adapters else 0)


def shape_of(request: Request) -> ModelShape:
    """Build, sparsify and measure the model of a request; needs no memory.

    Raises:
        ValueError: if the model cannot be built or sparsified, or is not SLoPe's.
    """
    import torch

    import slope
    from slope.models import build_model
    from slope.training.pruner import sparsity_config

    model: Any
    with torch.device("meta"):
        model = build_model(request.cfg.model, _vocabulary(request.cfg), max_length=1)
        settings = sparsity_config(request.cfg.pruner, model)
        if settings is None or not settings.compressed or not settings.prune_backward:
            raise ValueError(
                "only SLoPe's own layers are estimated: compressed values, pruned twice; leave out "
                "overrides of pruner.pruned_matrix, prune_backward, reduction_dim and the like."
            )
        report = slope.sparsify(model, settings)
    linears = tuple(
        LinearShape(
            layer.out_features,
            layer.in_features,
            layer.pattern,
            layer.rank,
            model.get_submodule(layer.name).bias is not None,
        )
        for layer in report.layers
    )
    config = model.config
    family = config.model_type
    gated = family not in ("gpt2", "opt", "bert")
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        linears=linears,
        parameters=report.parameters_dense,
        width=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=heads,
        query=heads * head,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head,
        mlp=_first(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * config.hidden_size,
        kept=_KEPT.get(_first(config, "activation_function", "hidden_act"), 2),
        gated=gated,
        shared_inputs=(0 if family == "gpt2" else 2) + gated,
        dropout=bool(_first(config, "resid_pdrop", "dropout", "hidden_dropout_prob")),
        causal=family != "bert",
        vocabulary=config.vocab_size,
    )


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that the configuration has; None if it has none of them."""
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def _vocabulary(cfg: Any) -> int:
    """Entries of the tokenizer; of one that is trained on the corpus, as many as it may have."""
    if cfg.model.config.get("vocab_size") is not None:
        return 1  # the model's own number counts
    from slope.data.tokenizer import vocabulary_entries

    return vocabulary_entries(str(cfg.datamodule.tokenizer))
