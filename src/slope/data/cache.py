"""Token caches: each corpus is tokenised once, into memory-mapped files keyed by its content.

The folder (`slope.data.cache_format`) is written under another name and renamed when it is complete
and on disk, so that it is whole or absent. A lock that the system frees with its process lets one
process build while others wait; opening a finished cache takes no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slope.data.cache_format import (
    META,
    SPLITS,
    VERIFIED,
    TokenCache,
    UnusableCacheError,
    cache_key,
    open_cache,
    write_meta,
)
from slope.data.config import DataConfig
from slope.data.corpora import Corpus
from slope.data.progress import TokenProgress
from slope.data.tokenise import training_texts, write_splits
from slope.data.tokenizer import load_tokenizer
from slope.disk import sync_path

_MAX_BYTES_PER_TOKEN = 8  # of text: no usual tokenizer does better, so fewer tokens never come out
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger(__name__)


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
    stamp, now = directory / VERIFIED, _stamp(directory)
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
    for path in sorted(directory.parent.glob(f"{identity['dataset']}-*/{META}")):
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
        tokenizer = load_tokenizer(config, training_texts(corpus, config, bar))
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        _require_space(directory.parent, corpus, config, dtype.itemsize)
        bar.start("tokenising")
        with _new_folder(directory, bar) as folder:
            splits = write_splits(folder, key, dtype, tokenizer, corpus, config, bar)
            _require_both_splits(splits, config)
            write_meta(folder, key, identity, config, tokenizer, dtype, splits)
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
        raise _error(
            error.errno,
            f"no space left in '{directory.parent}' after {written} bytes of a token cache "
            f"({error.strerror}); the whole needs about {needed} bytes. The unfinished cache was "
            "removed, finished ones are untouched: free some space, or type "
            "datamodule.cache_dir=/a/larger/disk.",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_writable(error: OSError, directory: Path) -> OSError:
    why = "it is a file" if directory.is_file() else error.strerror
    return _error(
        error.errno,
        f"cannot write a token cache in '{directory}' ({why}); "
        "type datamodule.cache_dir=<a folder that you may write to>.",
    )


def _error(number: int | None, text: str) -> OSError:
    """A system error whose text does not begin with its number."""
    error = OSError(text)
    error.errno = number
    return error


def _require_space(directory: Path, corpus: Corpus, config: DataConfig, itemsize: int) -> None:
    """Stop before the work where even the smallest possible cache would not fit."""
    if corpus.text_bytes is None or config.max_documents is not None:
        return
    needed = corpus.text_bytes // _MAX_BYTES_PER_TOKEN * itemsize
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise _error(
            errno.ENOSPC,
            f"the token cache needs at least {needed} bytes and '{directory}' has {free} free; "
            "free some space, or type datamodule.cache_dir=/a/larger/disk.",
        )


def _require_both_splits(splits: dict[str, dict[str, Any]], config: DataConfig) -> None:
    if all(splits[name]["tokens"] for name in SPLITS):
        return
    documents = sum(entry["documents"] for entry in splits.values())
    tokens = sum(entry["tokens"] for entry in splits.values())
    if documents > 1:  # one is always held out, so that it is the training split that is empty
        raise ValueError(
            f"val_ratio={config.val_ratio} leaves none of the {documents} documents to train on; "
            "type a smaller one, for example datamodule.val_ratio=0.1."
        )
    raise ValueError(
        f"the corpus is too short: {documents} document(s), {tokens} tokens; training and "
        f"validation (val_ratio={config.val_ratio}) need a document each. Give more text; in "
        "a .txt file, a line <|endoftext|> ends a document."
    )


def _replace(folder: Path, directory: Path) -> None:
    """Give the finished folder its name; an unusable one that has it goes away."""
    if directory.exists():
        old = folder.with_name(f"{folder.name}-old")
        directory.rename(old)
        folder.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(directory)
    sync_path(directory.parent)
