"""Bytes on one GPU, for training and for serving.

All counts, no measurement. What is resident, per weight of a linear layer:

    precision     parameter  gradient  Adam's two moments  working copy of the products
    bf16              2          2         4                none
    bf16-mixed        4          4         8                2, dense layers only, until the backward
    fp16              4          4         8                2, dense layers only, until the backward

A sparse layer has n/m of the first three, its masks (2:4: 0.125 + 0.0625), and no working copy: its
operands are packed for one product and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from slope.estimate.shapes import LinearShape, ModelShape

COMPUTE = 2  # bytes of bf16 and fp16
# Logits in bf16, then in fp32 their log-softmax and its two gradients: what is alive at the peak.
LOGIT_BYTES = 2 + 4 + 4 + 4


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Attributes:
        parameter: of weights, biases, values and adapters.
        gradient: of ``.grad``.
        moments: of Adam's two moments together.
        residual: of the stream between the blocks.
    """

    parameter: int
    gradient: int
    moments: int
    residual: int

    @property
    def mixed(self) -> bool:
        """Whether products cast their operands: autocast over fp32 parameters."""
        return self.parameter != COMPUTE


def precision_of(name: str, moments: str | None = None) -> Precision:
    """Bytes of a precision; ``moments`` replaces the dtype that torch's AdamW takes."""
    chosen = Precision(2, 2, 4, 2) if name == "bf16" else Precision(4, 4, 8, 4)
    return chosen if moments is None else replace(chosen, moments=4 if moments == "bf16" else 8)


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes per GPU at the peak of a training step, at the end of the run, with active adapters.

    Attributes:
        weights: parameters.
        masks: metadata and column masks.
        gradients: of all parameters.
        optimizer: Adam's moments.
        working: casts of dense weights, and what the largest layer packs and computes on the way.
        exchange: buckets (DDP, ZeRO-1) or gathered blocks (FSDP); 0 on one device.
        activations: kept for the backward, logits included.
    """

    weights: float
    masks: float
    gradients: float
    optimizer: float
    working: float
    exchange: float
    activations: float

    @property
    def state(self) -> float:
        """Weights, masks, gradients and moments: what stays from step to step."""
        return self.weights + self.masks + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Everything."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ServingBytes:
    """Bytes on one GPU that serves in bf16.

    Attributes:
        weights: parameters; of sparse layers values and metadata.
        adapters: their parameters.
        cache: keys and values of batch x seq tokens.
    """

    weights: float
    adapters: float
    cache: float

    @property
    def total(self) -> float:
        """Everything."""
        return self.weights + self.adapters + self.cache


def training_bytes(
    model: ModelShape,
    precision: Precision,
    *,
    sparse: bool,
    batch: int,
    seq: int,
    devices: int = 1,
    strategy: str = "ddp",
) -> TrainingBytes:
    """Bytes of training the model, dense or sparse.

    Args:
        model: its sizes.
        precision: bytes per number.
        sparse: False for the dense model of the same shape.
        batch: sequences per micro-batch and device.
        seq: tokens per sequence.
        devices: GPUs.
        strategy: how the state is shared out. Buffers, that is masks, are on every GPU.
    """
    trained = model.rest + model.values + model.adapters if sparse else model.parameters
    shared_out = devices if strategy == "fsdp" else 1
    moments_over = devices if strategy in ("fsdp", "zero1") else 1
    gradients = trained * precision.gradient
    return TrainingBytes(
        weights=trained * precision.parameter / shared_out,
        masks=sum(layer.metadata + layer.column_mask for layer in model.sparse) if sparse else 0,
        gradients=gradients / shared_out,
        optimizer=trained * precision.moments / moments_over,
        working=_working_bytes(model, precision, sparse),
        exchange=0 if devices == 1 else _exchange_bytes(model, strategy, sparse, gradients),
        activations=activation_bytes(model, precision, batch * seq, sparse=sparse),
    )


def _working_bytes(model: ModelShape, precision: Precision, sparse: bool) -> float:
    dense = [layer for layer in model.linears if not sparse or layer.pattern is None]
    casts = COMPUTE * sum(layer.size for layer in dense) if precision.mixed else 0
    passing = [_passing_bytes(layer, precision, sparse) for layer in model.linears]
    return casts + max(passing)


def _passing_bytes(layer: LinearShape, precision: Precision, sparse: bool) -> float:
    """Bytes that live during the backward of one layer only."""
    gradient = COMPUTE * layer.size  # as the product writes it, before casting or gathering
    if layer.pattern is None or not sparse:
        return gradient if precision.mixed else 0
    return gradient + operand_bytes(layer)


def operand_bytes(layer: LinearShape) -> float:
    """Bytes of a sparse layer's operand: packed, 0.5625 of dense, or expanded without kernels."""
    return COMPUTE * layer.size * (0.5625 if layer.has_kernels else 1.0)


def _exchange_bytes(model: ModelShape, strategy: str, sparse: bool, gradients: float) -> float:
    if strategy != "fsdp":
        return gradients
    weights = sum(
        COMPUTE * (layer.values + layer.adapter if sparse else layer.size)
        for layer in model.linears
        if not layer.tied
    )
    head = max(COMPUTE * (layer.values if sparse else layer.size) for layer in model.linears)
    # The block that computes and the one fetched ahead, or a layer larger than both.
    return max(2 * weights / model.blocks, head)


def activation_bytes(
    model: ModelShape, precision: Precision, tokens: int, *, sparse: bool
) -> float:
    """Bytes kept for the backward: fused attention, no activation checkpointing.

    A sparse layer keeps its input as a dense one does, and R numbers per token for its adapter.
    Layers that read the same input keep it once.
    """
    d, r = model.width, precision.residual
    # RMSNorm is computed in fp32: it keeps the fp32 stream and the normalised stream.
    norm = (4 + r) * d if model.rms else r * d
    attention = COMPUTE * (2 * model.query + 2 * model.key_value) + 4 * model.heads
    inputs = 2 * COMPUTE * d  # of the query projection and of the MLP's first layer
    block = 2 * norm + inputs + attention + COMPUTE * model.kept * model.mlp
    if model.dropout:
        block += 2 * d  # one byte per decision
    last = norm + COMPUTE * d
    low = COMPUTE * sum(layer.rank for layer in model.linears) if sparse else 0
    return float(tokens * (model.blocks * block + last + low + LOGIT_BYTES * model.vocabulary))


def serving_bytes(model: ModelShape, *, sparse: bool, batch: int, seq: int) -> ServingBytes:
    """Bytes of serving the model in bf16, values and metadata.

    Not counted: the column mask, which is for training, and what cuSPARSELt's operand holds of the
    metadata once more while the model is on a GPU (1/16 of the dense bytes of sparse layers).
    """
    weights: float = COMPUTE * model.parameters
    if sparse:
        metadata = sum(layer.metadata for layer in model.sparse)
        weights = COMPUTE * (model.rest + model.values) + metadata
    per_token = 2 * COMPUTE * model.blocks * model.key_value if model.causal else 0
    adapters = COMPUTE * model.adapters if sparse else 0
    return ServingBytes(weights, adapters, float(per_token * batch * seq))
