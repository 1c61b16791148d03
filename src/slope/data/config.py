"""What to read, how to tokenise it and where to keep the tokens; every value is checked here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slope.spelling import did_you_mean

DATASETS = ("demo", "text", "openwebtext", "thepile", "c4", "wikipedia")
_MISSING = "???"  # OmegaConf's mark of a value that the user has to give


@dataclass(frozen=True)
class HubSource:
    """Where Hugging Face ``datasets`` finds a corpus: the arguments of ``load_dataset``."""

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    streaming: bool = False  # read over the network while tokenising, keep no copy of the text


HUB_DEFAULTS = {
    "openwebtext": HubSource("Skylion007/openwebtext"),
    "thepile": HubSource("monology/pile-uncopyrighted", streaming=True),
    "c4": HubSource("allenai/c4", "en", streaming=True),
    "wikipedia": HubSource("wikimedia/wikipedia", "20231101.en"),
}


@dataclass(frozen=True)
class DataConfig:
    """The part of ``datamodule.*`` that decides which tokens a run sees.

    Args:
        dataset: ``demo``, ``text`` (local files), ``openwebtext``, ``thepile``, ``c4`` or
            ``wikipedia``.
        hub: where a hub data set is found; None takes the usual place of ``dataset``.
        data_files: paths, folders or globs of local files, for ``dataset="text"``.
        text_field: field of a JSON line, column of a table, that holds the text.
        tokenizer: ``gpt2``, ``bert-uncased``, ``bpe:<vocabulary size>`` or
            ``wordpiece:<vocabulary size>`` (trained on the corpus), or a path.
        eos_token: token put after every document; None takes the tokenizer's own.
        max_length: tokens per sequence.
        cache_dir: folder of the token caches.
        val_ratio: share of the documents held out for validation, in (0, 1).
        val_split_seed: seed of the choice of those documents.
        num_workers: threads that tokenise; None takes every core.
        max_documents: read no more documents than this; None reads all.

    Raises:
        ValueError: if a value is impossible; the text says what to type.
    """

    dataset: str = "demo"
    hub: HubSource | None = None
    data_files: tuple[str, ...] = ()
    text_field: str = "text"
    tokenizer: str = "gpt2"
    eos_token: str | None = None
    max_length: int = 1024
    cache_dir: str = ".slope-cache"
    val_ratio: float = 0.0005
    val_split_seed: int = 2357
    num_workers: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            near = did_you_mean(str(self.dataset), DATASETS, "datamodule.dataset={}")
            raise ValueError(
                f"unknown data set {self.dataset!r}{near} Data sets: {', '.join(DATASETS)}."
            )
        if self.dataset == "text" and not self.data_files:
            raise ValueError(
                "datamodule=text has no files to read: data_files is empty; "
                "type datamodule.data_files=path/to/*.jsonl (.txt, .jsonl, .parquet)."
            )
        if not 0.0 < self.val_ratio < 1.0:
            raise ValueError(
                f"val_ratio={self.val_ratio} is not between 0 and 1; it is the share of the "
                "documents held out for validation: type datamodule.val_ratio=0.01."
            )
        if self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no token to predict; "
                "type datamodule.max_length=2 or more."
            )
        if self.val_split_seed < 0:
            raise ValueError(
                f"val_split_seed={self.val_split_seed} is negative; "
                "type datamodule.val_split_seed=2357."
            )
        for name in ("num_workers", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; type datamodule.{name}=null for all.")

    @classmethod
    def from_config(cls, config: Any) -> DataConfig:
        """Read the keys that concern the tokens from a mapping or an object with attributes.

        Args:
            config: an OmegaConf ``DictConfig``, a mapping, or any object with these attributes.
                Keys that are absent, or marked ``???``, take their defaults; others are ignored.

        Returns:
            The checked configuration.

        Raises:
            ValueError: as the constructor.
        """
        if isinstance(config, cls):
            return config
        read = _reader(config)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = read(field.name)
            if value is not None:
                values[field.name] = value
        if "data_files" in values:
            files = values["data_files"]
            files = [files] if isinstance(files, str) else files
            values["data_files"] = tuple(str(item) for item in files)
        if "hub" in values:
            values["hub"] = _hub_source(values["hub"], str(values.get("dataset", cls.dataset)))
        for name in ("cache_dir", "tokenizer", "text_field", "eos_token"):
            if name in values:
                values[name] = str(values[name])
        if values.get("num_workers") == 0:  # the usual way to say "no extra worker"
            values["num_workers"] = 1
        return cls(**values)


def _reader(config: Any) -> Any:
    """A function name -> value or None, the same for each kind of configuration."""
    omegaconf = sys.modules.get("omegaconf")  # a DictConfig exists only if it is loaded
    if omegaconf is not None and isinstance(config, omegaconf.DictConfig):
        config = omegaconf.OmegaConf.to_container(config, resolve=True, throw_on_missing=False)

    def read(name: str) -> Any:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        return None if isinstance(found, str) and found == _MISSING else found

    return read


def _hub_source(config: Any, dataset: str) -> HubSource | None:
    """The hub source, the data set's usual one where it says nothing."""
    if isinstance(config, HubSource):
        return config
    default = HUB_DEFAULTS.get(dataset)
    read = _reader(config)
    if isinstance(config, Mapping):
        known = [field.name for field in dataclasses.fields(HubSource)]
        for name in config:
            if name not in known:
                raise ValueError(
                    f"unknown key hub.{name}; known: {', '.join(known)} "
                    "(the arguments of datasets.load_dataset)."
                )
    values = {field.name: read(field.name) for field in dataclasses.fields(HubSource)}
    given = {name: value for name, value in values.items() if value is not None}
    if isinstance(given.get("data_files"), list):
        given["data_files"] = tuple(given["data_files"])
    if "path" not in given:
        return dataclasses.replace(default, **given) if default else None
    if default is not None and given["path"] == default.path:
        return dataclasses.replace(default, **given)
    return HubSource(**given)
