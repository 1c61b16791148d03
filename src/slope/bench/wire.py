"""Bytes of gradients that DDP puts on the wire, counted where it does: in a communication hook."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


class GradientBytes:
    """Counts gradients on their way to the all-reduce.

    Args:
        model: inside the DDP wrapper.

    Attributes:
        bytes: passed for each parameter, by its name, since the beginning.
        total: size of the buckets that were passed.

    Example:
        ``wrapped.register_comm_hook(None, GradientBytes(model).hook)``
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.bytes: Counter[str] = Counter()
        self.total = 0

    # DDP compares the annotations themselves, so this file does not postpone them.
    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Count a bucket and reduce it as DDP would."""
        self.total += bucket.buffer().nbytes
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.bytes[self._names[id(parameter)]] += gradient.nbytes
        return allreduce_hook(state, bucket)


def gradient_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> GradientBytes:
    """Count the bytes of one step of a model of transformers; the process group must exist.

    Args:
        model: called with ``inputs``, returns an object with ``loss``.
        inputs: of this process.
    """
    wrapped = DistributedDataParallel(model)
    count = GradientBytes(model)
    wrapped.register_comm_hook(None, count.hook)
    wrapped(**inputs).loss.backward()
    return count
