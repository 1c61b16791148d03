"""From a configuration to the tokens of a run: find the corpus, open or build its cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope.data.cache import TokenCache, load_or_build
from slope.data.config import DataConfig
from slope.data.corpora import open_corpus
from slope.data.dataset import TokenDataset
from slope.data.pairs import Masking, PairDataset, Pieces
from slope.data.tokenizer import load_tokenizer, tokenizer_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenData:
    """What a run trains and validates on."""

    train: TokenDataset | PairDataset
    val: TokenDataset | PairDataset
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int  # largest token id plus one
    eos_token_id: int  # after every document
    cache_dir: Path  # folder of this corpus's token cache
    fingerprint: str  # hex; equal where corpus, tokenizer and options are


def prepare(
    config: Any, *, progress: bool = True, verify: bool = False, patience: float = 0.0
) -> TokenData:
    """Open the token cache that a configuration asks for; build it first where there is none.

    Several processes may call this at once: one builds, the others wait for it.

    Args:
        config: a ``DataConfig``, or ``datamodule`` of the run's configuration (a mapping or any
            object with its attributes).
        progress: show a progress bar while tokenising.
        verify: compare the checksums of the token files, not only their sizes and headers.
        patience: seconds in which a cache that another node has just built becomes visible here; 0
            where all processes are on one node.

    Returns:
        Data sets, tokenizer and vocabulary.

    Raises:
        ValueError: if a value, a file or a tokenizer is wrong, or the corpus is too short.
        FileNotFoundError: if a file does not exist.
        RuntimeError: if a package is missing, the hub cannot be reached, or a cache that another
            node was building does not become visible.
        OSError: if the cache cannot be written.

    Example:
        ``prepare({"dataset": "text", "data_files": "books/*.txt", "tokenizer": "bpe:4096"})``
    """
    settings = DataConfig.from_config(config)
    corpus = open_corpus(settings)
    identity = {
        "dataset": settings.dataset,
        "corpus": corpus.identity(Path(settings.cache_dir).expanduser()),
        "tokenizer": tokenizer_identity(settings),
        "val_ratio": settings.val_ratio,
        "val_split_seed": settings.val_split_seed,
        "max_documents": settings.max_documents,
    }
    cache = load_or_build(
        identity, corpus, settings, progress=progress, verify=verify, patience=patience
    )
    _require_sequences(cache, settings)
    tokenizer = cache.tokenizer()
    return TokenData(
        train=cache.dataset("train", settings.max_length),
        val=cache.dataset("val", settings.max_length),
        tokenizer=tokenizer.to_transformers(settings.max_length),
        vocab_size=int(cache.meta["tokenizer"]["vocab_size"]),
        eos_token_id=int(cache.meta["tokenizer"]["eos_token_id"]),
        cache_dir=cache.directory,
        fingerprint=str(cache.meta["key"]),
    )


def ready_tokenizer(config: Any) -> tuple[PreTrainedTokenizerFast, int] | None:
    """The tokenizer of a configuration and the size of its vocabulary, before any text is read.

    Returns:
        None for one that is trained on the corpus.

    Raises:
        ValueError, RuntimeError: as :func:`prepare` does of a tokenizer.
    """
    settings = DataConfig.from_config(config)
    if settings.tokenizer.startswith(("bpe:", "wordpiece:")):
        return None
    loaded = load_tokenizer(settings, ())
    return loaded.to_transformers(settings.max_length), loaded.vocab_size


def pairs(data: TokenData, masking: Masking) -> TokenData:
    """The same documents as pairs of texts with hidden tokens.

    Raises:
        ValueError: if the tokenizer is none of BERT's kind, or a split has less than two documents.
    """
    pieces = Pieces.of(data.tokenizer, data.vocab_size)
    splits = {}
    for name in ("train", "val"):
        tokens = getattr(data, name)
        splits[name] = PairDataset(tokens, data.eos_token_id, pieces, masking)
    return replace(data, **splits)


def _require_sequences(cache: TokenCache, settings: DataConfig) -> None:
    length = settings.max_length
    tokens = {name: entry["tokens"] for name, entry in cache.meta["splits"].items()}
    if tokens["train"] < length < tokens["val"]:
        raise ValueError(
            f"val_ratio={settings.val_ratio} leaves {tokens['train']} of "
            f"{sum(tokens.values())} tokens to train on, fewer than one sequence of "
            f"max_length={length}; type a smaller one, for example datamodule.val_ratio=0.1."
        )
    if tokens["train"] < length:
        raise ValueError(
            f"the corpus is too short: its training split holds {tokens['train']} tokens, fewer "
            f"than one sequence of max_length={length}; give more text, or type "
            f"datamodule.max_length={_power_of_two(min(tokens.values()))}."
        )
    if tokens["val"] < length:
        raise ValueError(
            f"the corpus is too short: its validation split (val_ratio={settings.val_ratio}) holds "
            f"{tokens['val']} tokens, fewer than one sequence of max_length={length}; raise "
            "datamodule.val_ratio, or type "
            f"datamodule.max_length={_power_of_two(min(tokens.values()))}."
        )


def _power_of_two(tokens: int) -> int:
    """Largest power of two that is no longer than the tokens, for an error's proposal."""
    return max(2, 1 << (tokens.bit_length() - 1))
