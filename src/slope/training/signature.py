"""What a checkpoint and a run must agree on, and late adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slope.layers import adapted_layers
from slope.linear import AdaptedLinear
from slope.methods import PrunedLinear
from slope.training.optim import extend_optimizer_state, parameter_groups
from slope.training.pruner import PRUNED_MATRIX

_RANK = "adapter rank of "
_MUST_MATCH = ("model.", "datamodule.max_length", "vocabulary", "pattern of ", "method of ", _RANK)
_CHOICES_OF_A_METHOD = ("reduction_dim", "prune_backward")


def config_signature(cfg: Any) -> dict[str, Any]:
    """The part that is known before the data: model, sequence length, initial weights, pruner.

    The ``pruner`` section is there whole: ``init_from`` rebuilds the layers of a checkpoint by it.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(values, dict)
    config = values.get("config") or {}
    signature = {f"model.config.{key}": value for key, value in sorted(config.items())}
    signature["model.family"] = values["family"]
    signature["datamodule.max_length"] = int(cfg.datamodule.max_length)
    signature["init_from"] = None if cfg.init_from is None else str(cfg.init_from)
    section = OmegaConf.to_container(cfg.pruner, resolve=True)
    assert isinstance(section, dict)
    section["pruned_matrix"] = PRUNED_MATRIX[str(section["pruned_matrix"]).lower()]
    return signature | {f"pruner.{key}": value for key, value in sorted(section.items())}


def model_signature(model: nn.Module, vocab_size: int) -> dict[str, Any]:
    """The part that is known with the model: vocabulary; pattern, method, adapter of each layer."""
    signature: dict[str, Any] = {"vocabulary": vocab_size}
    for name, layer in adapted_layers(model):
        signature[f"pattern of {name}"], signature[f"method of {name}"] = _pruning(layer)
        if layer.adapter is not None:
            signature[f"{_RANK}{name}"] = layer.adapter.rank
    return signature


def _pruning(layer: AdaptedLinear) -> tuple[str, str]:
    """Pattern and method of a layer, as far as its weights, masks or products depend on them."""
    pattern, method = str(layer.pattern), "static-weight"
    owner: object = layer
    if isinstance(layer, PrunedLinear):
        method, owner = layer.method.note, layer.method
        if layer.method.sparsity is not None:
            return f"{layer.method.sparsity:g}%", method
    for choice in _CHOICES_OF_A_METHOD:
        if not getattr(owner, choice, True):
            method += f", {choice}=False"
    return pattern, method


def check(saved: Mapping[str, Any], here: Mapping[str, Any], path: Path, whole: bool) -> list[str]:
    """Compare a checkpoint's signature with this run's.

    Args:
        saved: the checkpoint's.
        here: this run's; without the model's part unless ``whole``.
        path: of the checkpoint, for the message.
        whole: compare keys that only one side has, too.

    Returns:
        Differences that may be wanted (data, seed, batch), as sentences for the log.

    Raises:
        ValueError: if the checkpoint cannot continue in this run, naming the differences.
    """
    keys = sorted(set(saved) | set(here) if whole else set(saved) & set(here), key=_order)
    late = whole and not any(key.startswith(_RANK) for key in saved)
    fatal: list[str] = []
    mild: list[str] = []
    for key in keys:
        before, now = saved.get(key), here.get(key)
        if before == now or (late and key.startswith(_RANK)):
            continue
        text = f"{key} is {_say(before)} in it and {_say(now)} here"
        (fatal if key.startswith(_MUST_MATCH) else mild).append(text)
    if fatal:
        more = f", and {len(fatal) - 3} more" if len(fatal) > 3 else ""
        raise ValueError(
            f"checkpoint {path} is of another model: {'; '.join(fatal[:3])}{more}. Type the "
            "settings that the run was started with, or another name= for a new run."
        )
    return mild


def _order(key: str) -> tuple[int, str]:
    place = [i for i, start in enumerate(_MUST_MATCH) if key.startswith(start)]
    return (place[0] if place else len(_MUST_MATCH), key)


def _say(value: Any) -> str:
    return "absent" if value is None else repr(value) if isinstance(value, str) else str(value)


def adapt(content: dict[str, Any], module: nn.Module, model: nn.Module) -> bool:
    """Give the checkpoint of a run without adapters those of ``model``, untrained.

    They were drawn from generators of their own, so it does not matter when. The optimizer gets a
    group without state for them, as if they had slept from step 0.

    Returns:
        True if the checkpoint had none and the model has.
    """
    state = content["state_dict"]
    own = module.state_dict()
    names = [name for name in own if ".adapter." in name and name not in state]
    if not names:
        return False
    state.update({name: own[name].detach().clone() for name in names})
    groups = parameter_groups(model, 0.0)
    content["optimizer_states"] = [
        extend_optimizer_state(saved, groups) for saved in content["optimizer_states"]
    ]
    return True


def set_position(content: dict[str, Any], micro_batches: int) -> None:
    """Put Lightning's counters of micro-batches where they belong.

    They are the step times the accumulation, which changes with ``datamodule.batch_size`` and
    ``trainer.devices`` at the same global batch. A checkpoint is made at the end of a micro-batch,
    before Lightning counts it as completed.
    """
    fit = content["loops"]["fit_loop"]
    for scope in ("total", "current"):
        counters = fit["epoch_loop.batch_progress"][scope]
        for name in ("ready", "started", "processed"):
            counters[name] = micro_batches
        counters["completed"] = micro_batches - 1
    fit.pop("combined_loader", None)
