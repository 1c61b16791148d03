"""Bytes that the GPUs of a run send each other in an optimizer step, by exchanges on rings.

With N devices, H of them on a host, and P and G bytes of parameters and gradients:

==========  ========================================================  ==========================
strategy    a GPU sends                                               a host sends to the others
==========  ========================================================  ==========================
ddp         2 G (N-1)/N                                               the same
zero1       2 G (N-1)/N, and the new parameters P (N-1)/N             the same
fsdp2       per micro-batch 2 P' + G, times (N-1)/N                   the same
hsdp        per micro-batch 2 P' + G, times (H-1)/H, and once per     2 G (N/H - 1) / (N/H)
            step 2 G/H (N/H - 1) / (N/H) to other hosts
==========  ========================================================  ==========================

A ring over all GPUs leaves each host once, so a host sends what one GPU sends. P' are parameters as
they are gathered, in the precision of the products: for the forward and again for the backward.
FSDP also exchanges the column masks of each process's rows, one bit per kept value.
"""

from __future__ import annotations

from dataclasses import dataclass

from slope.estimate.request import Request
from slope.estimate.shapes import COMPUTE, ModelShape


@dataclass(frozen=True)
class Traffic:
    """Bytes sent in an optimizer step.

    Attributes:
        parameters: by one GPU, gathered or handed out.
        gradients: by one GPU, averaged.
        masks: by one GPU, column masks.
        leaving_host: by all GPUs of a host together, to other hosts.
    """

    parameters: float
    gradients: float
    masks: float
    leaving_host: float

    @property
    def sent(self) -> float:
        """By one GPU."""
        return self.parameters + self.gradients + self.masks


def traffic(model: ModelShape, request: Request, *, sparse: bool, adapters: bool = True) -> Traffic:
    """What is sent in an optimizer step.

    Args:
        model: its sizes.
        request: the run.
        sparse: False for the dense model of the same shape.
        adapters: whether adapters take part; while they sleep they have no gradients, but FSDP
            gathers them with their block.
    """
    trained = model.stored(sparse, adapters)
    size, steps, devices = request.sizes, request.accumulate, request.devices
    gradients = trained * size.gradient
    ring, hosts = _ring(devices), request.hosts
    if not request.sharded:
        given = model.stored(sparse) * size.parameter * ring if request.strategy == "zero1" else 0.0
        sent = 2 * gradients * ring
        return Traffic(given, sent, 0.0, sent + given if hosts > 1 else 0.0)
    gathered = 2 * COMPUTE * model.stored(sparse) * steps
    masks = float(sum(layer.column_mask for layer in model.sparse)) if sparse else 0.0
    inside = _ring(request.state_shares)
    if request.strategy == "fsdp2":
        parts = gathered * ring, gradients * steps * ring, masks * ring
        return Traffic(*parts, sum(parts) if hosts > 1 else 0.0)
    between = 2 * gradients * _ring(hosts)
    reduced = gradients * steps * inside + between / request.state_shares
    return Traffic(gathered * inside, reduced, masks * inside, between)


def _ring(members: int) -> float:
    """Share of a tensor that each member of a ring sends to gather or to reduce it."""
    return (members - 1) / members
