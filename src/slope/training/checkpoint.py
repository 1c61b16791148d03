"""Checkpoints that a power cut cannot spoil.

A checkpoint is what ``torch.save`` writes, followed by a footer: eight bytes of magic and the
SHA-256 of all that came before. ``torch.load`` ignores the footer; :func:`load` does not. A file is
written under a temporary name in its own directory, synced, and renamed, so a name that exists is
either whole or was damaged later, and then it is detected. Loading never unpickles arbitrary
objects (``weights_only=True``).

Layout of ``checkpoints/<name>/``: ``last.ckpt``, ``step_<k>.ckpt`` (the best by validation loss),
``progress_step_<k>.ckpt`` (kept for good), and ``no_checkpoint_yet`` while a new run has none.
Checkpoints in parts (see :mod:`slope.training.sharded`) have a folder ``parts_<k>`` beside them;
several names may share one, and it goes with the last of them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric.plugins import CheckpointIO

from slope.disk import sync_file, sync_path

log = logging.getLogger(__name__)

MAGIC = b"SLOPEckp"
IN_PARTS = b"SLOPEidx"
"""Magic of a checkpoint file whose tensors are in parts."""
MAGICS = (MAGIC, IN_PARTS)
FORMATS = ("auto", "file", "sharded")
FOOTER_BYTES = len(MAGIC) + hashlib.sha256().digest_size
LAST = "last.ckpt"
UNSAVED = "no_checkpoint_yet"
_TEMPORARY = ".partial"
_STEP_NAME = re.compile(r"(?:progress_)?step_(\d+)\.ckpt")


class CorruptCheckpointError(RuntimeError):
    """A checkpoint file is half-written, damaged, or not one of ours."""


class Found(NamedTuple):
    """A checkpoint that was read and verified."""

    path: Path
    content: dict[str, Any]


class After(NamedTuple):
    """What is done once a checkpoint is written.

    Attributes:
        copies: further names of it.
        dropped: checkpoints that are no longer wanted.
    """

    copies: tuple[Path, ...] = ()
    dropped: tuple[Path, ...] = ()


class HashingWriter:
    """File-like target of ``torch.save`` that hashes what it passes on.

    After a failed write it swallows the rest, so that the error reaches the caller as the OSError
    that it is instead of being lost inside the zip writer.

    Attributes:
        written: bytes.
        error: of the first write that failed.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.written = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Pass on and hash."""
        if self.error is None:
            try:
                self.file.write(data)
                self.hash.update(data)
            except OSError as error:
                self.error = error
        self.written += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.written

    def flush(self) -> None:
        """Nothing to do: the file is flushed and synced once, at its end."""

    def close(self) -> None:
        """Nothing to do: whoever opened the file closes it."""

    def finish(self, footer: bytes = b"") -> None:
        """Write what comes after, and bring the file to the disk.

        Raises:
            OSError: if a write failed, now or before.
        """
        if self.error is not None:
            raise self.error
        self.file.write(footer)
        sync_file(self.file)


def is_sharded(setting: Any, sharded_model: bool) -> bool:
    """Whether checkpoints are written in parts.

    Args:
        setting: ``callbacks.checkpoint.format``.
        sharded_model: what ``auto`` means.

    Raises:
        ValueError: if the setting is unknown.
    """
    if setting not in FORMATS:
        raise ValueError(
            f"callbacks.checkpoint.format={setting!r} is unknown; use {', '.join(FORMATS)}."
        )
    return bool(sharded_model) if setting == "auto" else setting == "sharded"


def save(
    content: dict[str, Any], path: Path, copies: tuple[Path, ...] = (), magic: bytes = MAGIC
) -> None:
    """Write a checkpoint to ``path`` and byte-equal copies beside it, each atomically.

    Raises:
        RuntimeError: if the file system refuses (full disk, no permission). The temporary file is
            gone and every checkpoint written before is untouched.
    """

    def serialise(temporary: Path) -> None:
        with open(temporary, "wb", buffering=1 << 20) as file:
            writer = HashingWriter(file)
            torch.save(content, writer)
            writer.finish(magic + writer.hash.digest())

    _replace(path, serialise)
    for other in copies:
        copy(path, other)


def copy(path: Path, other: Path) -> None:
    """Write a byte-equal copy of a checkpoint, as safely as the checkpoint itself."""

    def write(temporary: Path) -> None:
        with open(path, "rb") as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            sync_file(file)

    _replace(other, write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    with _refusals(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
        sync_path(path.parent)


@contextmanager
def _refusals(path: Path, temporary: Path) -> Iterator[None]:
    """Report what the file system refuses as what it means for a checkpoint.

    Args:
        path: of the checkpoint.
        temporary: a half-written file, which goes; or a folder, which stays.
    """
    try:
        yield
    except OSError as error:
        written = 0
        if temporary.suffix == _TEMPORARY and temporary.is_file():
            written = temporary.stat().st_size
            temporary.unlink()
        raise RuntimeError(_refusal(path, error, written)) from error


def _refusal(path: Path, error: OSError, written: int) -> str:
    directory = path.parent
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room" if full else "check the path and its permissions"
    return (
        f"cannot write checkpoint {path}: {error.strerror or error} after {written / 1e6:.1f} MB "
        f"({free / 1e6:.1f} MB free there); nothing written before was lost: {advice}, or set "
        "paths.checkpoint_dir=<another disk>, and run the same command with resume=True."
    )


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after checking its footer, and its parts if it has some.

    Returns:
        Whole tensors and plain values.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptCheckpointError: if it is not whole.
    """
    content, magic = _read(path)
    if magic == IN_PARTS:
        from slope.training import sharded

        try:
            content = sharded.read(content, path.parent)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{path} is not usable: {error}") from error
    return content


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Content and magic of one file."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}.")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - FOOTER_BYTES
        if left <= 0:
            raise CorruptCheckpointError(f"{path} is too short to be a checkpoint.")
        while left > 0:
            block = file.read(min(left, 1 << 22))
            if not block:
                break
            digest.update(block)
            left -= len(block)
        footer = file.read()
    magic = footer[: len(MAGIC)]
    if magic not in MAGICS:
        raise CorruptCheckpointError(f"{path} is half-written or not a checkpoint of slope.")
    if footer[len(MAGIC) :] != digest.digest():
        raise CorruptCheckpointError(f"{path} is damaged (its SHA-256 does not match).")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{path} holds objects beside tensors and plain values; it is not ours."
        ) from error
    except Exception as error:
        # Somebody made a footer for it. What an unpickler raises then is not limited.
        raise CorruptCheckpointError(f"{path} is no checkpoint ({error!r:.200}).") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path} holds a {type(content).__name__}; it is not ours.")
    return content, magic


def _remove_unused_parts(directory: Path) -> None:
    """Delete the folders of parts that no checkpoint of a directory names."""
    from slope.training import sharded

    folders = [path for path in directory.glob("parts_*") if sharded.FOLDER.fullmatch(path.name)]
    used = set()
    for path in directory.glob("*.ckpt") if folders else ():
        try:
            with open(path, "rb") as file:
                file.seek(-min(FOOTER_BYTES, path.stat().st_size), os.SEEK_END)
                magic = file.read(len(MAGIC))
            if magic == IN_PARTS:
                used.add(sharded.folder_of(_read(path)[0], directory))
            elif magic != MAGIC:
                raise CorruptCheckpointError(f"{path} is damaged.")
        except (CorruptCheckpointError, KeyError, TypeError, ValueError) as error:
            log.warning("unused parts_<step> folders of %s are kept: %s", directory, error)
            return
    for folder in folders:
        if folder not in used:
            shutil.rmtree(folder, ignore_errors=True)


def step_of(path: Path) -> int | None:
    """The optimizer step in a checkpoint's name, None for ``last.ckpt`` and other files."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def saved(directory: Path) -> list[Path]:
    """Checkpoints in the order in which a resume tries them: last, then newest step first."""
    named = [path for path in directory.glob("*.ckpt") if step_of(path) is not None]
    named.sort(key=lambda path: (-int(step_of(path) or 0), path.name))
    last = directory / LAST
    return ([last] if last.is_file() else []) + named


def find(directory: Path, step: int | None = None) -> Found | None:
    """The checkpoint to resume from: the newest usable one, or that of one optimizer step.

    A corrupt file is reported in the log and the next one is tried.

    Returns:
        None if the directory holds no checkpoint at all and no step was asked for.

    Raises:
        FileNotFoundError: if the step asked for was not saved.
        RuntimeError: if checkpoints exist but none is usable.
    """
    present = saved(directory)
    candidates = [path for path in present if step is None or step_of(path) == step]
    if step is not None and not candidates:
        names = ", ".join(path.name for path in present) or "no checkpoint"
        raise FileNotFoundError(
            f"resume_iter={step}: neither step_{step}.ckpt nor progress_step_{step}.ckpt is in "
            f"{directory}; it holds {names}. Choose one of these steps, or resume_iter=-1."
        )
    problems = []
    for path in candidates:
        try:
            content = load(path)
        except (CorruptCheckpointError, OSError) as error:
            problems.append(str(error))
            log.warning("skipped: %s", error)
            continue
        if problems:
            log.warning("using the previous good checkpoint %s instead.", path)
        return Found(path, content)
    if problems:
        raise RuntimeError(
            f"no usable checkpoint in {directory}: {' '.join(problems)} Restore one from a copy, "
            "or start again under another name=."
        )
    return None


def claim(directory: Path, fresh: bool) -> None:
    """Make the folder of a run, and clear away what a killed process left half-done.

    Args:
        directory: of the checkpoints.
        fresh: the run has no checkpoint yet, and its folder is to say so.

    Raises:
        RuntimeError: if the file system refuses.
    """
    with _refusals(directory / LAST, directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f"*{_TEMPORARY}"):
            path.unlink(missing_ok=True)
        _remove_unused_parts(directory)
        if fresh:
            (directory / UNSAVED).touch()


def complete(found: Found) -> None:
    """Do what a process killed right after writing last.ckpt had left to do.

    Raises:
        RuntimeError: if the file system refuses.
    """
    directory, state = found.path.parent, found.content["slope"]["state"]
    with _refusals(found.path, directory):
        if (directory / UNSAVED).exists():
            (directory / UNSAVED).unlink()
        if found.path.name != LAST:
            return
        for name in state["copies"]:
            if _STEP_NAME.fullmatch(name) and not (directory / name).exists():
                copy(found.path, directory / name)
        for step in state["dropped"]:
            old = directory / f"step_{int(step)}.ckpt"
            if old.exists():
                old.unlink()


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to files, through :func:`save` and :func:`load`.

    Args:
        preloaded: a checkpoint that is already in memory; Lightning then reads it from here.
        sharded: write in parts; every process must then call :meth:`save_checkpoint`.
        asynchronous: copy the state to CPU memory and write it by a thread, one at a time.
    """

    def __init__(
        self, preloaded: Found | None = None, sharded: bool = False, asynchronous: bool = False
    ) -> None:
        self.preloaded = preloaded
        self.sharded = sharded
        self.asynchronous = asynchronous
        self._group: Any = None
        self._writing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint, or begin to; ``storage_options`` is an :class:`After`, or None.

        It does not raise, since other processes would wait for this one; see :meth:`failure`.
        """
        if self.sharded and self._group is None and torch.distributed.is_initialized():
            # A group of its own: a thread must not come between the collectives of the training.
            self._group = torch.distributed.new_group(backend="gloo")
        if self._pool is None:
            self._writing = Future()
            try:
                self._write(checkpoint, Path(path), storage_options or After())
                self._writing.set_result(None)
            except RuntimeError as error:
                self._writing.set_exception(error)
            return
        from slope.training import sharded

        content = sharded.on_cpu(checkpoint)
        work = partial(self._write, content, Path(path), storage_options or After())
        self._writing = self._pool.submit(work)

    def failure(self, wait: bool = False) -> str | None:
        """Why the last save failed; None if it did not, or is not done yet.

        Args:
            wait: until it is done.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        error = self._writing.exception()
        return None if error is None else str(error)

    def close(self, wait: bool = True) -> None:
        """Begin no other write, and wait for the last one."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait)

    def _write(self, content: dict[str, Any], path: Path, after: After) -> None:
        if not self.sharded:
            save(content, path, after.copies)
            _clean_up(path.parent, after)
            return
        _save_in_parts(content, path, after, self._group)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read one checkpoint onto the CPU; Lightning's other arguments do not apply."""
        if self.preloaded is not None and Path(path) == self.preloaded.path:
            content, self.preloaded = self.preloaded.content, None
            return content
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint that is no longer among the best."""
        Path(path).unlink(missing_ok=True)


def _save_in_parts(content: dict[str, Any], path: Path, after: After, group: Any) -> None:
    """Write a checkpoint, all processes of a group together.

    Raises:
        RuntimeError: on all of them, if the file system refuses one of them.
    """
    from slope.training import sharded

    first = group is None or torch.distributed.get_rank(group) == 0
    directory = path.parent

    def start() -> Path | None:
        with _refusals(path, directory):
            return sharded.new_folder(directory, int(content["global_step"])) if first else None

    def parts() -> dict[str, Any]:
        with _refusals(path, directory):
            return sharded.write(content, folder, group)

    def finish() -> None:
        if first:
            with _refusals(path, directory):
                for place in (folder, directory):
                    sync_path(place)
            save(index, path, after.copies, IN_PARTS)
            _clean_up(directory, after)

    folder = sharded.together(group, start)[0]
    assert folder is not None
    try:
        index = sharded.together(group, parts)[0]
        sharded.together(group, finish)
    except RuntimeError:
        if first:
            _remove_unused_parts(directory)
        raise


def _clean_up(directory: Path, after: After) -> None:
    with _refusals(directory / LAST, directory):
        for path in (*after.dropped, directory / UNSAVED):
            path.unlink(missing_ok=True)
        _remove_unused_parts(directory)
