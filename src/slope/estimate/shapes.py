"""The sizes of a model that bytes and times follow from; counted on a model without weights.

The model is built and sparsified on the meta device by the functions that a run uses, so counts are
exact and the same layers stay dense. Shape letters: I = d_in, O = d_out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slope.estimate.request import Request
from slope.pattern import NMPattern

# Tensors of the MLP's width that autograd keeps, by activation, as transformers computes it: ReLU
# keeps its output, which is the next layer's input; GELU its input as well; gelu_new is eight
# separate operations that keep five; SwiGLU keeps gate, SiLU(gate), up and their product.
_KEPT_BY_ACTIVATION = {"relu": 1, "gelu": 2, "gelu_new": 5}
_KEPT_BY_GATED = 4


@dataclass(frozen=True)
class LinearShape:
    """A linear layer.

    Attributes:
        name: module path.
        out_features: O.
        in_features: I.
        pattern: None if it stays dense.
        rank: of its adapter, 0 without.
        bias: whether it has one.
        tied: whether its weight is another module's, such as the embedding's.
    """

    name: str
    out_features: int
    in_features: int
    pattern: NMPattern | None = None
    rank: int = 0
    bias: bool = False
    tied: bool = False

    @property
    def size(self) -> int:
        """Weights of the dense layer, O I."""
        return self.out_features * self.in_features

    @property
    def values(self) -> int:
        """Weights kept."""
        kept = self.in_features if self.pattern is None else self.pattern.kept(self.in_features)
        return self.out_features * kept

    @property
    def metadata(self) -> int:
        """Bytes of the packed positions."""
        if self.pattern is None:
            return 0
        return self.out_features * self.pattern.metadata_bytes(self.in_features)

    @property
    def column_mask(self) -> int:
        """Bytes of the column mask."""
        if self.pattern is None:
            return 0
        return self.out_features * -(-self.pattern.kept(self.in_features) // 8)

    @property
    def adapter(self) -> int:
        """Parameters of the adapter, (I + O) r."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def has_kernels(self) -> bool:
        """Whether 2:4 kernels serve the layer: 2:4, and whole tiles of 64."""
        tiles = self.out_features % 64 == 0 and self.in_features % 64 == 0
        return self.pattern == NMPattern(2, 4) and tiles


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
        gated: whether the MLP has a gate.
        shared_inputs: per block, layers that read what another one has read: K and V beside Q, up
            beside gate.
        rms: whether the norms are RMSNorm, computed in fp32 step by step by transformers.
        rotary: whether queries and keys are rotated.
        dropout: whether there is dropout after attention and MLP.
        causal: whether attention looks back only, and there is a key/value cache.
        vocabulary: width of the logits.
        positions: longest sequence.
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
    rms: bool
    rotary: bool
    dropout: bool
    causal: bool
    vocabulary: int
    positions: int

    @property
    def sparse(self) -> tuple[LinearShape, ...]:
        """The sparse layers."""
        return tuple(layer for layer in self.linears if layer.pattern is not None)

    @property
    def parameters_in_sparse_layers(self) -> int:
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
    def rest(self) -> int:
        """Parameters outside the sparse weights: embeddings, norms, biases, dense layers."""
        return self.parameters - self.parameters_in_sparse_layers


def shape_of(request: Request) -> ModelShape:
    """Build, sparsify and measure the model of a request; needs no memory.

    Raises:
        ValueError: if the model cannot be built or sparsified, or nothing in it is sparse.
    """
    import torch

    import slope
    from slope.models import build_model
    from slope.training.pruner import sparsity_config

    model_cfg = _shortened(request)
    with torch.device("meta"):
        model = build_model(model_cfg, _vocabulary(request.cfg), max_length=1)
        settings = sparsity_config(request.cfg.pruner, model)
        if settings is None:
            raise ValueError(
                "the pruner leaves the model dense, so there is nothing to compare; leave "
                f"pruner.pruned_matrix={request.cfg.pruner.pruned_matrix} out."
            )
        report = slope.sparsify(model, settings)
    modules = dict(model.named_modules())
    embedded = {
        id(parameter)
        for module in modules.values()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    linears = tuple(
        LinearShape(
            name=layer.name,
            out_features=layer.out_features,
            in_features=layer.in_features,
            pattern=layer.pattern,
            rank=layer.rank,
            bias=modules[layer.name].bias is not None,
            tied=id(modules[layer.name]._parameters.get("weight")) in embedded,
        )
        for layer in report.layers
    )
    return _sizes(model.config, linears, report.parameters_dense)


def _sizes(config: Any, linears: tuple[LinearShape, ...], parameters: int) -> ModelShape:
    family = config.model_type
    gated = family in ("llama", "mistral", "qwen2")
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    mlp = next(
        (
            size
            for key in ("intermediate_size", "ffn_dim", "n_inner")
            if (size := getattr(config, key, None))
        ),
        4 * width,
    )
    activation = next(
        getattr(config, key)
        for key in ("activation_function", "hidden_act")
        if hasattr(config, key)
    )
    dropout = next(
        (
            getattr(config, key)
            for key in ("resid_pdrop", "dropout", "hidden_dropout_prob")
            if hasattr(config, key)
        ),
        0.0,
    )
    return ModelShape(
        linears=linears,
        parameters=parameters,
        width=width,
        blocks=config.num_hidden_layers,
        heads=heads,
        query=heads * head,
        key_value=key_value_heads * head,
        mlp=mlp,
        kept=_KEPT_BY_GATED if gated else _KEPT_BY_ACTIVATION.get(activation, 2),
        gated=gated,
        shared_inputs=(0 if family == "gpt2" else 2) + gated,
        rms=gated,
        rotary=gated,
        dropout=dropout > 0,
        causal=family != "bert",
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
    )


def _shortened(request: Request) -> Mapping[str, Any]:
    """The ``model`` section, with as many blocks as asked for."""
    from omegaconf import OmegaConf

    cfg: Any = OmegaConf.to_container(request.cfg.model, resolve=True)
    if request.layers is not None:
        key = "n_layer" if "n_layer" in cfg["config"] else "num_hidden_layers"
        whole = cfg["config"][key]
        if request.layers > whole:
            raise ValueError(
                f"layers={request.layers} is more than the {whole} of {request.title}; type "
                f"layers={whole} or less."
            )
        cfg["config"][key] = request.layers
    sections: Mapping[str, Any] = cfg
    return sections


def _vocabulary(cfg: Any) -> int:
    """Entries of the tokenizer; of one that is trained on the corpus, as many as it may have."""
    if cfg.model.config.get("vocab_size") is not None:
        return 1  # the model's own number counts
    from slope.data.tokenizer import vocabulary_entries

    return vocabulary_entries(str(cfg.datamodule.tokenizer))
