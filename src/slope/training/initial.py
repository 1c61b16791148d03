"""``init_from``: start a run from trained weights, dense or with zeros.

Three things will do: a checkpoint of a run (a file, or the folder that holds it), a folder of
:func:`slope.save_pretrained`, and a folder of transformers' ``save_pretrained``. What the run was
sparsified with is undone first: the model gets dense weights, with the zeros that its forward had
and with its active adapters folded in. The new run then chooses masks of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import slope
from slope import configs
from slope.data.hashes import hash_file
from slope.layers import pruned_layers
from slope.linear import AdaptedLinear
from slope.training import checkpoint as checkpoints
from slope.training import pruner

_MODULE = "model."
_CONFIG, _SLOPE = "config.json", "slope.json"
_POSITIONS = "bert.embeddings.position_embeddings.weight"


@dataclass(frozen=True)
class Weights:
    """Trained weights that were found.

    Attributes:
        path: the checkpoint, or the exported folder.
        content: of the checkpoint; None for a folder.
    """

    path: Path
    content: dict[str, Any] | None

    def progress(self) -> tuple[int, int] | None:
        """The step of a checkpoint and the steps of its run."""
        if self.content is None:
            return None
        steps = self.content["slope"]["signature"]["trainer.max_steps"]
        return int(self.content["global_step"]), int(steps)


def locate(init_from: str | Path) -> Path:
    """The file or folder that ``init_from`` names.

    Raises:
        FileNotFoundError: if there is none, or nothing in it to start from.
    """
    path = Path(init_from)
    inside = path.is_dir() and (
        bool(checkpoints.saved(path)) or any((path / name).is_file() for name in (_SLOPE, _CONFIG))
    )
    if not path.is_file() and not inside:
        what = "holds nothing to start from" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"init_from={path} {what}; give a checkpoint (checkpoints/my-run, or a file in it) or "
            "a folder of save_pretrained. Do the run that leaves it first, "
            f"'slope train {_command(path)}', or type init_from=checkpoints/<the name of one that "
            "is done>."
        )
    return path


def _command(path: Path) -> str:
    """What to type for the run whose checkpoint is missing, as far as its name tells."""
    name = path.parent.name if path.suffix == ".ckpt" else path.name
    choices = sorted(configs.choices("experiment"), key=len, reverse=True)
    known = {choice.replace("/", "-"): choice for choice in choices}
    begun = next((dashed for dashed in known if f"{name}-".startswith(f"{dashed}-")), None)
    if begun is None:
        return f"experiment=<its configuration> name={name}"
    own = "" if name == begun else f" name={name}"
    return f"experiment={known[begun]}{own} pruner={'none' if 'dense' in name else 'slope'}"


def fingerprint(init_from: str | Path) -> str:
    """SHA-256 of what ``init_from`` leads to at present: the newest checkpoint, or the folder.

    Raises:
        FileNotFoundError: if there is nothing to start from.
    """
    path = locate(init_from)
    if path.is_dir() and not any((path / name).is_file() for name in (_SLOPE, _CONFIG)):
        path = checkpoints.saved(path)[0]
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    text = "".join(f"{file.relative_to(path)} {hash_file(file)}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def read(init_from: str | Path) -> Weights:
    """Read a checkpoint, or find the folder.

    Raises:
        FileNotFoundError: if there is nothing to start from.
        RuntimeError: if the checkpoint is damaged.
    """
    path = locate(init_from)
    if path.is_file():
        return Weights(path, checkpoints.load(path))
    if any((path / name).is_file() for name in (_SLOPE, _CONFIG)):
        return Weights(path, None)
    found = checkpoints.find(path)
    assert found is not None  # locate() saw one, and none that is usable is an error
    return Weights(found.path, found.content)


def check(weights: Weights, model_section: Mapping[str, Any], max_length: int) -> None:
    """See whether a checkpoint fits the model of a configuration, before the data is known.

    Args:
        weights: a folder is checked when it is loaded.
        model_section: the ``model`` section.
        max_length: longest sequence, in tokens.

    Raises:
        ValueError: if it does not fit, with the differences.
    """
    from slope.models import build_model

    if weights.content is not None:
        vocabulary = int(weights.content["slope"]["signature"]["vocabulary"])
        with torch.device("meta"):
            model = build_model(model_section, vocabulary, max_length)
            _make_alike(model, weights)


def check_tokenizer(weights: Weights, tokenizer: Mapping[str, Any], vocabulary: int) -> None:
    """See whether the tokens of a checkpoint's run are those of this one.

    Args:
        weights: a folder says nothing of its tokens.
        tokenizer: this run's, in plain values.
        vocabulary: entries of it.

    Raises:
        ValueError: if they are others.
    """
    if weights.content is None:
        return
    saved = weights.content["slope"]
    entries = int(saved["signature"]["vocabulary"])
    theirs = saved.get("tokenizer")
    if entries != vocabulary:
        difference = f"with {entries:,} tokens, and the tokenizer of this run has {vocabulary:,}"
    elif theirs is not None and theirs["json"] != tokenizer["json"]:
        difference = f"with another tokenizer of {entries:,} tokens"
    else:
        return
    raise ValueError(
        f"init_from={weights.path} was trained {difference}; type datamodule.tokenizer=<the one "
        "that it was trained with>, on the same corpus if it was trained on that."
    )


def check_entries(weights: Weights, most: int) -> None:
    """See whether a tokenizer of at most so many entries can be that of a checkpoint's run.

    Raises:
        ValueError: if it cannot.
    """
    if weights.content is not None:
        entries = int(weights.content["slope"]["signature"]["vocabulary"])
        if entries > most:
            raise ValueError(
                f"init_from={weights.path} was trained with {entries:,} tokens, and the tokenizer "
                f"of this run has at most {most:,}; type datamodule.tokenizer=<the one that it was "
                "trained with>."
            )


def load_into(model: nn.Module, weights: Weights) -> str | None:
    """Give a dense model the trained weights; it stays dense, in training mode.

    Returns:
        How sparse the weights are, None if they are dense.

    Raises:
        ValueError: if they do not fit the model, with the differences.
    """
    if weights.content is not None:
        restore(model, weights)
    elif (weights.path / _SLOPE).is_file():
        try:
            slope.load_pretrained(weights.path, model=model)
        except ValueError as error:
            raise ValueError(
                f"init_from={weights.path} does not fit this model: {error}"
            ) from error
    else:
        _load_transformers(model, weights.path)
    sparse = None
    if any(True for _ in pruned_layers(model)) or any(True for _ in slope.sparse_layers(model)):
        sparse = slope.sparsity_report(model).summary()
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        slope.densify(model, fold_adapters=True)
    model.to(torch.get_default_dtype()).train()
    return sparse


def restore(model: nn.Module, weights: Weights) -> None:
    """Make a dense model what the run of a checkpoint had at its last step, zeros and adapters too.

    Parameters on the meta device are replaced by those of the checkpoint.

    Raises:
        ValueError: if they do not fit the model, with the differences.
    """
    assert weights.content is not None
    empty = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(_make_alike(model, weights), assign=empty)
    if empty:
        cast(Any, model).tie_weights()
    section, steps = pruner_section(weights.content), int(weights.content["global_step"])
    saved = weights.content["slope"]["signature"]
    run = pruner.schedule(section, int(saved["trainer.max_steps"]))
    pruner.put_to_work(model, run, steps)


def _make_alike(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Sparsify ``model`` as the checkpoint's run did; weights for it, names and shapes checked."""
    assert weights.content is not None
    section = pruner_section(weights.content)
    try:
        pruner.apply(section, model, choose_masks=False)
    except ValueError as error:
        raise ValueError(f"init_from={weights.path} does not fit this model: {error}") from error
    state = {
        name.removeprefix(_MODULE): tensor for name, tensor in weights.content["state_dict"].items()
    }
    here = model.state_dict()
    _add_positions(state, here)
    _check_same(
        weights.path,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tuple(tensor.shape) for name, tensor in here.items()},
    )
    return state


def pruner_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """The ``pruner`` section of the checkpoint's run."""
    section = dict(pruner.defaults()) | _saved_section(content, "pruner.")
    # Who computed its products does not matter here.
    return section | {"backend": "auto", "accelerate": False}


def model_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model`` section of the checkpoint's run, as far as it describes the model."""
    family = content["slope"]["signature"]["model.family"]
    return {"family": family, "config": _saved_section(content, "model.config.")}


def _saved_section(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    saved = content["slope"]["signature"]
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def _add_positions(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Give BERT's table of positions in ``state`` the further rows that a longer model begins with.

    The first phase of a pretraining may know short sequences only.
    """
    if _POSITIONS in state and _POSITIONS in own:
        table, longer = state[_POSITIONS], own[_POSITIONS]
        if len(table) < len(longer) and table.shape[1] == longer.shape[1]:
            state[_POSITIONS] = torch.cat((table.to(longer), longer[len(table) :]))


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differences = [
        f"{name} is {there.get(name, 'absent')} in it and {here.get(name, 'absent')} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"init_from={path} does not fit this model: {'; '.join(differences[:3])}{more}. Start "
            "from weights of the same model= and tokenizer, or leave init_from away."
        )


def _load_transformers(model: nn.Module, path: Path) -> None:
    from slope.deploy.adapted import attach
    from slope.export.lora import lora_beside, read_lora

    kind: Any = type(model)
    loaded, info = kind.from_pretrained(path, output_loading_info=True, local_files_only=True)
    there = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
    there = {name: shape for name, shape in there.items() if name not in info["missing_keys"]}
    _check_same(
        path, there, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    )
    model.load_state_dict(loaded.state_dict())
    beside = lora_beside(path)
    if beside is not None:
        attach(model, read_lora(beside, model))
