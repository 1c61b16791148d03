"""Token caches: each corpus is tokenised once, into memory-mapped files keyed by its content.

Layout of ``<cache_dir>/<data set>-<first 16 digits of the key>/``::

    train.bin  val.bin    64 bytes of header (magic, format, bytes per token, number of tokens, the
                          first 16 bytes of the key), then little-endian uint16 or uint32 tokens,
                          the end-of-document token after every document
    tokenizer.json        the tokenizer that made them
    meta.json             sizes, checksums, options, and a checksum of itself
    verified.json         when the token files had last changed as their checksums were compared

The folder is written under another name and renamed when it is complete and on disk, so that it is
whole or absent. A lock that the system frees with its process lets one process build while others
wait; opening a finished cache takes no lock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import struct
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slope.data.config import DataConfig
from slope.data.corpora import Corpus
from slope.data.dataset import HEADER_BYTES, TokenDataset
from slope.data.hashes import hash_file
from slope.data.progress import TokenProgress
from slope.data.tokenizer import LoadedTokenizer, load_tokenizer, restore_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1  # a change of the layout, the split or the order of documents needs another number
SPLITS = ("train", "val")
_MAGIC = b"SLOPETOK"
_HEADER = struct.Struct("<8sIIQ16s")
_META, _TOKENIZER, _VERIFIED = "meta.json", "tokenizer.json", "verified.json"
_BATCH_CHARS = 1 << 21
_BATCH_DOCUMENTS = 2048
_IN_FLIGHT = 2
_MAX_BYTES_PER_TOKEN = 8  # of text: no usual tokenizer does better, so fewer tokens never come out
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger(__name__)


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
    return hashlib.sha256(_canonical({"format": FORMAT, **identity})).hexdigest()


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
        meta = json.loads((directory / _META).read_bytes())
        checksum = meta.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableCacheError(f"{_META} cannot be read ({error})") from error
    if checksum != hashlib.sha256(_canonical(meta)).hexdigest():
        raise UnusableCacheError(f"the checksum of {_META} is wrong")
    try:
        _check(directory, meta, key, verify)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UnusableCacheError(f"{_META} makes no sense ({error!r})") from error
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
        if header != _header(itemsize, entry["tokens"], key):
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


def load_or_build(
    identity: dict[str, Any],
    corpus: Corpus,
    config: DataConfig,
    *,
    progress: bool = True,
    verify: bool = False,
    patience: float = 0.0,
) -> TokenCache:
    """Open the cache of a corpus, or build it, or wait for the process that builds it.

    Args:
        identity: everything that the tokens depend on, as JSON values.
        corpus: read only if there is no usable cache.
        config: tokenizer, split and ``cache_dir``.
        progress: show a progress bar while building.
        verify: compare the checksums of the token files when opening.
        patience: seconds in which a cache that another node has just built becomes visible here.

    Returns:
        The cache. A damaged one, or one of another corpus under this name, is replaced with a
        warning.

    Raises:
        ValueError: if the corpus, the tokenizer or the split is impossible.
        OSError: if the folder cannot be written or the disk is full.
        RuntimeError: if what another node was building does not become visible.
    """
    key = cache_key(identity)
    directory = Path(config.cache_dir).expanduser() / f"{config.dataset}-{key[:16]}"
    with contextlib.suppress(FileNotFoundError, UnusableCacheError):
        return _open_unchanged(directory, key, verify)
    with _locked(directory) as waited:
        if waited and patience:
            return _open_when_visible(directory, key, verify, patience)
        try:
            return _open_unchanged(directory, key, verify)  # another process may have built it
        except FileNotFoundError:
            _say_what_else_is_there(directory, identity)
        except UnusableCacheError as error:
            _log.warning("token cache '%s' cannot be used: %s; building it again", directory, error)
        return _build(directory, key, identity, corpus, config, progress)


def _open_unchanged(directory: Path, key: str, verify: bool) -> TokenCache:
    """Open a cache; token files that were touched since their last check are checked whole."""
    stamp, now = directory / _VERIFIED, _stamp(directory)
    if not verify:
        try:
            verify = json.loads(stamp.read_bytes()) != now
        except (OSError, ValueError):
            verify = True
    cache = open_cache(directory, key, verify=verify)
    if verify:
        temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # somebody else's cache: checked again the next time
            temporary.write_text(json.dumps(now))
            temporary.replace(stamp)
    return cache


def _stamp(directory: Path) -> dict[str, list[int]]:
    """Size and time of the last change of each token file; no program can set the latter back."""
    found = {}
    for split in SPLITS:
        with contextlib.suppress(OSError):
            status = (directory / f"{split}.bin").stat()
            found[split] = [status.st_size, status.st_ctime_ns]
    return found


def _open_when_visible(directory: Path, key: str, verify: bool, patience: float) -> TokenCache:
    """Open what a process of perhaps another node has built; a network file system may lag."""
    end, pause = time.monotonic() + patience, 0.05
    while True:
        try:
            return _open_unchanged(directory, key, verify)
        except (FileNotFoundError, UnusableCacheError) as error:
            if time.monotonic() >= end:
                why = str(error) if isinstance(error, UnusableCacheError) else "no such folder"
                raise RuntimeError(
                    f"token cache '{directory}', which another process was building, is not to be "
                    f"seen from this node after {patience:g} s ({why}); that process failed (see "
                    "what it says), or the file system is slow: start again, or type "
                    "datamodule.cache_dir=<a folder that all nodes see>."
                ) from error
            if pause == 0.05:
                _log.warning(
                    "token cache '%s' is built but not to be seen yet; looking again for up to "
                    "%g s", directory, patience,
                )  # fmt: skip
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the lock of one cache; the system frees it when its process ends, however it ends.

    Yields:
        Whether another process held it before.
    """
    from filelock import FileLock, Timeout

    waited = False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.with_name(f"{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            # A warning: those who wait are the processes that say nothing else.
            _log.warning("another process is building token cache '%s'; waiting for it", directory)
            lock.acquire()
    except OSError as error:
        raise _not_writable(error, directory.parent) from error
    try:
        yield waited
    finally:
        lock.release()


def _say_what_else_is_there(directory: Path, identity: dict[str, Any]) -> None:
    """Mention a cache of the same corpus that another tokenizer or other options made."""
    for path in sorted(directory.parent.glob(f"{identity['dataset']}-*/{_META}")):
        try:
            meta = json.loads(path.read_bytes())
            same, name = meta["identity"]["corpus"] == identity["corpus"], meta["tokenizer"]["name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same:
            _log.info(
                "token cache '%s' of the same corpus was made with tokenizer '%s' or other "
                "options; tokenising again", path.parent, name,
            )  # fmt: skip


def _build(
    directory: Path,
    key: str,
    identity: dict[str, Any],
    corpus: Corpus,
    config: DataConfig,
    progress: bool,
) -> TokenCache:
    _use_threads(config.num_workers)
    for left in directory.parent.glob(f"{directory.name}.tmp-*"):  # of killed processes: we hold
        shutil.rmtree(left, ignore_errors=True)  # the lock, so nobody is writing them
    corpus.check()
    with TokenProgress(corpus.total, enabled=progress) as bar:
        if config.tokenizer.startswith(("bpe:", "wordpiece:")):
            bar.start("training the tokenizer")
        tokenizer = load_tokenizer(config, _training_texts(corpus, config, bar))
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        _require_space(directory.parent, corpus, config, dtype.itemsize)
        bar.start("tokenising")
        with _new_folder(directory, bar) as folder:
            splits = _write_splits(folder, key, dtype, tokenizer, corpus, config, bar)
            _require_both_splits(splits, config)
            _write_meta(folder, key, identity, config, tokenizer, dtype, splits)
            with contextlib.suppress(FileNotFoundError, UnusableCacheError):
                # Another node was quicker, unseen: processes that read its files keep them.
                return open_cache(directory, key, verify=True)
            _replace(folder, directory)
    train, val = splits["train"], splits["val"]
    _log.info(
        "tokenised %s: %d documents, %d tokens for training and %d for validation, in '%s'",
        config.dataset, train["documents"] + val["documents"], train["tokens"], val["tokens"],
        directory,
    )  # fmt: skip
    return open_cache(directory, key)


def _use_threads(num_workers: int | None) -> None:
    """Tell the ``tokenizers`` library how many threads to use, unless the environment does.

    It also warns when a process that used its threads forks, unless it was told to use them.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if num_workers is not None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(num_workers))


@contextlib.contextmanager
def _new_folder(directory: Path, bar: TokenProgress) -> Iterator[Path]:
    """A folder beside ``directory`` to write into; whatever is left in it at the end is removed."""
    folder = directory.with_name(f"{directory.name}.tmp-{os.getpid()}-{time.time_ns()}")
    try:
        folder.mkdir()
    except OSError as error:
        raise _not_writable(error, directory.parent) from error
    try:
        yield folder
    except OSError as error:
        if error.errno not in _FULL:
            raise
        written = sum(path.stat().st_size for path in folder.iterdir())
        needed = int(written / bar.fraction) if bar.fraction else 2 * written
        raise OSError(
            error.errno,
            f"no space left in '{directory.parent}' after {written} bytes of a token cache "
            f"({error.strerror}); the whole needs about {needed} bytes. The unfinished cache was "
            "removed, finished ones are untouched: free some space, or type "
            "datamodule.cache_dir=/a/larger/disk.",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_writable(error: OSError, directory: Path) -> OSError:
    return OSError(
        error.errno,
        f"cannot write a token cache in '{directory}' ({error.strerror}); "
        "type datamodule.cache_dir=<a folder that you may write to>.",
    )


class _Document(NamedTuple):
    text: str
    number: int  # decides the split
    position: int  # how far the corpus was read with it


def _require_space(directory: Path, corpus: Corpus, config: DataConfig, itemsize: int) -> None:
    """Stop before the work where even the smallest possible cache would not fit."""
    if corpus.text_bytes is None or config.max_documents is not None:
        return
    needed = corpus.text_bytes // _MAX_BYTES_PER_TOKEN * itemsize
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the token cache needs at least {needed} bytes and '{directory}' has {free} free; "
            "free some space, or type datamodule.cache_dir=/a/larger/disk.",
        )


def _documents(corpus: Corpus, config: DataConfig) -> Iterator[_Document]:
    """Documents, each with a number in [0, 2**64): a pure function of the text and the seed.

    Validation takes the numbers below ``val_ratio`` of the range: equal documents stay on one
    side, and neither the order nor the number of documents plays a part.
    """
    salt = config.val_split_seed.to_bytes(16, "little")
    for text, position in itertools.islice(corpus.documents(), config.max_documents):
        if not text.strip():
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, from an escape in JSON
            data = text.encode(errors="replace")
            text = data.decode()
        digest = hashlib.blake2b(data, digest_size=8, salt=salt).digest()
        yield _Document(text, int.from_bytes(digest, "little"), position)


def _training_texts(corpus: Corpus, config: DataConfig, bar: TokenProgress) -> Iterator[str]:
    limit = int(config.val_ratio * 2**64)
    for text, number, position in _documents(corpus, config):
        bar.advance(position)
        if number >= limit:
            yield text


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encoded(
    documents: Iterable[_Document], tokenizer: Tokenizer, eos: int, dtype: np.dtype
) -> Generator[tuple[NDArray[Any], _Document], None, None]:
    """Tokens of each document, in order; every core encodes while this thread reads and writes."""
    encode_special_tokens = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text like any other

    def encode(batch: list[_Document]) -> list[tuple[NDArray[Any], _Document]]:
        encodings = tokenizer.encode_batch_fast(
            [document.text for document in batch], add_special_tokens=False
        )
        return [
            (np.array([*encoding.ids, eos], dtype=dtype), document)
            for encoding, document in zip(encodings, batch, strict=True)
        ]

    waiting: deque[Future[list[tuple[NDArray[Any], _Document]]]] = deque()
    try:
        with ThreadPoolExecutor(1, "tokenise") as pool:
            for batch in _batches(documents):
                waiting.append(pool.submit(encode, batch))
                if len(waiting) > _IN_FLIGHT:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    finally:
        tokenizer.encode_special_tokens = encode_special_tokens


@dataclass
class _SplitFile:
    """A token file that is being written."""

    path: Path
    key: str
    dtype: np.dtype
    tokens: int = 0
    documents: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def __enter__(self) -> _SplitFile:
        self._file: BinaryIO = self.path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        return self

    def write(self, tokens: NDArray[Any]) -> None:
        data = tokens.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(tokens)
        self.documents += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # the first error is the one to report
                self._file.close()
            return
        with self._file as file:
            file.seek(0)
            file.write(_header(self.dtype.itemsize, self.tokens, self.key))
            _to_disk(file)

    def entry(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self._digest.hexdigest(),
        }


def _write_splits(
    folder: Path,
    key: str,
    dtype: np.dtype,
    tokenizer: LoadedTokenizer,
    corpus: Corpus,
    config: DataConfig,
    bar: TokenProgress,
) -> dict[str, dict[str, Any]]:
    """Tokenise every document into its split.

    The document with the smallest number so far is held back: it becomes the validation split
    where no number is below ``val_ratio``, so that a small corpus has one document of it; otherwise
    it is trained on, later than its place in the corpus.
    """
    limit = int(config.val_ratio * 2**64)
    held: tuple[NDArray[Any], int] | None = None
    encoded = _encoded(_documents(corpus, config), tokenizer.backend, tokenizer.eos_token_id, dtype)
    with (
        # Left to the garbage collector after an error, its threads could be joined anywhere.
        contextlib.closing(encoded),
        _SplitFile(folder / "train.bin", key, dtype) as train,
        _SplitFile(folder / "val.bin", key, dtype) as val,
    ):
        for tokens, (_, number, position) in encoded:
            bar.count(len(tokens))
            bar.advance(position)
            if number < limit:
                val.write(tokens)
            elif val.documents == 0 and (held is None or number < held[1]):
                if held is not None:
                    train.write(held[0])
                held = tokens, number
            else:
                train.write(tokens)
        if held is not None:
            (train if val.documents else val).write(held[0])
    return {"train": train.entry(), "val": val.entry()}


def _require_both_splits(splits: dict[str, dict[str, Any]], config: DataConfig) -> None:
    if all(splits[name]["tokens"] for name in SPLITS):
        return
    documents = sum(entry["documents"] for entry in splits.values())
    tokens = sum(entry["tokens"] for entry in splits.values())
    raise ValueError(
        f"the corpus is too short: {documents} document(s), {tokens} tokens; training and "
        f"validation (val_ratio={config.val_ratio}) need a document each. Give more text; in "
        "a .txt file, a line <|endoftext|> ends a document."
    )


def _write_meta(
    folder: Path,
    key: str,
    identity: dict[str, Any],
    config: DataConfig,
    tokenizer: LoadedTokenizer,
    dtype: np.dtype,
    splits: dict[str, dict[str, Any]],
) -> None:
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
    meta["checksum"] = hashlib.sha256(_canonical(meta)).hexdigest()
    _write_file(folder / _META, json.dumps(meta, indent=1).encode())


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _to_disk(file)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace(folder: Path, directory: Path) -> None:
    """Give the finished folder its name; an unusable one that has it goes away."""
    if directory.exists():
        old = folder.with_name(f"{folder.name}-old")
        directory.rename(old)
        folder.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(directory)
    if os.name == "posix":
        descriptor = os.open(directory.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(itemsize: int, tokens: int, key: str) -> bytes:
    packed = _HEADER.pack(_MAGIC, FORMAT, itemsize, tokens, bytes.fromhex(key)[:16])
    return packed.ljust(HEADER_BYTES, b"\0")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
