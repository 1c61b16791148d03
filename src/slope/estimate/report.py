"""A request in, dense and sparse numbers side by side out."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from slope.estimate.memory import ServingBytes, TrainingBytes, serving_bytes, training_bytes
from slope.estimate.request import HOST, Request
from slope.estimate.shapes import ModelShape, shape_of
from slope.estimate.timing import Flops, StepSeconds, flops_per_token, step_seconds
from slope.estimate.traffic import Traffic, traffic

_MAX_DEVICES = 1024  # that are suggested


@dataclass(frozen=True)
class Side:
    """One of the two runs that are compared.

    Attributes:
        parameters: stored, adapters included.
        training: bytes per GPU.
        traffic: bytes sent in an optimizer step, with active adapters.
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
    traffic: Traffic
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
        dense: the dense model.
        sparse: the sparse one.
        awake: step of the sparse one once its adapters are active.
        measured_share: of the dense FLOPs of the linear layers, those in shapes that were measured.
        advice: what makes the sparse run fit; empty if it fits, or if nothing does.
        notes: every assumption, and the source of every number that is not counted.
    """

    request: Request
    model: ModelShape
    dense: Side
    sparse: Side
    awake: StepSeconds
    measured_share: float
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def speed_up(self) -> float:
        """Dense step / sparse step, adapters dormant."""
        return self.dense.step.total / self.sparse.step.total


def estimate(request: Request) -> Estimate:
    """Estimate a run.

    Raises:
        ValueError: if the model cannot be built or sparsified, or is not SLoPe's.
    """
    model = shape_of(request)
    sparse = _side(model, request, sparse=True)
    sizes = [
        (layer.size, request.rates.is_measured(layer.out_features, layer.in_features))
        for layer in model.linears
    ]
    share = sum(size for size, known in sizes if known) / sum(size for size, _ in sizes)
    return Estimate(
        request=request,
        model=model,
        dense=_side(model, request, sparse=False),
        sparse=sparse,
        awake=step_seconds(model, request, sparse=True, adapters=True),
        measured_share=share,
        advice=() if sparse.fits else tuple(_advice(model, request)),
        notes=tuple(_notes(model, request, share)),
    )


def _side(model: ModelShape, request: Request, *, sparse: bool) -> Side:
    training = training_bytes(model, request, sparse=sparse)
    flops = flops_per_token(model, request.seq, sparse=sparse)
    step = step_seconds(model, request, sparse=sparse)
    per_second = request.tokens * request.accumulate * request.devices / step.total
    return Side(
        parameters=model.stored(sparse),
        training=training,
        traffic=traffic(model, request, sparse=sparse),
        serving=serving_bytes(model, request, sparse=sparse),
        flops=flops,
        step=step,
        tokens_per_second=per_second,
        mfu=flops.model * per_second / (request.devices * request.rates.gpu.dense_flops),
        fits=training.total <= request.rates.usable_memory,
    )


def _advice(model: ModelShape, request: Request) -> Iterator[str]:
    """A smaller micro-batch, or else the fewest devices that share the state, with their bytes."""
    smaller = _fitting(model, request)
    if smaller is not None:
        sequences = request.batch * request.accumulate
        words = f"batch={smaller.batch} accumulate={-(-sequences // smaller.batch)}"
        yield f"{words}: {_gigabytes(model, smaller)} per GPU"
    devices = max(2, request.devices)
    while devices <= _MAX_DEVICES:
        spread = _fitting(model, replace(request, devices=devices, strategy="fsdp2"))
        if spread is not None:
            words = f"devices={devices} strategy=fsdp2 batch={spread.batch}"
            yield f"{words}: {_gigabytes(model, spread)} per GPU"
            return
        devices *= 2


def _fitting(model: ModelShape, request: Request) -> Request | None:
    """The request with the largest micro-batch up to its own that fits, None if none does."""

    def too_large(batch: int) -> bool:
        smaller = replace(request, batch=batch)
        return training_bytes(model, smaller, sparse=True).total > request.rates.usable_memory

    # Bytes grow with the batch: those that fit come first.
    fitting = bisect.bisect_left(range(1, request.batch + 1), True, key=too_large)
    return replace(request, batch=fitting) if fitting else None


def _gigabytes(model: ModelShape, request: Request) -> str:
    return f"{training_bytes(model, request, sparse=True).total / 1e9:.1f} GB"


def _notes(model: ModelShape, request: Request, share: float) -> Iterator[str]:
    rates, gpu = request.rates, request.rates.gpu
    yield (
        f"products: measured ({rates.measurement}); {share:.0%} of their FLOPs are in shapes that "
        "were measured, the rest is interpolated. The host's time is not in it: small products in "
        "eager mode are slower. Dense rates are those of 16 384 tokens."
    )
    if not gpu.measured:
        yield (
            f"{gpu.name}: not measured by us: rates scaled by peak from {rates.measured_on.name}, "
            "with that one's 2:4 speed-ups."
        )
    without = [layer for layer in model.sparse if not layer.has_kernels]
    if without:
        patterns = ", ".join(sorted({str(layer.pattern) for layer in without}))
        yield (
            f"{len(without)} of {len(model.sparse)} sparse layers ({patterns}) have no sparse "
            "kernels (2:4 in whole tiles of 64 has): their products are dense."
        )
    yield (
        f"attention: fused, at an assumed {gpu.attention_share:.0%} of the dense peak of "
        f"{gpu.dense_flops / 1e12:.0f} TFLOP/s ({gpu.attention_source}; {gpu.source})."
    )
    yield (
        f"bytes: at {rates.bandwidth / 1e12:.2f} TB/s, what a copy reaches; each operation is one "
        "fused kernel, which is the least it can cost."
    )
    yield (
        "memory: AdamW, fused attention, no activation checkpointing; of "
        f"{gpu.memory / 1e9:.0f} GB an assumed {rates.usable_memory / gpu.memory:.0%} is usable, "
        "the rest is for the CUDA context, workspaces and fragmentation."
    )
    if request.devices > 1:
        yield (
            f"exchange: bytes at the peak of NVLink, {gpu.link / 1e9:.0f} GB/s each way "
            f"({gpu.source}), hidden by the compute beside it."
        )
    if request.devices > HOST:
        yield f"the slower link between hosts of {HOST} devices is not counted in the time."
