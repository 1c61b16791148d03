"""Time of a training step: measured rates for the products, arithmetic for everything else.

- Products of linear layers: FLOPs at the rates measured (`rates.py`).
- Attention: FLOPs at an assumed share of the peak. Everything else: bytes at the rate of a copy,
  each operation counted as one fused kernel, which is the least it can cost.

Shape letters: T tokens of a micro-batch on one device, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from slope.estimate.memory import COMPUTE, Precision, operand_bytes
from slope.estimate.rates import Rates
from slope.estimate.shapes import LinearShape, ModelShape

# Per logit: cast to fp32, log-softmax, the gradients of both, cast back.
_LOGIT_TRAFFIC = (2 + 4) + (4 + 4) + 4 + (4 + 4 + 4) + (4 + 2)


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one optimizer step on one device; sums over its micro-batches.

    Attributes:
        products: of the linear layers, measured rates.
        attention: assumed share of the peak.
        elementwise: norms, activation, residuals, loss: bytes.
        upkeep: casts of dense weights; packing, column masks and gathering of sparse ones: bytes.
        optimizer: clipping and AdamW: bytes.
        exchange: what the exchange between devices takes beyond the compute that hides it.
    """

    products: float
    attention: float
    elementwise: float
    upkeep: float
    optimizer: float
    exchange: float

    @property
    def total(self) -> float:
        """Everything."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of training.

    Attributes:
        model: of the dense model: what MFU counts.
        done: executed; a sparse product counts n/m of the dense one.
    """

    model: float
    done: float


def step_seconds(
    model: ModelShape,
    precision: Precision,
    rates: Rates,
    *,
    sparse: bool,
    batch: int,
    seq: int,
    devices: int = 1,
    strategy: str = "ddp",
    accumulate: int = 1,
    adapters: bool = False,
) -> StepSeconds:
    """Expected time of an optimizer step.

    Args:
        model: its sizes.
        precision: bytes per number.
        rates: of the GPU.
        sparse: False for the dense model of the same shape.
        batch: sequences per micro-batch and device.
        seq: tokens per sequence.
        devices: GPUs of one host.
        strategy: how the state is shared out.
        accumulate: micro-batches per optimizer step.
        adapters: whether adapters are active (the last 1 % of the steps).
    """
    tokens = batch * seq
    costs = [_linear(layer, precision, rates, tokens, sparse) for layer in model.linears]
    products = sum(product for product, _ in costs)
    upkeep = sum(moved for _, moved in costs) / rates.bandwidth
    if sparse and adapters:
        products += sum(_adapter(layer, rates, tokens) for layer in model.linears)
    attention = (
        tokens
        * attention_flops(model, seq, training=True)
        / (rates.gpu.dense_flops * rates.gpu.attention_share)
    )
    elementwise = tokens * elementwise_bytes(model, precision) / rates.bandwidth

    trained = model.rest + model.values if sparse else model.parameters
    trained += model.adapters if sparse and adapters else 0
    gradients = trained * precision.gradient
    if accumulate > 1:  # all but the first micro-batch add to what is there
        upkeep += 3 * gradients * (accumulate - 1) / accumulate / rates.bandwidth
    updated = trained / (devices if strategy in ("fsdp", "zero1") else 1)
    per_parameter = 2 * precision.parameter + precision.gradient + 2 * precision.moments
    clipping = 3 * precision.gradient  # the norm reads, the factor reads and writes
    compute = (products + attention + elementwise + upkeep) * accumulate
    exchange = _exchange_seconds(strategy, devices, trained, precision, accumulate, rates.gpu.link)
    # The backward, two thirds of a micro-batch, hides an exchange of gradients; with FSDP the
    # gathers go along with all compute.
    hidden = compute if strategy == "fsdp" else compute / accumulate * 2 / 3
    return StepSeconds(
        products=products * accumulate,
        attention=attention * accumulate,
        elementwise=elementwise * accumulate,
        upkeep=upkeep * accumulate,
        optimizer=updated * (per_parameter + clipping) / rates.bandwidth,
        exchange=max(0.0, exchange - hidden),
    )


def flops_per_token(model: ModelShape, seq: int, *, sparse: bool) -> Flops:
    """FLOPs of forward and backward per token, attention included, nothing recomputed."""
    attention = attention_flops(model, seq, training=False) * 3
    dense = sum(6.0 * layer.size for layer in model.linears) + attention
    if not sparse:
        return Flops(dense, dense)
    done = sum(
        (2.0 + 4.0 * (layer.pattern.density if layer.pattern else 1.0)) * layer.size
        for layer in model.linears
    )
    return Flops(dense, done + attention)


def attention_flops(model: ModelShape, seq: int, *, training: bool) -> float:
    """FLOPs per token of scores and their product with the values, of all blocks.

    The forward; with ``training`` the backward too, 2.5 times the forward, since a fused kernel
    computes the scores again.
    """
    reach = seq / 2 if model.causal else seq
    forward = 4.0 * reach * model.query * model.blocks
    return forward * 3.5 if training else forward


def elementwise_bytes(model: ModelShape, precision: Precision) -> float:
    """Bytes read and written per token, forward and backward, outside products and attention."""
    c, r, d = COMPUTE, precision.residual, model.width
    norms = 2 * d * ((r + c) + (r + c + r))
    residuals = 2 * d * ((r + c + r) + 3 * r)
    passes = 8 if model.gated else 5  # forward 3 + backward 5 with a gate, 2 + 3 without
    activation = passes * c * model.mlp
    block = norms + residuals + activation
    if model.rotary:
        block += 4 * c * (model.query + model.key_value)
    if model.dropout:
        block += 2 * d * 2 * (2 * c + 1)
    block += 3 * c * d * model.shared_inputs  # input gradients that are added
    bias = sum(c * layer.out_features for layer in model.linears if layer.bias)
    return model.blocks * block + bias + _LOGIT_TRAFFIC * model.vocabulary


def _dense_seconds(layer: LinearShape, rates: Rates, tokens: int) -> float:
    """FLOPs at the measured rate, or bytes where these take longer."""
    out, in_ = layer.out_features, layer.in_features
    work = 2.0 * layer.size * tokens / rates.dense_flops(out, in_)
    moved = COMPUTE * (layer.size + tokens * (out + in_)) / rates.bandwidth
    return max(work, moved)


def _chosen(
    layer: LinearShape,
    rates: Rates,
    tokens: int,
    precision: Precision,
    product: str,
    dense: float,
) -> tuple[float, float]:
    """Seconds of a sparse layer's product, and bytes moved to make its operand.

    The way ``backend="auto"`` goes: a sparse product that would lose, packing included, is done as
    a dense one over the expanded weight; so is every product of a pattern without kernels.
    """
    assert layer.pattern is not None
    read = layer.values * precision.parameter + layer.metadata
    if product == "input_gradient":
        read += layer.column_mask
    expanding = read + COMPUTE * layer.size
    if not layer.has_kernels:
        return dense, expanding
    packing = read + operand_bytes(layer)
    ratio = rates.speed_up(product, layer.out_features, layer.in_features, tokens)
    fast, slow = dense / ratio, dense
    if fast + packing / rates.bandwidth < slow + expanding / rates.bandwidth:
        return fast, packing
    return slow, expanding


def _linear(
    layer: LinearShape, precision: Precision, rates: Rates, tokens: int, sparse: bool
) -> tuple[float, float]:
    """Seconds of a layer's three products, and bytes that are moved beside them."""
    dense = _dense_seconds(layer, rates, tokens)
    if layer.pattern is None or not sparse:
        # fp32 -> bf16 before the forward, and the gradient back.
        casts = 2 * (precision.parameter + COMPUTE) * layer.size if precision.mixed else 0
        return 3 * dense, casts
    forward, packing = _chosen(layer, rates, tokens, precision, "forward", dense)
    backward, packing_columns = _chosen(layer, rates, tokens, precision, "input_gradient", dense)
    refresh = layer.values * precision.parameter + layer.metadata + layer.column_mask
    gather = COMPUTE * layer.size + layer.metadata + layer.values * precision.gradient
    return forward + backward + dense, packing + packing_columns + refresh + gather


def _adapter(layer: LinearShape, rates: Rates, tokens: int) -> float:
    """Seconds of an active adapter: six thin products, and its two terms that are added."""
    if not layer.rank:
        return 0.0
    out, in_, rank = layer.out_features, layer.in_features, layer.rank
    seconds = 0.0
    for wide in (out, in_):
        flops = 2.0 * tokens * wide * rank
        moved = COMPUTE * (tokens * (wide + rank) + wide * rank)
        seconds += 3 * max(flops / rates.dense_flops(out, in_), moved / rates.bandwidth)
        seconds += 3 * COMPUTE * tokens * wide / rates.bandwidth
    return seconds


def _exchange_seconds(
    strategy: str,
    devices: int,
    trained: int,
    precision: Precision,
    accumulate: int,
    link: float,
) -> float:
    """Seconds that ring exchanges of a step take at the peak of the link."""
    part = (devices - 1) / devices  # 0 on one device
    gradients = trained * precision.gradient
    if strategy == "ddp":
        moved = 2 * gradients  # reduce, then hand out
    elif strategy == "zero1":
        moved = 2 * gradients + trained * precision.parameter
    else:  # gather for the forward and again for the backward of each micro-batch, reduce once
        moved = 2 * COMPUTE * trained * accumulate + gradients
    return moved * part / link
