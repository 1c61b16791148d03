"""From the ``pruner`` section of a configuration to a :class:`slope.SparsityConfig`.

The names are the published ones, and ours beside them; docs/methods.md says what each does. A
combination that has no meaning is an error, never ignored: a run that silently pruned something
else would be worse than none. An option of something that is switched off (``lora_rank`` without
``add_lora``) is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope.pattern import NMPattern
from slope.training.increments import Increment

if TYPE_CHECKING:
    from torch import nn

    from slope.config import SparsityConfig
    from slope.models import ModelStructure
    from slope.schedule import SlopeSchedule
    from slope.sparsity import SparsityReport

# spelling -> method
PRUNED_MATRIX = {
    "none": "dense",
    "dense": "dense",
    "static-weight": "static-weight",
    "weight-static": "static-weight",
    "dynamic-weight": "dynamic-weight",
    "weight-dynamic": "dynamic-weight",
    "static-input": "static-input",
    "input-static": "static-input",
    "dynamic-input": "dynamic-input",
    "input-dynamic": "dynamic-input",
    "dynamic-output-grad": "dynamic-output-grad",
    "output-grad-dynamic": "dynamic-output-grad",
    "dynamic-grad": "dynamic-output-grad",
    "grad-dynamic": "dynamic-output-grad",
    "fst": "fst",
    "s-ste": "s-ste",
}
LORA_SCHEDULES = ("linear", "cosine", "constant", "model")
# slope.SparsityConfig, slope.SlopeSchedule and Evolution -> key of the section, where they differ
_KEYS = {
    "method": "pruned_matrix",
    "seed": "mask_seed",
    "adapter_rank": "lora_rank",
    "adapter_scale": "lora_scale",
    "adapter_init": "lora_init",
    "interval": "evolve_interval",
    "fraction": "evolve_fraction",
    "stop": "evolve_stop",
    **{
        name: name
        for name in (
            "backend", "column_mask_interval", "dense_start", "lora_start", "mask", "mask_rescale",
            "mvue", "pattern", "prune_backward", "reduction_dim", "rules", "srste_decay",
        )
    },
}  # fmt: skip


def sparsity_config(cfg: Mapping[str, Any], model: nn.Module) -> SparsityConfig | None:
    """What to sparsify in ``model``, or None for dense training.

    Args:
        cfg: the ``pruner`` section.
        model: a model from :func:`slope.models.build_model`, still dense; the meta device will do.

    Returns:
        The library's settings. ``skip`` holds what the skip options name, ``rules`` the user's,
        after them those of ``sparsity_increment`` and of the model; that embeddings, norms, tied
        weights, the head and block 0's QKV stay dense is the library's default.

    Raises:
        ValueError: for a value that is wrong, or a combination that has no meaning.
    """
    if not check_pruner(cfg):
        return None
    from slope.models import structure

    parts = structure(model)
    increment = Increment.parse(cfg["sparsity_increment"])
    rules = (
        *_rules(cfg["rules"]),
        *increment.rules(NMPattern.parse(cfg["pattern"]), model, parts),
        *((name, "dense") for name in parts.optional),
    )
    return _settings(cfg, skip=_skip(cfg, parts), rules=rules)


def apply(
    cfg: Mapping[str, Any],
    model: nn.Module,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    choose_masks: bool = True,
) -> SparsityReport | None:
    """Sparsify ``model`` in place as the section says; None if it is to stay dense.

    Args:
        cfg: the ``pruner`` section.
        model: a dense model from :func:`slope.models.build_model`; the meta device will do.
        calibration: batches for ``mask=wanda``.
        choose_masks: False where weights and masks are loaded afterwards, or where only the shapes
            matter: a mask that costs something to choose is replaced by a cheap one.

    Raises:
        ValueError: for a value that is wrong, a combination that has no meaning, or what does not
            fit the model.
    """
    settings = sparsity_config(cfg, model)
    if settings is None:
        return None
    from slope.convert import sparsify
    from slope.layers import pruned_layers

    if not choose_masks and settings.mask in ("wanda", "transposable"):
        settings = replace(settings, mask="magnitude")
    try:
        report = sparsify(model, settings, calibration)
    except ValueError as error:
        raise ValueError(in_our_words(str(error))) from error
    if settings.method == "fst":
        from slope.methods.fst import FST

        for _, layer in pruned_layers(model):
            assert isinstance(layer.method, FST)
            layer.method.interval = int(cfg["mask_interval"])
    return report


def check_pruner(cfg: Mapping[str, Any], device_type: str | None = None) -> bool:
    """Check the ``pruner`` section without a model; True if it asks for a sparse one.

    Args:
        cfg: the section.
        device_type: ``"cpu"`` or ``"cuda"``, where it is known: not everything can be accelerated.

    Raises:
        ValueError: for a value that is wrong, or a combination that has no meaning.
    """
    method = _method(cfg["pruned_matrix"])
    if method == "dense":
        return False  # the same command is the dense baseline, whatever the other keys say
    _check_pattern(cfg["pattern"])
    if cfg["unstructured_masking"]:
        _check_percent(cfg["unstructured_mask_sparsity"])
    settings = _settings(cfg, rules=_rules(cfg["rules"]))
    _check_increment(cfg, settings)
    _check_owners(cfg, settings)
    _check_evolution(cfg, settings)
    if cfg["mask"] == "wanda":
        _check_count(cfg, "calibration_batches", "8")
    if cfg["add_lora"]:
        _check_adapters(cfg)
    if cfg["accelerate"]:
        _check_accelerate(cfg, settings, device_type)
    elif device_type == "cpu" and settings.compressed and settings.backend not in ("auto", "dense"):
        raise ValueError(
            f"pruner.backend={settings.backend} needs a GPU, and this run is on the CPU; choose "
            "pruner.backend=auto, or trainer.accelerator=gpu on a machine with one."
        )
    return True


def is_compressed(cfg: Mapping[str, Any]) -> bool:
    """Whether a checked section asks for SLoPe's own layers, which store only the kept weights."""
    return _settings(cfg, rules=_rules(cfg["rules"])).compressed


def schedule(cfg: Mapping[str, Any], max_steps: int, adapters: bool = True) -> SlopeSchedule:
    """What the ``pruner`` section wants to happen at which optimizer step.

    Args:
        cfg: the section, checked.
        max_steps: optimizer steps of the run.
        adapters: whether the model has adapters.

    Raises:
        ValueError: for a start outside (0, 1].
    """
    from slope.schedule import SlopeSchedule

    sparse = _method(cfg["pruned_matrix"]) != "dense"
    try:
        return SlopeSchedule(
            max_steps,
            lora_start=float(cfg["lora_start"]) if adapters else None,
            lora_lazy=bool(cfg["lora_lazy"]),
            dense_start=cfg["dense_start"] if sparse else None,
            evolution=_evolution(cfg) if sparse else None,
        )
    except ValueError as error:
        raise ValueError(in_our_words(str(error))) from error


def never(schedule: SlopeSchedule) -> list[str]:
    """What was asked for and has no step in a run that is so short, as sentences for the log."""
    steps, found = schedule.max_steps, []
    start = schedule.lora_start
    if start is not None and start < 1 and schedule.start_step >= steps:
        earlier = math.floor((steps - 1) / steps * 100) / 100
        found.append(
            f"the adapters never start, since pruner.lora_start={start} of {steps} steps is past "
            f"the last one; type {f'pruner.lora_start={earlier}, ' if earlier else ''}"
            "pruner.lora_lazy=False to have them from step 0, or pruner.add_lora=False."
        )
    dense = schedule.dense_start
    if dense is not None and dense < 1 and schedule.dense_step >= steps:
        found.append(
            f"the dense last phase never starts, since pruner.dense_start={dense} of {steps} steps "
            "is past the last one; type a smaller share, or pruner.dense_start=null."
        )
    evolution = schedule.evolution
    if evolution is not None and not evolution.share(evolution.interval, steps):
        found.append(
            f"the mask never evolves: the first swap would be in step {evolution.interval}, and it "
            f"is fixed after {evolution.stop} of {steps} steps; type a smaller "
            "pruner.evolve_interval."
        )
    return found


def put_to_work(model: nn.Module, schedule: SlopeSchedule, steps: int) -> None:
    """Put a model whose weights were loaded into the state in which its last step was done.

    Checkpoints hold no such state, since it follows from the step: awake adapters, and methods that
    rest in a dense last phase.

    Args:
        model: sparsified.
        schedule: of its run.
        steps: optimizer steps done.
    """
    from slope.layers import activate_adapters, deactivate_adapters, pruned_layers

    awake = schedule.lora_start is not None and steps > schedule.start_step
    (activate_adapters if awake else deactivate_adapters)(model)
    for _, layer in pruned_layers(model):
        layer.dense = steps > schedule.dense_step


def in_our_words(text: str) -> str:
    """An error of the library with the names of the ``pruner`` section, ready to be typed.

    Example:
        >>> in_our_words("mvue=False with method='s-ste' has no meaning")
        'pruner.mvue=False with pruner.pruned_matrix=s-ste has no meaning'
    """
    text = re.sub(r"exclude it with skip=\[.*?\] or rules=", "keep it dense with rules=", text)
    text = text.replace("unstructured_sparsity=None", "pruner.unstructured_masking=False")
    text = re.sub(r"unstructured_sparsity=[\d.e+-]*\d", "pruner.unstructured_masking=True", text)
    names = "|".join(_KEYS)
    text = re.sub(rf"(?<![\w.])({names})='([^']*)'", r"\1=\2", text)
    return re.sub(rf"(?<![\w.])({names})=", lambda match: f"pruner.{_KEYS[match[1]]}=", text)


def _settings(
    cfg: Mapping[str, Any],
    skip: tuple[str, ...] = (),
    rules: tuple[tuple[str, str], ...] = (),
) -> SparsityConfig:
    from slope.config import SparsityConfig

    adapters = bool(cfg["add_lora"])
    percent = float(cfg["unstructured_mask_sparsity"]) if cfg["unstructured_masking"] else None
    try:
        return SparsityConfig(
            pattern=cfg["pattern"],
            mask=cfg["mask"],
            seed=int(cfg["mask_seed"]),
            column_mask_interval=cfg["column_mask_interval"],
            adapter_rank=_rank(cfg["lora_rank"]) if adapters else 0,
            adapter_scale=cfg["lora_scale"] if adapters else None,
            skip=skip,
            rules=rules,
            backend=cfg["backend"],
            method=_method(cfg["pruned_matrix"]),
            reduction_dim=cfg["reduction_dim"],
            prune_backward=cfg["prune_backward"],
            unstructured_sparsity=percent,
            mask_rescale=cfg["mask_rescale"],
            srste_decay=float(cfg["srste_decay"]),
            mvue=cfg["mvue"],
            adapter_init=cfg["lora_init"],
        )
    except ValueError as error:
        raise ValueError(in_our_words(str(error))) from error


def _method(value: Any) -> str:
    name = "none" if value is None else str(value).lower()
    if name not in PRUNED_MATRIX:
        raise ValueError(
            f"pruner.pruned_matrix={value!r} is unknown; choose static-weight (SLoPe) or none "
            f"(dense). The names are {', '.join(PRUNED_MATRIX)}."
        )
    return PRUNED_MATRIX[name]


def _check_pattern(pattern: Any) -> None:
    if isinstance(pattern, int):
        raise ValueError(
            f"pruner.pattern={pattern} is a number; YAML reads 2:4 as 124, so write it in quotes: "
            'pattern: "2:4".'
        )
    try:
        NMPattern.parse(pattern)
    except ValueError as error:
        raise ValueError(in_our_words(str(error))) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_percent(percent: Any) -> None:
    if not _is_number(percent) or not 1 <= percent < 100:
        raise ValueError(
            f"pruner.unstructured_mask_sparsity={percent} is outside [1, 100); it is the "
            "percentage of zeros, for example pruner.unstructured_mask_sparsity=60."
        )


def _check_count(cfg: Mapping[str, Any], key: str, example: str) -> None:
    count = cfg[key]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"pruner.{key}={count} must be a whole number of at least 1, for example "
            f"pruner.{key}={example}."
        )


# -- options that belong to one method -------------------------------------------------------------


@cache
def defaults() -> Mapping[str, Any]:
    """The ``pruner`` section of dense training, which names every key."""
    from omegaconf import OmegaConf

    from slope import configs

    file = Path(configs.__file__).parent / "pruner" / "none.yaml"
    values: Any = OmegaConf.to_container(OmegaConf.load(file))
    return dict(values)


def _check_owners(cfg: Mapping[str, Any], settings: SparsityConfig) -> None:
    """An option that only one method reads is left at its default by the others."""
    fst = settings.method == "fst"
    refreshed = settings.compressed and settings.prune_backward
    for key, read, meaning, instead in (
        ("mask_interval", fst, "it searches no transposable masks", "pruner.pruned_matrix=fst"),
        ("dense_start", fst, "only fst has a dense last phase", "pruner.pruned_matrix=fst"),
        (
            "column_mask_interval",
            refreshed,
            "only SLoPe's backward keeps a mask from step to step",
            "pruner.pruned_matrix=static-weight pruner.reduction_dim=True "
            "pruner.prune_backward=True",
        ),
    ):
        default = defaults()[key]
        if not read and cfg[key] != default:
            said = "null" if default is None else default
            raise ValueError(
                f"pruner.{key}={cfg[key]} with {_chosen(settings)} has no meaning: {meaning}; "
                f"choose pruner.{key}={said}, or {instead}."
            )
    if fst:
        _check_count(cfg, "mask_interval", "40")
        start = cfg["dense_start"]
        if start is not None and (not _is_number(start) or not 0 < start <= 1):
            raise ValueError(
                f"pruner.dense_start={start} is outside (0, 1]; it is the share of the steps "
                "before nothing is pruned any more, for example pruner.dense_start=0.8333, or null "
                "for never."
            )


def _chosen(settings: SparsityConfig) -> str:
    """What makes these settings another thing than SLoPe, as one would type it."""
    if settings.method != "static-weight":
        return f"pruner.pruned_matrix={settings.method}"
    if settings.unstructured_sparsity is not None:
        return "pruner.unstructured_masking=True"
    if not settings.reduction_dim:
        return "pruner.reduction_dim=False"
    if not settings.prune_backward:
        return "pruner.prune_backward=False"
    return "pruner.pruned_matrix=static-weight"


def _evolution(cfg: Mapping[str, Any]) -> Any:
    if not cfg["evolve_interval"]:
        return None
    from slope.methods.evolving import Evolution

    try:
        return Evolution(cfg["evolve_interval"], cfg["evolve_fraction"], cfg["evolve_stop"])
    except ValueError as error:
        raise ValueError(in_our_words(str(error))) from error


def _check_evolution(cfg: Mapping[str, Any], settings: SparsityConfig) -> None:
    interval = cfg["evolve_interval"]
    if interval == 0:
        return
    given = f"pruner.evolve_interval={interval}"
    if not settings.compressed:
        raise ValueError(
            f"{given} with {_chosen(settings)} has no meaning: only SLoPe's mask evolves; choose "
            "pruner.evolve_interval=0, or pruner.pruned_matrix=static-weight "
            "pruner.reduction_dim=True pruner.unstructured_masking=False."
        )
    if settings.mask == "transposable":
        raise ValueError(
            f"{given} with pruner.mask=transposable has no meaning: the first swap makes the mask "
            "an ordinary one; choose pruner.evolve_interval=0, or pruner.mask=magnitude."
        )
    _evolution(cfg)


# -- the kernels -----------------------------------------------------------------------------------


def _check_accelerate(
    cfg: Mapping[str, Any], settings: SparsityConfig, device_type: str | None
) -> None:
    """Sparse kernels for every sparse layer, or an error that says what stands in their way."""
    found = _obstacle(cfg, settings, device_type)
    if found is not None:
        option, why, instead = found
        choose = f", or {instead}" if instead else ", which takes the fastest backend there is"
        raise ValueError(
            f"pruner.accelerate=True with {option}: {why}; choose pruner.accelerate=False{choose}."
        )


def _obstacle(
    cfg: Mapping[str, Any], settings: SparsityConfig, device_type: str | None
) -> tuple[str, str, str] | None:
    """The option in the kernels' way, why it is, and what to choose instead, if anything."""
    from slope.backends import why_not_sparse_kernels

    if not settings.compressed:
        return (
            _chosen(settings),
            "sparse tensor cores serve static weights, n:m along d_in",
            "pruner.pruned_matrix=static-weight pruner.reduction_dim=True "
            "pruner.unstructured_masking=False",
        )
    if not settings.prune_backward and settings.mask != "transposable":
        return (
            "pruner.prune_backward=False",
            "the input gradient's weight is not n:m along d_out",
            "pruner.prune_backward=True",
        )
    if settings.backend == "dense":
        return "pruner.backend=dense", "it multiplies densely", "pruner.backend=auto"
    device = "cuda" if device_type is None else device_type
    increment = Increment.parse(cfg["sparsity_increment"])
    patterns = [(f"pruner.pattern={settings.pattern}", "pruner.pattern=2:4", settings.pattern)]
    for name, target in settings.rules:
        if target != "dense":
            rule = f"the rule [{name},{target}] in pruner.rules"
            patterns.append((rule, "2:4 or dense in that rule", target))
    for sparser in increment.patterns(NMPattern.parse(settings.pattern)):
        option = f"pruner.sparsity_increment={increment.text}"
        patterns.append((option, 'pruner.sparsity_increment=""', str(sparser)))
    # What cannot be run whatever the pattern is no fault of the pattern.
    for option, instead, pattern in patterns:
        why = why_not_sparse_kernels(pattern, device)
        if why is not None and why != why_not_sparse_kernels("2:4", device):
            return option, why, instead
    why = why_not_sparse_kernels("2:4", device)
    if why is None:
        return None
    if device == "cpu":
        return "trainer.accelerator=cpu", why, "trainer.accelerator=gpu on a machine with a GPU"
    return f"pruner.backend={settings.backend}", why, ""


# -- the adapters ----------------------------------------------------------------------------------


def _rank(rank: Any) -> int | float:
    if not _is_number(rank):
        raise ValueError(f"pruner.lora_rank={rank!r} must be a number, for example 16 or 0.0156.")
    if rank == 0:
        raise ValueError(
            "pruner.lora_rank=0 is no adapter; set pruner.add_lora=False, or a rank of at least 1."
        )
    if 0 < rank < 1:
        return rank
    if rank < 0 or rank != int(rank):
        raise ValueError(
            f"pruner.lora_rank={rank} must be a whole number of at least 1 (the rank) or a number "
            "between 0 and 1 (rank / d_in), for example 16 or 0.0156."
        )
    return int(rank)


def _check_adapters(cfg: Mapping[str, Any]) -> None:
    start = cfg["lora_start"]
    if cfg["lora_lazy"] and (not _is_number(start) or not 0 < start <= 1):
        raise ValueError(
            f"pruner.lora_start={start} is outside (0, 1]; it is the share of the steps before "
            "the adapters start, for example pruner.lora_start=0.99. Adapters from step 0 are "
            "pruner.lora_lazy=False."
        )
    for key in ("lora_lr", "lora_scale"):
        value = cfg[key]
        if value is not None and (not _is_number(value) or value <= 0):
            raise ValueError(f"pruner.{key}={value} must be a number above 0, or null.")
    if cfg["lora_schedule"] not in LORA_SCHEDULES:
        raise ValueError(
            f"pruner.lora_schedule={cfg['lora_schedule']} is unknown; choose one of "
            f"{', '.join(LORA_SCHEDULES)}."
        )


# -- which layers ----------------------------------------------------------------------------------


def _rules(rules: Sequence[Any] | None) -> tuple[tuple[str, str], ...]:
    for rule in rules or ():
        pair = not isinstance(rule, str) and len(rule) == 2
        if not pair or not all(isinstance(part, str) for part in rule):
            shown = rule if isinstance(rule, str) else list(rule)
            raise ValueError(
                f"pruner.rules has {shown!r}; a rule is a pair of texts [name pattern, n:m or "
                'dense], for example \'pruner.rules=[["*.mlp.*","2:8"]]\'.'
            )
        if rule[1] != "dense":
            _check_pattern(rule[1])
    return tuple((rule[0], rule[1]) for rule in rules or ())


def _skip(cfg: Mapping[str, Any], parts: ModelStructure) -> tuple[str, ...]:
    """Names that the skip options keep dense, in the model's order, none inside another."""
    skip = [name for name in parts.outside if name not in parts.optional]
    whole = set()
    if cfg["skip_first_block"]:
        whole.add(parts.blocks[0])
    if cfg["skip_last_block"]:
        whole.add(parts.blocks[-1])
    for block, attention in zip(parts.blocks, parts.attention, strict=True):
        if block in whole:
            skip.append(block)
        elif cfg["skip_attention"]:
            skip.extend(attention)
    return tuple(skip)


def _check_increment(cfg: Mapping[str, Any], settings: SparsityConfig) -> None:
    from slope.config import MAX_TRANSPOSABLE_GROUP

    increment = Increment.parse(cfg["sparsity_increment"])
    patterns = increment.patterns(NMPattern.parse(settings.pattern))
    if not patterns:
        return
    given = f"pruner.sparsity_increment={increment.text}"
    if settings.unstructured_sparsity is not None:
        raise ValueError(
            f"{given} with pruner.unstructured_masking=True has no meaning: an unstructured mask "
            'has no n:m pattern; choose pruner.sparsity_increment="", or '
            "pruner.unstructured_masking=False."
        )
    option = "pruned_matrix=fst" if settings.method == "fst" else "mask=transposable"
    transposable = settings.method == "fst" or settings.mask == "transposable"
    if transposable and patterns[-1].m > MAX_TRANSPOSABLE_GROUP:
        raise ValueError(
            f"{given} with pruner.{option}: it needs {patterns[-1]}, and transposable masks are "
            f"searched exactly for m up to {MAX_TRANSPOSABLE_GROUP}; choose "
            'pruner.sparsity_increment="", or pruner.pruned_matrix=static-weight '
            "pruner.mask=magnitude."
        )
