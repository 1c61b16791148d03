"""Time of a training step: measured rates for the products, arithmetic for everything else.

- Products of linear layers: FLOPs at the rates measured (`rates.py`).
- Attention: FLOPs at an assumed share of the peak. Everything else: bytes at the rate of a copy,
  each operation counted as one fused kernel, which is the least it can cost.

Shape letters: T tokens of a micro-batch on one device, I = d_in, O = d_out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from slope.estimate.request import Request
from slope.estimate.shapes import COMPUTE, LinearShape, ModelShape
from slope.estimate.traffic import traffic

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
    """Floating-point operations per token of training, attention included, nothing recomputed.

    Attributes:
        model: of the dense model: what MFU counts.
        done: executed; a sparse product counts n/m of the dense one.
    """

    model: float
    done: float


def flops_per_token(model: ModelShape, seq: int, *, sparse: bool) -> Flops:
    """FLOPs of forward and backward per token."""
    attention = 3 * _attention_flops(model, seq)
    dense = attention + sum(6.0 * layer.size for layer in model.linears)
    done = sum((2 + 4 * layer.density) * layer.size for layer in model.linears)
    return Flops(dense, attention + done if sparse else dense)


def step_seconds(
    model: ModelShape, request: Request, *, sparse: bool, adapters: bool = False
) -> StepSeconds:
    """Expected time of an optimizer step.

    Args:
        model: its sizes.
        request: the run.
        sparse: False for the dense model of the same shape.
        adapters: whether adapters are active (the last 1 % of the steps).
    """
    rates, size, steps = request.rates, request.sizes, request.accumulate
    costs = [_linear(layer, request, sparse) for layer in model.linears]
    products = sum(product for product, _ in costs)
    if adapters:
        products += sum(_adapter(layer, request) for layer in model.linears)
    # A fused kernel computes the scores again for the backward: 2.5 times the forward.
    attention = 3.5 * request.tokens * _attention_flops(model, request.seq)
    attention /= rates.gpu.dense_flops * rates.gpu.attention_share
    elementwise = request.tokens * _elementwise_bytes(model, size.residual) / rates.bandwidth
    trained = model.stored(sparse, adapters)
    # All micro-batches but the first add to the gradients that are there.
    adding = 3 * trained * size.gradient * (steps - 1) / steps
    upkeep = (sum(moved for _, moved in costs) + adding) / rates.bandwidth
    # AdamW reads the gradient and rewrites the rest; clipping: the norm reads, the factor rewrites.
    update = 2 * size.parameter + 2 * size.moments + (1 + 3) * size.gradient
    compute = products + attention + elementwise + upkeep
    return StepSeconds(
        products=products * steps,
        attention=attention * steps,
        elementwise=elementwise * steps,
        upkeep=upkeep * steps,
        optimizer=trained / request.moment_shares * update / rates.bandwidth,
        exchange=_exchange_seconds(model, request, sparse, adapters, compute),
    )


def _attention_flops(model: ModelShape, seq: int) -> float:
    """FLOPs per token of scores and their product with the values, of all blocks, forward."""
    return 4.0 * (seq / 2 if model.causal else seq) * model.query * model.blocks


def _elementwise_bytes(model: ModelShape, r: int) -> float:
    """Bytes read and written per token, forward and backward, outside products and attention.

    Args:
        model: its sizes.
        r: bytes per number of the residual stream.
    """
    c, d = COMPUTE, model.width
    norms = 2 * d * ((r + c) + (r + c + r))
    residuals = 2 * d * ((r + c + r) + 3 * r)
    passes = 8 if model.gated else 5  # forward 3 + backward 5 with a gate, 2 + 3 without
    block = norms + residuals + passes * c * model.mlp
    if model.gated:
        block += 4 * c * (model.query + model.key_value)  # rotation
    if model.dropout:
        block += 2 * d * 2 * (2 * c + 1)
    block += 3 * c * d * model.shared_inputs  # input gradients that are added
    bias = sum(c * layer.out_features for layer in model.linears if layer.bias)
    return model.blocks * block + bias + _LOGIT_TRAFFIC * model.vocabulary


def _linear(layer: LinearShape, request: Request, sparse: bool) -> tuple[float, float]:
    """Seconds of a layer's three products, and bytes that are moved beside them."""
    size, tokens = request.sizes, request.tokens
    dense = _dense_seconds(layer, request)
    if not (sparse and layer.pattern):
        # fp32 -> bf16 before the forward, and the gradient back.
        return 3 * dense, 2 * (size.parameter + COMPUTE) * layer.size if size.mixed else 0
    read = layer.values * size.parameter + layer.metadata
    # The weight gradient is dense, then gathered; the column mask is chosen anew.
    seconds, moved = (
        dense,
        float(COMPUTE * layer.size) + layer.metadata + layer.values * size.gradient,
    )
    moved += read + layer.column_mask
    for product in ("forward", "input_gradient"):
        source = read + (layer.column_mask if product == "input_gradient" else 0)
        # As backend="auto" chooses: the faster, operand included.
        ways: list[tuple[float, float]] = [(dense, source + COMPUTE * layer.size)]
        if layer.has_kernels:
            gain = request.rates.speed_up(product, layer.out_features, layer.in_features, tokens)
            ways.append((dense / gain, source + layer.operand))
        best = min(ways, key=lambda way: way[0] + way[1] / request.rates.bandwidth)
        seconds, moved = seconds + best[0], moved + best[1]
    return seconds, moved


def _dense_seconds(layer: LinearShape, request: Request) -> float:
    """FLOPs at the measured rate, or bytes where these take longer."""
    out, in_, rates = layer.out_features, layer.in_features, request.rates
    work = 2.0 * layer.size * request.tokens / rates.dense_flops(out, in_)
    moved = COMPUTE * (layer.size + request.tokens * (out + in_)) / rates.bandwidth
    return max(work, moved)


def _adapter(layer: LinearShape, request: Request) -> float:
    """Seconds of an active adapter: six thin products, and its terms that are added."""
    tokens, rates, rank = request.tokens, request.rates, layer.rank
    seconds = 0.0
    for wide in (layer.out_features, layer.in_features) if rank else ():
        work = 2.0 * tokens * wide * rank / rates.dense_flops(layer.out_features, layer.in_features)
        moved = COMPUTE * (tokens * (wide + rank) + wide * rank) / rates.bandwidth
        seconds += 3 * (max(work, moved) + COMPUTE * tokens * wide / rates.bandwidth)
    return seconds


def _exchange_seconds(
    model: ModelShape, request: Request, sparse: bool, adapters: bool, compute: float
) -> float:
    """Seconds of ring exchanges at the peak of the link, beyond the compute that hides them.

    Args:
        model: its sizes.
        request: the run.
        sparse: False for the dense model.
        adapters: whether they are active.
        compute: seconds of a micro-batch.
    """
    sent = traffic(model, request, sparse=sparse, adapters=adapters).sent
    # All micro-batches of FSDP exchange; else the backward of the last one does.
    hidden = compute * (request.accumulate if request.sharded else 2 / 3)
    return max(0.0, sent / request.rates.gpu.link - hidden)
