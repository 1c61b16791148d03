"""Checkpoints that a power cut cannot spoil.

A checkpoint is what ``torch.save`` writes, followed by a footer: eight bytes of magic and the
SHA-256 of all that came before. ``torch.load`` ignores the footer; :func:`load` does not. A file is
written under a temporary name in its own directory, synced, and renamed, so a name that exists is
either whole or was damaged later, and then it is detected. Loading never unpickles arbitrary
objects (``weights_only=True``).

Layout of ``checkpoints/<name>/``: ``last.ckpt``, ``step_<k>.ckpt`` (the best by validation loss),
``progress_step_<k>.ckpt`` (kept for good), and ``no_checkpoint_yet`` while a new run has none.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric.plugins import CheckpointIO

log = logging.getLogger(__name__)

MAGIC = b"SLOPEckp"
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


class _HashingWriter:
    """File-like target of ``torch.save`` that hashes what it passes on.

    After a failed write it swallows the rest, so that the error reaches the caller as the OSError
    that it is instead of being lost inside the zip writer.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.hash.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the file is flushed and synced once, at its end."""


def save(content: dict[str, Any], path: Path, copies: tuple[Path, ...] = ()) -> None:
    """Write a checkpoint to ``path`` and byte-equal copies beside it, each atomically.

    Raises:
        RuntimeError: if the file system refuses (full disk, no permission). The temporary file is
            gone and every checkpoint written before is untouched.
    """

    def serialise(temporary: Path) -> None:
        with open(temporary, "wb", buffering=1 << 20) as file:
            writer = _HashingWriter(file)
            torch.save(content, writer)
            if writer.error is not None:
                raise writer.error
            file.write(MAGIC + writer.hash.digest())
            file.flush()
            os.fsync(file.fileno())

    _replace(path, serialise)
    for other in copies:
        copy(path, other)


def copy(path: Path, other: Path) -> None:
    """Write a byte-equal copy of a checkpoint, as safely as the checkpoint itself."""

    def write(temporary: Path) -> None:
        with open(path, "rb") as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())

    _replace(other, write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        written = 0
        if temporary.exists():
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


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after checking its footer.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptCheckpointError: if it is not whole.
    """
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
    if footer[: len(MAGIC)] != MAGIC:
        raise CorruptCheckpointError(f"{path} is half-written or not a checkpoint of slope.")
    if footer[len(MAGIC) :] != digest.digest():
        raise CorruptCheckpointError(f"{path} is damaged (its SHA-256 does not match).")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{path} holds objects beside tensors and plain values; it is not ours."
        ) from error
    return content


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


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files that a killed process left."""
    for path in directory.glob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to files, through :func:`save` and :func:`load`.

    Args:
        preloaded: a checkpoint that is already in memory; Lightning then reads it from here.

    Attributes:
        failure: why the last save failed, None if it did not. Raising here would leave the other
            processes waiting for this one.
    """

    def __init__(self, preloaded: Found | None = None) -> None:
        self.preloaded = preloaded
        self.failure: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint; ``storage_options`` is a tuple of paths for copies, or None."""
        self.failure = None
        try:
            save(checkpoint, Path(path), tuple(storage_options or ()))
        except RuntimeError as error:
            self.failure = str(error)

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
