"""The configuration of a training run: YAML groups, and one function that puts them together.

``compose(["experiment=owt/gpt2s", "trainer.devices=8"])`` reads the groups in this folder with
Hydra's compose API and applies the overrides. Every mistake in an override (a key or a choice that
does not exist, a value of another kind) is a ValueError that names what to type instead. Nothing
heavy is imported: neither torch nor Lightning nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope.configs import ranges
from slope.spelling import did_you_mean, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_FOLDER = Path(__file__).parent
# Keys whose value may be of another kind than the default's.
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "init_from": (str, int, type(None)),
    "pruner.pruned_matrix": (str, type(None)),
    "pruner.unstructured_mask_sparsity": (int, float),
    "pruner.sparsity_increment": (str, int, list),
    "pruner.rules": (list,),
    "pruner.dense_start": (int, float, type(None)),
    "pruner.lora_rank": (int, float),
    "pruner.lora_scale": (int, float, type(None)),
    "pruner.lora_lr": (int, float, type(None)),
    "trainer.devices": (int, str, list),
    "trainer.precision": (str, int),
    "trainer.gradient_clip_val": (int, float, type(None)),
    "trainer.limit_val_batches": (int, type(None)),
    "datamodule.data_files": (str, list),
    "datamodule.masking.max_predictions": (int, type(None)),
    "model.config.vocab_size": (int, type(None)),
    "train.scheduler.warmup_steps": (int, type(None)),
    "callbacks.diagnostics.every_n_steps": (int, type(None)),
    "callbacks.evaluation.files": (str, list),
    "callbacks.evaluation.every_n_steps": (int, type(None)),
    "callbacks.evaluation.window": (int, type(None)),
    "callbacks.evaluation.stride": (int, type(None)),
    "callbacks.evaluation.batch_size": (int, type(None)),
}
# What may be taken out: a comparison reads what is left, and a model has its defaults.
_OPEN = ("compare", "model.config")


def groups() -> list[str]:
    """Names of the groups: experiment, model, datamodule and so on."""
    return sorted(p.name for p in _FOLDER.iterdir() if p.is_dir() and any(p.rglob("*.yaml")))


def choices(group: str) -> list[str]:
    """What may stand behind ``group=``; the ``base`` files that others build on are left out.

    But for ``bert/base``, which is a model's size and not a recipe to build on.

    Example:
        >>> choices("optimizer")
        ['adamw', 'adamw-zero', 'lamb']
    """
    folder = _FOLDER / group
    names = (p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    return sorted(n for n in names if n.rsplit("/", 1)[-1] != "base" or n == "bert/base")


def comparisons() -> list[str]:
    """The experiments that compare several methods, for ``slope compare``."""
    folder = _FOLDER / "experiment"
    return [
        name
        for name in choices("experiment")
        if re.search("^compare:", (folder / f"{name}.yaml").read_text(encoding="utf-8"), re.M)
    ]


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of one run, in struct mode, interpolations kept.

    Args:
        overrides: as on the command line: ``group=choice``, ``key=value``, ``+new.key=value``.

    Returns:
        The tree that ``train.yaml`` describes. ``name`` is filled in from the experiment.

    Raises:
        ValueError: if an override cannot be read, names an unknown key or choice, or has a value
            that the key cannot take; or if a value that must be given is missing.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    parsed = [_parse(text) for text in overrides]
    known_groups = groups()
    changes, structural = [], []
    for override in parsed:
        key = override.key_or_group
        if key in known_groups and not override.is_delete():
            _check_choice(override)
            if override.value() is not None:  # experiment=null is what holds without it
                structural.append(override)
        elif override.is_add() or override.is_force_add() or override.is_delete():
            if override.is_delete():
                _check_delete(override)
            structural.append(override)
        else:
            changes.append(override)
    try:
        cfg = _compose_groups(tuple(o.input_line for o in structural)).copy()
        known = _known_keys(cfg)
        for override in changes:
            value = _check_value(cfg, known, override)
            OmegaConf.update(cfg, override.key_or_group, value, merge=True)
        with open_dict(cfg):
            cfg.name = _run_name(cfg.name, parsed)
        _check_complete(cfg)
        OmegaConf.to_container(cfg, resolve=True)  # an interpolation that leads nowhere raises
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
    ranges.check(cfg)
    return cfg


@lru_cache(maxsize=16)
def _compose_groups(overrides: tuple[str, ...]) -> DictConfig:
    """What Hydra makes of the files; kept, since the methods of a comparison share most of it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    with initialize_config_module("slope.configs", version_base="1.3"):
        return hydra_compose("train", overrides=list(overrides))


def _parse(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"{text!r} is not of the form key=value; write for example {text}=..., or "
                "`slope train --help` for the options."
            ) from error
        raise ValueError(
            f"{text!r} cannot be read; a value with special characters needs quotes inside the "
            f"shell's: '{key}=\"{value}\"'."
        ) from error
    if override.is_sweep_override():
        key, _, value = text.partition("=")
        raise ValueError(
            f"{text!r} is a list of runs, and one command is one run; if the commas belong to the "
            f"value, quote it: '{key}=\"{value}\"' for a text, '{key}=[{value}]' for a list."
        )
    return override


def _check_choice(override: Override) -> None:
    group, value = override.key_or_group, override.value()
    names = choices(group)
    if value is None and group == "experiment":
        return
    # `base` works too: experiment=owt/base model=gpt2/medium.
    if isinstance(value, str) and (_FOLDER / group / f"{value}.yaml").is_file():
        return
    raise ValueError(
        f"{override.input_line!r}: there is no {group} of that name"
        f"{did_you_mean(str(value), names, group + '={}')} Choices: {', '.join(names)}."
    )


def _check_delete(override: Override) -> None:
    """Whatever the program reads by its name has to stay."""
    key = override.key_or_group
    if key == "experiment" or any(key.startswith(f"{section}.") for section in _OPEN):
        return
    value = f"one of {', '.join(choices(key))}" if key in groups() else "a value"
    raise ValueError(
        f"{override.input_line!r}: only what is inside {' or '.join(_OPEN)} can be taken out, "
        f"since every run reads the rest; type {key}=<{value}>."
    )


def _known_keys(cfg: DictConfig) -> set[str]:
    from omegaconf import DictConfig

    keys: set[str] = set()

    def visit(node: DictConfig, prefix: str) -> None:
        for key in node:
            keys.add(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                visit(child, f"{prefix}{key}.")

    visit(cfg, "")
    return keys


def _check_value(cfg: DictConfig, known: set[str], override: Override) -> Any:
    """The override's value, made an int where a float like 4e5 stands for one."""
    from omegaconf import DictConfig, OmegaConf

    key, value = override.key_or_group, override.value()
    if key not in known:
        raise ValueError(
            f"{override.input_line!r}: unknown key {key!r}{_known_key_like(key, known)} "
            f"(`slope train --help` lists the options; a key of your own takes a plus: +{key}=...)"
        )
    parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
    node = parent._get_node(key.rpartition(".")[2])
    if isinstance(node, DictConfig):
        if isinstance(value, dict):
            return value
        inside = ", ".join(f"{key}.{name}" for name in node)
        raise ValueError(
            f"{override.input_line!r}: {key!r} is a section, not a value; set one of its keys: "
            f"{inside}."
        )
    if isinstance(value, str) and "${" in value:
        return value
    if key in _NAMES and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(override.input_line).partition("=")[2].strip()  # 1e5 may be the name of a commit
    default = None if node._is_missing() else OmegaConf.select(cfg, key)
    kinds = _KINDS.get(key) or _kinds_like(default)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    # bool is an int to Python, never to a reader.
    right = bool in kinds if isinstance(value, bool) else isinstance(value, kinds)
    if not right:
        names = " or ".join(_KIND_NAMES[kind] for kind in kinds)
        raise ValueError(
            f"{override.input_line!r}: {key} must be {names}"
            + (f", for example {key}={_show(default)}." if default is not None else ".")
        )
    return value


def _known_key_like(key: str, known: set[str]) -> str:
    """A question where a key is near: in the section that was named, or of that name elsewhere."""
    section, _, name = key.rpartition(".")
    inside = [other[len(section) + 1 :] for other in known if other.startswith(f"{section}.")]
    if not inside:
        return did_you_mean(key, known | set(groups()))
    if nearest(name, inside) is not None:
        return did_you_mean(name, inside, f"'{section}.{{}}'")
    return did_you_mean(name, (other for other in known if other.rpartition(".")[2] == name))


_NAMES = ("name", "init_from")
_KIND_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list like [a,b]",
    type(None): "null",
}


def _kinds_like(default: Any) -> tuple[type, ...]:
    from omegaconf import ListConfig

    if isinstance(default, bool):
        return (bool,)
    if isinstance(default, int):
        return (int,)
    if isinstance(default, float):
        return (int, float)
    if isinstance(default, ListConfig):
        return (list,)
    if isinstance(default, str):
        return (str, int, float)  # a name or path may look like a number
    return (bool, int, float, str, list, type(None))


def _show(value: Any) -> str:
    from omegaconf import ListConfig

    return str(list(value)) if isinstance(value, ListConfig) else str(value) or '""'


def _run_name(name: Any, parsed: Sequence[Override]) -> str:
    if name is None:
        chosen = [o.value() for o in parsed if o.key_or_group == "experiment"]
        name = str(chosen[-1]).replace("/", "-") if chosen and chosen[-1] else "run"
    name = str(name)
    if not re.fullmatch(r"[\w][\w.+@=-]*", name):
        raise ValueError(
            f"name={name!r} cannot be a folder's name; use letters, digits and . _ - + = @, for "
            "example name=my-run."
        )
    return name


def _check_complete(cfg: DictConfig) -> None:
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given; add {' '.join(f'{key}=...' for key in missing)}."
        )
