"""Bytes on one GPU, for training and for serving.

All counts, no measurement. What is resident, per weight of a linear layer:

    precision     parameter  gradient  Adam's two moments  working copy of the products
    bf16              2          2         4                none
    bf16-mixed        4          4         8                2, dense layers only, until the backward

A sparse layer has n/m of the first three, its masks (2:4: 0.125 + 0.0625), and no working copy: its
operands are packed for one product and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from slope.estimate.request import Request
from slope.estimate.shapes import COMPUTE, ModelShape

# Logits in bf16, then in fp32 their log-softmax and its two gradients: what is alive at the peak.
_LOGIT_BYTES = 2 + 4 + 4 + 4


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes per GPU at the peak of a training step, at the end of the run, with active adapters.

    Attributes:
        weights: parameters.
        masks: metadata and column masks.
        gradients: of all parameters.
        optimizer: Adam's moments.
        working: casts of dense weights, and the largest gradient of a product.
        exchange: buckets (DDP, ZeRO-1), or gathered blocks and root (FSDP); 0 on one device.
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
        cache: keys and values of a micro-batch.
    """

    weights: float
    adapters: float
    cache: float


def training_bytes(model: ModelShape, request: Request, *, sparse: bool) -> TrainingBytes:
    """Bytes of training the model, dense or sparse. Masks are buffers, whole on every device."""
    size = request.sizes
    parameters = model.stored(sparse)
    return TrainingBytes(
        weights=parameters * size.parameter / request.state_shares,
        masks=sum(layer.metadata + layer.column_mask for layer in model.sparse) if sparse else 0,
        gradients=parameters * size.gradient / request.state_shares,
        optimizer=parameters * size.moments / request.moment_shares,
        working=_working_bytes(model, request, sparse),
        exchange=_exchange_bytes(model, request, sparse),
        activations=_activation_bytes(model, request, sparse),
    )


def serving_bytes(model: ModelShape, request: Request, *, sparse: bool) -> ServingBytes:
    """Bytes of serving the model in bf16, values and metadata.

    Not counted: the column mask, which is for training, and what cuSPARSELt's operand holds of the
    metadata once more while the model is on a GPU (1/16 of the dense bytes of sparse layers).
    """
    metadata = sum(layer.metadata for layer in model.sparse) if sparse else 0
    per_token = 2 * COMPUTE * model.blocks * model.key_value if model.causal else 0
    return ServingBytes(
        weights=COMPUTE * model.stored(sparse, adapters=False) + metadata,
        adapters=COMPUTE * model.adapters if sparse else 0,
        cache=per_token * request.tokens,
    )


def _working_bytes(model: ModelShape, request: Request, sparse: bool) -> float:
    """Casts, and one weight gradient in bf16 before it is cast or gathered."""
    mixed = request.sizes.mixed
    kept = mixed and not request.sharded  # FSDP gathers in bf16 and lets go
    casts = [layer.size for layer in model.linears if kept and not (sparse and layer.pattern)]
    passing = [layer.size for layer in model.linears if mixed or (sparse and layer.pattern)]
    return COMPUTE * (sum(casts) + max(passing, default=0))


def _exchange_bytes(model: ModelShape, request: Request, sparse: bool) -> float:
    if request.devices == 1:
        return 0
    if not request.sharded:
        return model.stored(sparse) * request.sizes.gradient
    sizes = [layer.values + layer.adapter if sparse else layer.size for layer in model.linears]
    blocks = sum(
        size
        for size, layer in zip(sizes, model.linears, strict=True)
        if layer.out_features != model.vocabulary
    )
    # Embeddings and norms stay gathered, in full precision, and their gradients come at the end.
    root = model.root * (request.sizes.parameter + request.sizes.gradient)
    # Of the rest the block that computes and the one fetched ahead, or a layer larger than both:
    # the head. Gradients of one block, as computed and as reduced.
    block, largest = blocks / model.blocks, max(sizes)
    passing = (COMPUTE + request.sizes.gradient) * max(block, largest)
    return root + COMPUTE * max(2 * block, largest) + passing


def _activation_bytes(model: ModelShape, request: Request, sparse: bool) -> float:
    """Bytes kept for the backward: fused attention, no activation checkpointing.

    A sparse layer keeps its input as a dense one does, and R numbers per token for its adapter.
    Layers that read the same input keep it once.
    """
    d, r = model.width, request.sizes.residual
    norm = (4 + r) * d if model.gated else r * d  # RMSNorm: the fp32 and the normalised stream
    attention = COMPUTE * (2 * model.query + 2 * model.key_value) + 4 * model.heads
    inputs = 2 * COMPUTE * d  # of the query projection and of the MLP's first layer
    block = 2 * norm + inputs + attention + COMPUTE * model.kept * model.mlp
    if model.dropout:
        block += 2 * d  # one byte per decision
    last = norm + COMPUTE * d
    low = COMPUTE * sum(layer.rank for layer in model.linears) if sparse else 0
    return request.tokens * (model.blocks * block + last + low + _LOGIT_BYTES * model.vocabulary)
