"""The files of a token cache: how they are laid out, checked and written.

Layout of ``<cache_dir>/<data set>-<first 16 digits of the key>/``::

    train.bin  val.bin    64 bytes of header (magic, format, bytes per token, number of tokens, the
                          first 16 bytes of the key), then little-endian uint16 or uint32 tokens,
                          the end-of-document token after every document
    tokenizer.json        the tokenizer that made them
    meta.json             sizes, checksums, options, and a checksum of itself
    verified.json         when the token files had last changed as their checksums were compared
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slope.data.config import DataConfig
from slope.data.dataset import HEADER_BYTES, TokenDataset
from slope.data.hashes import hash_file
from slope.data.tokenizer import LoadedTokenizer, restore_tokenizer
from slope.disk import sync_file

FORMAT = 1  # a change of the layout, the split or the order of documents needs another number
SPLITS = ("train", "val")
META, VERIFIED = "meta.json", "verified.json"
_TOKENIZER = "tokenizer.json"
_MAGIC = b"SLOPETOK"
_HEADER = struct.Struct("<8sIIQ16s")


@dataclass(frozen=True)
class TokenCache:
    """A finished cache."""

    directory: Path
    meta: dict[str, Any]

    def dataset(self, split: str, max_length: int) -> TokenDataset:
        """The sequences of ``train`` or ``val``."""
        return TokenDataset(
            self.directory / f"{split}.bin",
            self.meta["dtype"],
            self.meta["splits"][split]["tokens"],
            max_length,
        )

    def tokenizer(self) -> LoadedTokenizer:
        """The tokenizer that made the tokens."""
        return restore_tokenizer(self.directory / _TOKENIZER, self.meta["tokenizer"])


class UnusableCacheError(Exception):
    """A cache folder that is there but cannot be used; the text says why."""


def cache_key(identity: dict[str, Any]) -> str:
    """SHA-256 of everything that the tokens depend on."""
    return hashlib.sha256(canonical({"format": FORMAT, **identity})).hexdigest()


def open_cache(directory: Path, key: str, *, verify: bool = False) -> TokenCache:
    """Open a finished cache after checking that it is whole and the one asked for.

    Args:
        directory: the cache's folder.
        key: what ``cache_key`` gave.
        verify: also compare the checksum of every token file (reads them whole).

    Raises:
        FileNotFoundError: if there is no such folder.
        UnusableCacheError: if something in it is missing, damaged or of another corpus.
    """
    if not directory.is_dir():
        raise FileNotFoundError(directory)
    try:
        meta = json.loads((directory / META).read_bytes())
        checksum = meta.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableCacheError(f"{META} cannot be read ({error})") from error
    if checksum != hashlib.sha256(canonical(meta)).hexdigest():
        raise UnusableCacheError(f"the checksum of {META} is wrong")
    try:
        _check(directory, meta, key, verify)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UnusableCacheError(f"{META} makes no sense ({error!r})") from error
    return TokenCache(directory, {**meta, "checksum": checksum})


def _check(directory: Path, meta: dict[str, Any], key: str, verify: bool) -> None:
    """Compare the files of a cache with what its meta.json says, which may be anything."""
    if meta["key"] != key:
        raise UnusableCacheError(
            f"it holds data set '{meta['identity']['dataset']}' with tokenizer "
            f"'{meta['tokenizer']['name']}' or other options"
        )
    itemsize = {"uint16": 2, "uint32": 4}[meta["dtype"]]
    tokenizer = meta["tokenizer"]
    int(tokenizer["vocab_size"]), tokenizer["eos_token"].encode()
    dict(tokenizer["special_tokens"])
    for split in SPLITS:
        path, entry = directory / f"{split}.bin", meta["splits"][split]
        wanted = HEADER_BYTES + entry["tokens"] * itemsize
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                file.seek(max(0, wanted - itemsize))
                last = file.read(itemsize)
        except OSError as error:
            raise UnusableCacheError(f"{path.name} cannot be read ({error})") from error
        if size != wanted:
            raise UnusableCacheError(f"{path.name} has {size} bytes instead of {wanted}")
        if header != token_header(itemsize, entry["tokens"], key):
            raise UnusableCacheError(f"the header of {path.name} is wrong")
        if int.from_bytes(last, "little") != tokenizer["eos_token_id"]:
            raise UnusableCacheError(f"{path.name} does not end with the end of a document")
        if verify and hash_file(path, skip=HEADER_BYTES) != entry["sha256"]:
            raise UnusableCacheError(f"the checksum of {path.name} is wrong")
    try:
        digest = hash_file(directory / _TOKENIZER)
    except OSError as error:
        raise UnusableCacheError(f"{_TOKENIZER} cannot be read ({error})") from error
    if digest != tokenizer["sha256"]:
        raise UnusableCacheError(f"the checksum of {_TOKENIZER} is wrong")


def write_meta(
    folder: Path,
    key: str,
    identity: dict[str, Any],
    config: DataConfig,
    tokenizer: LoadedTokenizer,
    dtype: np.dtype,
    splits: dict[str, dict[str, Any]],
) -> None:
    """Write tokenizer.json and meta.json of a cache whose token files are complete."""
    text = tokenizer.backend.to_str().encode()
    _write_file(folder / _TOKENIZER, text)
    meta = {
        "format": FORMAT,
        "key": key,
        "identity": identity,
        "dtype": f"uint{8 * dtype.itemsize}",
        "splits": splits,
        "tokenizer": {
            "name": config.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "special_tokens": tokenizer.special_tokens,
            "sha256": hashlib.sha256(text).hexdigest(),
        },
    }
    meta["checksum"] = hashlib.sha256(canonical(meta)).hexdigest()
    _write_file(folder / META, json.dumps(meta, indent=1).encode())


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        sync_file(file)


def token_header(itemsize: int, tokens: int, key: str) -> bytes:
    """The first bytes of a token file."""
    packed = _HEADER.pack(_MAGIC, FORMAT, itemsize, tokens, bytes.fromhex(key)[:16])
    return packed.ljust(HEADER_BYTES, b"\0")


def canonical(value: Any) -> bytes:
    """JSON of a value in the one form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
