"""Open a checkpoint of any kind: of a run, an export, a folder of `transformers`, a published one.

Only JSON and safetensors are read, and pickles of tensors and plain values; no code of a checkpoint
is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slope.convert import compress_weights, compressible
from slope.data.tokenizer import other_word
from slope.deploy import published
from slope.deploy.adapted import attach
from slope.export.folder import is_export
from slope.export.layout import CONFIG_FILE, SLOPE_FILE
from slope.export.load import (
    Weights,
    load_pretrained,
    model_class,
    parameters_on_meta,
    read_config,
    read_description,
    reason,
)
from slope.export.lora import ADAPTER_CONFIG, lora_beside, read_lora
from slope.export.save import vocabulary, vocabulary_sha256
from slope.layers import pruned_layers

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Source:
    """A model that was opened.

    Attributes:
        path: the file or folder.
        model: in eval mode, on the CPU; a model of `transformers`. The adapters of an export for
            `transformers` are active in it.
        tokenizer: of `transformers`, None if none was found.
    """

    path: Path
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class _Trained:
    """What a checkpoint says of the tokenizer that its model was trained with.

    Attributes:
        entries: of its vocabulary.
        sha256: of which entry has which id.
        tokenizer: itself.
    """

    entries: int | None = None
    sha256: str | None = None
    tokenizer: Any = None


def find(given: str | Path) -> Path:
    """The file or folder that is meant by a path, or by the name of a run.

    Raises:
        FileNotFoundError: if there is none.
    """
    for path in (Path(given), Path("checkpoints") / given):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            return path
    runs = sorted(path.name for path in Path("checkpoints").glob("*") if any(path.glob("*.ckpt")))
    there = f"runs under checkpoints/: {', '.join(runs)}" if runs else "no run under checkpoints/"
    raise FileNotFoundError(
        f"no checkpoint {given}; give the name of a run, a .ckpt file, or a folder of "
        f"save_pretrained; {there}."
    )


def open_source(
    given: str | Path,
    *,
    tokenizer: str | Path | None = None,
    heads: int | None = None,
    training: bool = True,
) -> Source:
    """Find and load a model and its tokenizer.

    Args:
        given: name of a run, a checkpoint or the folder of a run, an export, a folder of
            `transformers` with safetensors, or a checkpoint of the authors' published code.
        tokenizer: file or folder to use instead of the tokenizer that comes with the model.
        heads: attention heads of a published checkpoint, which does not hold their number.
        training: as for :func:`slope.load_pretrained`.

    Raises:
        FileNotFoundError: if there is none, or a file of it is missing.
        ValueError: if a file is damaged or foreign, or the tokenizer does not fit the model.
        RuntimeError: if no checkpoint of a run is usable.
    """
    path = find(given)
    _check_kind(path, heads)
    trained = _Trained()
    if path.is_dir() and (path / SLOPE_FILE).is_file():
        description = read_description(path)
        trained = _Trained(description.get("vocabulary"), description.get("vocabulary_sha256"))
        model: Any = load_pretrained(path, verify=True, training=training)
    elif path.is_dir() and (path / CONFIG_FILE).is_file():
        model = from_transformers(path)
    elif published.is_published(path):
        model = published.load(path, heads)
    else:
        model, trained = _of_run(path)
    return Source(path, model.eval(), _tokenizer(path, tokenizer, model, trained))


def _check_kind(path: Path, heads: int | None) -> None:
    """Turn down what is near to a checkpoint, and an option that has no meaning for this one."""
    if path.suffix == ".safetensors":
        raise ValueError(
            f"'{path}' holds tensors without their configuration; give the folder '{path.parent}'."
        )
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"'{path}' holds an adapter of peft ({ADAPTER_CONFIG}), which goes onto a model that "
            "transformers has loaded; merge the two with peft's merge_and_unload() and "
            "save_pretrained(), and give that folder."
        )
    if heads is not None and ((path / CONFIG_FILE).is_file() or not published.is_published(path)):
        raise ValueError(
            f"heads={heads} is for a .ckpt of the published code, and '{path}' says how many it "
            "has; leave --heads away."
        )


def _of_run(path: Path) -> tuple[Any, _Trained]:
    """The model of a checkpoint of a run, and its tokenizer."""
    from slope.data.tokenizer import from_plain
    from slope.models import build_model
    from slope.training import checkpoint as checkpoints
    from slope.training import initial

    if path.is_dir() and not checkpoints.saved(path):
        raise FileNotFoundError(
            f"'{path}' holds no checkpoint: neither last.ckpt or step_<k>.ckpt of a run, nor "
            f"{SLOPE_FILE}, nor {CONFIG_FILE}; give the file itself, or the whole folder that it "
            "was copied from."
        )
    weights = initial.read(path)
    content = weights.content
    assert content is not None
    try:
        saved = content["slope"]["signature"]
        # Checkpoints of earlier versions have none.
        plain = content["slope"].get("tokenizer")
        section = initial.model_section(content)
        entries, length = int(saved["vocabulary"]), int(saved["datamodule.max_length"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{weights.path}' does not say what model it is of ({type(error).__name__}: {error}), "
            "so no run of slope wrote it; give another checkpoint."
        ) from error
    tokenizer = None if plain is None else from_plain(plain)
    with parameters_on_meta():
        model = build_model(
            section,
            entries,
            length,
            eos_token_id=getattr(tokenizer, "eos_token_id", None),
        )
    initial.restore(model, weights)
    return model, _Trained(entries, tokenizer=tokenizer)


def from_transformers(path: Path) -> Any:
    """The model of a folder of `transformers`, in its own class; of an export, with its adapters.

    Raises:
        ValueError: if a file is damaged, missing or of a kind that is not read.
        FileNotFoundError: if a file of the adapters is missing.
    """
    import transformers

    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"'{path}' holds no *.safetensors, and pickled weights (*.bin) are not read, since "
            "they may run code; convert them with transformers' "
            "save_pretrained(safe_serialization=True)."
        )
    config = read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"'{path}' holds quantised weights (quantization_config in its {CONFIG_FILE}), which "
            "are not read; give the folder of the model in bf16, fp16 or fp32."
        )
    names = Weights(path, "cpu").names  # it names the file that is damaged; transformers does not
    compressed = next((name for name in names if name.endswith(".metadata")), None)
    if compressed is not None:
        raise ValueError(
            f"'{path}' is a trainer's checkpoint of a sparse model: it holds {compressed}. Build "
            "the model, call slope.sparsify() as in its run, then "
            "safetensors.torch.load_model(model, <its model.safetensors>) and "
            "slope.save_pretrained(model, <folder>), and give that folder."
        )
    kind: Any = transformers.AutoModelForCausalLM
    if config.architectures:
        kind = model_class(config.architectures[0])
    try:
        model, info = kind.from_pretrained(
            path,
            **_LOCAL,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error, below, that names them
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"transformers cannot load '{path}' ({reason(error)}); copy the folder again."
        ) from error
    for name, there, here in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"tensor {name} of '{path}' has shape {tuple(there)}, and its {CONFIG_FILE} asks for "
            f"{tuple(here)}; copy the folder again."
        )
    missing, unread = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ValueError(
            f"'{path}' is incomplete: it has no {', '.join(missing[:3])} as its {CONFIG_FILE} asks "
            f"for ({len(missing)} tensors in all); copy the folder again."
        )
    if unread:
        log.warning(
            "'%s' holds %d tensors that %s does not have; they are left out: %s",
            path, len(unread), type(model).__name__, ", ".join(unread[:3]),
        )  # fmt: skip
    beside = lora_beside(path)
    if beside is not None:
        attach(model, read_lora(beside, model))
    return model


def _read_tokenizer(path: Path) -> Any:
    """A tokenizer of a folder, or of one tokenizer.json."""
    import transformers

    if not path.exists():
        raise FileNotFoundError(
            f"no tokenizer '{path}'; give a tokenizer.json, or a folder that holds one."
        )
    try:
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        return transformers.AutoTokenizer.from_pretrained(path, **_LOCAL)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(
            f"'{path}' is no tokenizer that can be read ({reason(error)}); type --tokenizer <a "
            "tokenizer.json, or a folder that holds one>."
        ) from error


def _tokenizer(path: Path, given: str | Path | None, model: Any, trained: _Trained) -> Any:
    """The tokenizer that is given, else the one that comes with the model; None if there is none.

    Raises:
        ValueError: if it is not the one that the model was trained with, as far as that is known.
    """
    own = trained.tokenizer
    if own is None:
        own = _beside(path, optional=given is not None)
    found = own if given is None else _read_tokenizer(Path(given))
    if found is None:
        return None
    _check_size(found, model, path, trained.entries)
    if trained.tokenizer is None and not is_export(path):
        own = None  # in a foreign folder it may be replaced by any that fits
    _check_words(found, own, path, trained.sha256)
    return found


def _beside(path: Path, optional: bool) -> Any:
    """The tokenizer that lies in a folder; None without one, or if ``optional`` and unreadable."""
    if not path.is_dir() or not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return _read_tokenizer(path)
    except ValueError:
        if optional:
            return None
        raise


def _check_size(tokenizer: Any, model: Any, path: Path, expected: int | None) -> None:
    size = vocabulary(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if size > rows or (expected is not None and size != expected):
        raise ValueError(
            f"the tokenizer has {size:,} entries, but the model of '{path}' was made for "
            f"{expected or rows:,}; type --tokenizer <the one that it was trained with>."
        )


def _check_words(tokenizer: Any, own: Any, path: Path, sha256: str | None) -> None:
    """See that a tokenizer gives its entries the ids that the model was trained with.

    Args:
        tokenizer: the one to use.
        own: the one that comes with the model, if any.
        path: of the model.
        sha256: of the entries and ids; whoever differs from it is not the model's.
    """
    if sha256 is not None:
        if vocabulary_sha256(tokenizer) == sha256:
            return
        if own is not None and vocabulary_sha256(own) != sha256:
            own = None
    words = tokenizer.get_vocab()
    trained = {} if own is None else own.get_vocab()
    word = None if own is None else other_word(words, trained)
    if word is not None:
        differs = f"{word!r} is its entry {words[word]} and was {trained.get(word, 'none')}"
    elif sha256 is not None:
        differs = f"it has as many entries, {vocabulary(tokenizer):,}, but other ones than"
    else:
        return
    raise ValueError(
        f"the tokenizer does not fit the model of '{path}': {differs} when the model was trained; "
        "type --tokenizer <the one that it was trained with>"
        + ("." if own is None else ", or leave it away: it comes with the model.")
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars for the moment that loading and writing take."""
    import transformers

    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def cast(model: Any, dtype: torch.dtype) -> None:
    """Convert the parameters; computed buffers (rotary frequencies) keep their precision.

    A method that prunes while it trains does so before, else it would choose by rounded weights.
    """
    pruned = [layer for _, layer in pruned_layers(model)]
    if pruned and all(map(compressible, pruned)):
        compress_weights(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
