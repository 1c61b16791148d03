"""A request in, dense and sparse numbers side by side out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slope.estimate.memory import (
    Precision,
    ServingBytes,
    TrainingBytes,
    precision_of,
    serving_bytes,
    training_bytes,
)
from slope.estimate.rates import Rates
from slope.estimate.request import Request
from slope.estimate.shapes import ModelShape, shape_of
from slope.estimate.timing import Flops, StepSeconds, flops_per_token, step_seconds

# Most devices that are suggested.
_MAX_DEVICES = 1024
_HOST = 8


@dataclass(frozen=True)
class Side:
    """One of the two runs that are compared.

    Attributes:
        parameters: stored, adapters included.
        training: bytes per GPU.
        serving: bytes on one GPU.
        flops: per token.
        step: of an optimizer step, adapters dormant.
        tokens_per_second: of all devices.
        mfu: FLOPs of the *dense* model per second over the dense peak of the devices, so that both
            sides are measured by the same work.
        fits: whether training fits on each GPU.
    """

    parameters: int
    training: TrainingBytes
    serving: ServingBytes
    flops: Flops
    step: StepSeconds
    tokens_per_second: float
    mfu: float
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """What was asked, and the two sides.

    Attributes:
        request: what was asked.
        model: its sizes.
        precision: bytes per number.
        batch: sequences per micro-batch and device.
        seq: tokens per sequence.
        dense: the dense model.
        sparse: the sparse one.
        awake: step of the sparse one once its adapters are active.
        advice: what makes the sparse run fit; empty if it fits, or if nothing does.
        notes: what to know about these numbers.
    """

    request: Request
    model: ModelShape
    precision: Precision
    batch: int
    seq: int
    dense: Side
    sparse: Side
    awake: StepSeconds
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def speed_up(self) -> float:
        """Dense step / sparse step, adapters dormant."""
        return self.dense.step.total / self.sparse.step.total


def estimate(request: Request) -> Estimate:
    """Estimate a run.

    Raises:
        ValueError: if the model cannot be built, sparsified, or is shorter than the sequences.
    """
    model = shape_of(request)
    seq, batch = request.sequence(model.positions), request.batch
    precision = precision_of(request.precision, request.moments)
    dense = _side(request, model, precision, seq, sparse=False)
    sparse = _side(request, model, precision, seq, sparse=True)
    return Estimate(
        request=request,
        model=model,
        precision=precision,
        batch=batch,
        seq=seq,
        dense=dense,
        sparse=sparse,
        awake=_step(request, model, precision, seq, sparse=True, adapters=True),
        advice=() if sparse.fits else tuple(_advice(request, model, precision, seq)),
        notes=tuple(_notes(request, model)),
    )


def _step(
    request: Request,
    model: ModelShape,
    precision: Precision,
    seq: int,
    *,
    sparse: bool,
    adapters: bool = False,
) -> StepSeconds:
    return step_seconds(
        model,
        precision,
        request.rates,
        sparse=sparse,
        batch=request.batch,
        seq=seq,
        devices=request.devices,
        strategy=request.strategy,
        accumulate=request.accumulate,
        adapters=adapters,
    )


def _side(
    request: Request, model: ModelShape, precision: Precision, seq: int, *, sparse: bool
) -> Side:
    training = training_bytes(
        model,
        precision,
        sparse=sparse,
        batch=request.batch,
        seq=seq,
        devices=request.devices,
        strategy=request.strategy,
    )
    flops = flops_per_token(model, seq, sparse=sparse)
    step = _step(request, model, precision, seq, sparse=sparse)
    tokens = request.batch * seq * request.accumulate * request.devices
    per_second = tokens / step.total
    stored = model.rest + model.values + model.adapters
    return Side(
        parameters=stored if sparse else model.parameters,
        training=training,
        serving=serving_bytes(model, sparse=sparse, batch=request.batch, seq=seq),
        flops=flops,
        step=step,
        tokens_per_second=per_second,
        mfu=flops.model * per_second / (request.devices * request.rates.gpu.dense_flops),
        fits=training.total <= request.rates.usable_memory,
    )


def _advice(request: Request, model: ModelShape, precision: Precision, seq: int) -> Iterator[str]:
    """Changes that make the sparse run fit, the smallest first, each with its bytes."""
    limit = request.rates.usable_memory

    def total(batch: int, devices: int, strategy: str, chosen: Precision = precision) -> float:
        return training_bytes(
            model, chosen, sparse=True, batch=batch, seq=seq, devices=devices, strategy=strategy
        ).total

    def largest_batch(devices: int, strategy: str) -> int:
        """The largest micro-batch up to the one asked for that fits, 0 if none does."""
        batches = range(request.batch, 0, -1)
        return next((b for b in batches if total(b, devices, strategy) <= limit), 0)

    def say(words: str, size: float) -> str:
        return f"{words}: {size / 1e9:.1f} GB per GPU"

    batch, devices, strategy = request.batch, request.devices, request.strategy
    smaller = largest_batch(devices, strategy)
    if smaller:
        more = -(-request.accumulate * batch // smaller)
        yield say(
            f"batch={smaller} accumulate={more}, a smaller micro-batch",
            total(smaller, devices, strategy),
        )
    if devices > 1:
        for other in ("zero1", "fsdp"):
            size = total(batch, devices, other)
            if other != strategy and size <= limit:
                yield say(f"strategy={other}, the state shared out", size)
    count = 2
    while count <= _MAX_DEVICES:
        fitting = largest_batch(count, "fsdp")
        if count > devices and fitting:
            words = f"devices={count} strategy=fsdp"
            words += "" if fitting == batch else f" batch={fitting}"
            yield say(f"{words}, more devices", total(fitting, count, "fsdp"))
            break
        count *= 2
    if precision.mixed:
        whole = precision_of("bf16")
        size = total(batch, devices, strategy, whole)
        if size <= limit:
            yield say("precision=bf16, which rounds small updates away", size)


def _notes(request: Request, model: ModelShape) -> Iterator[str]:
    rates = request.rates
    if rates.gpu.caveat:
        yield rates.gpu.caveat
    without = sorted({str(layer.pattern) for layer in model.sparse if not layer.has_kernels})
    if without:
        count = sum(not layer.has_kernels for layer in model.sparse)
        yield (
            f"{count} of {len(model.sparse)} sparse layers ({', '.join(without)}) have no sparse "
            "kernels (2:4 in whole tiles of 64 has): estimated at dense speed."
        )
    if request.devices > _HOST:
        yield (
            f"{request.devices} devices are more than one host's {_HOST}: the slower link between "
            "hosts is not counted."
        )
    if request.devices > 1:
        yield "Exchange between devices: bytes at the peak of NVLink; arithmetic."


def measured_share(model: ModelShape, rates: Rates) -> float:
    """Share of the dense FLOPs of the linear layers whose very shape was measured."""
    total = sum(layer.size for layer in model.linears)
    known = sum(
        layer.size
        for layer in model.linears
        if rates.is_measured(layer.out_features, layer.in_features)
    )
    return known / total
