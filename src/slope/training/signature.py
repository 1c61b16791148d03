"""What a checkpoint and a run must agree on, and late adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slope.layers import adapted_layers
from slope.linear import AdaptedLinear
from slope.methods import PrunedLinear
from slope.training.module import LanguageModule
from slope.training.optim import extend_optimizer_state, with_options
from slope.training.pruner import PRUNED_MATRIX

_RANK = "adapter rank of "
_MUST_MATCH = ("model.", "datamodule.max_length", "vocabulary", "pattern of ", "method of ", _RANK)
_SAME_RUN = ("train.optimizer.name", "train.optimizer.decay_embeddings", "seed", "data")
_CHOICES_OF_A_METHOD = ("reduction_dim", "prune_backward")


def config_signature(cfg: Any) -> dict[str, Any]:
    """The part that is known before the data: model, initial weights, pruner, how it is trained.

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
    signature |= {f"pruner.{key}": value for key, value in sorted(section.items())}
    for part in ("optimizer", "scheduler"):
        section = OmegaConf.to_container(cfg.train[part], resolve=True)
        assert isinstance(section, dict)
        signature |= {f"train.{part}.{key}": value for key, value in sorted(section.items())}
    if signature["train.optimizer.name"] == "adamw-zero":
        signature["train.optimizer.name"] = "adamw"  # the same state, shared out
    for key in ("precision", "gradient_clip_val"):
        signature[f"trainer.{key}"] = cfg.trainer[key]
    return signature


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
        Differences that may be wanted (rates, batch), as sentences for the log.

    Raises:
        ValueError: if the checkpoint cannot continue in this run, naming the differences.
    """
    keys = sorted(set(saved) | set(here) if whole else set(saved) & set(here), key=_order)
    late = whole and not any(key.startswith(_RANK) for key in saved)
    fatal: list[str] = []
    other: list[str] = []
    mild: list[str] = []
    for key in keys:
        before, now = saved.get(key), here.get(key)
        if before == now or (late and key.startswith(_RANK)):
            continue
        text = f"{key} is {_say(before)} in it and {_say(now)} here"
        if key == "data":
            text = "corpus, split or tokenizer are not those that it has seen"
        same_run = key in _SAME_RUN and key in saved
        (fatal if key.startswith(_MUST_MATCH) else other if same_run else mild).append(text)
    if fatal or other:
        what, found = ("model", fatal) if fatal else ("run", other)
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"checkpoint {path} is of another {what}: {'; '.join(found[:3])}{more}. Type the "
            "settings that the run was started with, or another name= for a new run."
        )
    return mild


def _order(key: str) -> tuple[int, str]:
    place = [i for i, start in enumerate(_MUST_MATCH) if key.startswith(start)]
    return (place[0] if place else len(_MUST_MATCH), key)


def _say(value: Any) -> str:
    return "absent" if value is None else repr(value) if isinstance(value, str) else str(value)


def adapt(content: dict[str, Any], module: LanguageModule) -> bool:
    """Give a checkpoint this run's options of the optimizer, and its adapters where it has none.

    The adapters are untrained: they were drawn from generators of their own, so it does not matter
    when. The optimizer gets a group without state for them, as if they had slept from step 0.

    Returns:
        True if the checkpoint had none and the model has.
    """
    groups = module.parameter_groups()
    states = [
        with_options(saved, groups, module.betas, module.eps)
        for saved in content["optimizer_states"]
    ]
    content["optimizer_states"] = states
    state = content["state_dict"]
    own = module.state_dict()
    names = [name for name in own if ".adapter." in name and name not in state]
    if not names:
        return False
    state.update({name: own[name].detach().clone() for name in names})
    content["optimizer_states"] = [extend_optimizer_state(saved, groups) for saved in states]
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
