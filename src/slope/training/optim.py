"""Parameter groups, the optimizer, and learning rates as pure functions of the step.

Three groups: ``decay`` (weights of linear layers: 2-D tensors, a sparse layer's ``values`` among
them; for LAMB embeddings too), ``no_decay`` (biases, norms, else embeddings) and ``adapters`` (no
decay, own learning rate). A dormant adapter gets no gradient and so no optimizer state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LORA_LR_RATIO = 0.1
"""Adapters' peak learning rate over the model's, where ``pruner.lora_lr`` is null.

Measured (docs/comparison.md): a tenth helps a little whether adapters are active for the last 1 %
or 10 % of the steps; half the peak and more make the loss worse in the last 1 %.
"""


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_embeddings: bool = False
) -> list[dict[str, Any]]:
    """The groups of a model in a fixed order, adapters last; an empty group is left out.

    Each group has a ``name`` and the ``names`` of its parameters beside what an optimizer reads.
    """
    from slope import adapter_parameters

    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {
        "decay": [],
        "no_decay": [],
        "adapters": [],
    }
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not decay_embeddings
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in adapters:
            group = "adapters"
        elif parameter.ndim < 2 or id(parameter) in embedded:
            group = "no_decay"
        else:
            group = "decay"
        members[group].append((name, parameter))
    return [
        {
            "name": group,
            "names": [name for name, _ in pairs],
            "params": [parameter for _, parameter in pairs],
            "weight_decay": weight_decay if group == "decay" else 0.0,
        }
        for group, pairs in members.items()
        if pairs
    ]


def build_optimizer(
    groups: list[dict[str, Any]],
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW, AdamW with its state shared out over the processes (``adamw-zero``), or LAMB.

    Raises:
        ValueError: for another name.
    """
    if name not in ("adamw", "adamw-zero", "lamb"):
        raise ValueError(
            f"optimizer {name!r} is unknown; use optimizer=adamw or adamw-zero, or lamb for BERT."
        )
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    if name == "lamb":
        return _lamb(plain, lr, betas, eps)
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "fused": fused}
    if name == "adamw-zero" and torch.distributed.is_initialized():
        with warnings.catch_warnings():
            # torch 2.13 compiles other optimizers of that package with what it calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(plain, torch.optim.AdamW, **options)
    return torch.optim.AdamW(plain, **options)


def _lamb(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """LAMB (arXiv:1904.00962, version 3) as BERT is trained with it.

    The trust ratio is that of a whole tensor; zeros add nothing to a norm, so compressed values
    have the one of the dense weight with its zeros. Groups without decay do Adam's step: a bias or
    an adapter that begins at zero would hardly leave it in steps proportional to its own norm.
    """
    from pytorch_optimizer import Lamb

    for group in groups:
        group["adam"] = group["weight_decay"] == 0
    # adam_debias=False would divide the finished step by 1 - beta1^t.
    optimizer = Lamb(groups, lr=lr, betas=betas, eps=eps, weight_decouple=False, adam_debias=True)
    optimizer.clamp = math.inf  # else a norm above 10 counts as 10: a wide layer's is larger
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state tensors held by this process, the step counters left out."""
    inner = getattr(optimizer, "optim", optimizer)
    tensors = [
        value.to_local() if hasattr(value, "to_local") else value
        for state in inner.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim > 0
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class LearningRates:
    """Learning rates at an optimizer step, from nothing but the step.

    Args:
        peak: of the model, reached after the warm-up.
        warmup_steps: optimizer steps of linear warm-up; 0 starts at the peak.
        max_steps: the step at which the model's rate reaches ``minimum`` and the adapters' 0.
        minimum: last rate of the model.
        shape: of the way down, ``"linear"``, ``"cosine"`` (half a wave) or ``"polynomial"``: the
            share of all steps that are left, to the power of ``degree``. That of BERT: it is below
            the peak where the warm-up ends.
        degree: of the polynomial.
        lora_peak: of the adapters, reached at once at ``lora_start_step``, or, where that is step
            0, after the model's warm-up.
        lora_start_step: first step done with active adapters; None where there are none.
        lora_shape: of the adapters' rate from that step on: ``"linear"`` or ``"cosine"`` down to 0
            at ``max_steps``, ``"constant"``, or ``"model"``: the model's rate times ``lora_peak`` /
            ``peak``.
    """

    peak: float
    warmup_steps: int
    max_steps: int
    minimum: float = 0.0
    shape: str = "linear"
    degree: float = 0.5
    lora_peak: float = 0.0
    lora_start_step: int | None = None
    lora_shape: str = "linear"

    def model(self, step: int) -> float:
        """Linear warm-up to the peak, then down to the minimum at ``max_steps``."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        top = 0 if self.shape == "polynomial" else self.warmup_steps
        left = self._left(step, top, self.shape)
        return self.minimum + (self.peak - self.minimum) * left

    def adapters(self, step: int) -> float:
        """The schedule of their own over the window in which they are active; 0 while dormant."""
        start = self.lora_start_step
        if start is None or step < start:
            return 0.0
        if self.lora_shape == "model":
            return self.model(step) * self.lora_peak / self.peak
        if start == 0 and step < self.warmup_steps:
            return self.lora_peak * (step + 1) / self.warmup_steps
        if self.lora_shape == "constant":
            return self.lora_peak
        return self.lora_peak * self._left(step, start or self.warmup_steps, self.lora_shape)

    def _left(self, step: int, top: int, shape: str) -> float:
        """Share of the way down, from 1 at step ``top`` to 0 at ``max_steps``."""
        left = (self.max_steps - step) / max(1, self.max_steps - top)
        left = min(1.0, max(0.0, left))
        if shape == "polynomial":
            return left**self.degree
        return (1 - math.cos(math.pi * left)) / 2 if shape == "cosine" else left

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the rates of a step in every parameter group."""
        for group in optimizer.param_groups:
            adapters = group.get("name") == "adapters"
            group["lr"] = self.adapters(step) if adapters else self.model(step)


def with_options(
    state: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    betas: tuple[float, float],
    eps: float,
) -> dict[str, Any]:
    """Optimizer state with a run's own options, which loading would replace by those saved."""
    decays = {group["name"]: group["weight_decay"] for group in groups}
    changed = []
    for group in state["param_groups"]:
        decay = decays.get(group.get("name"), group["weight_decay"])
        options = {"betas": betas, "eps": eps, "weight_decay": decay}
        if "adam" in group:  # LAMB's, which is Adam where nothing decays
            options["adam"] = decay == 0
        changed.append({**group, **options})
    return {**state, "param_groups": changed}


def extend_optimizer_state(
    state: Mapping[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Optimizer state of a run without adapters, with an empty group for them at its end."""
    old = [dict(group) for group in state["param_groups"]]
    present = {group.get("name") for group in old}
    index = sum(len(group["params"]) for group in old)
    for group in groups:
        if group["name"] not in present:
            count = len(group["params"])
            added = {**old[-1], "name": group["name"], "weight_decay": group["weight_decay"]}
            added["params"] = list(range(index, index + count))
            old.append(added)
            index += count
    return {**state, "param_groups": old}
