"""Folders that are written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slope.disk import sync_path
from slope.export.card import CARD_FILE, MARK
from slope.export.layout import SLOPE_FILE


@contextmanager
def new_folder(directory: str | Path, force: bool) -> Iterator[Path]:
    """A folder to fill, under a temporary name, that gets its own name when the block ends well.

    Args:
        directory: the folder to make.
        force: replace an earlier export of that name; any other content is never touched.

    Yields:
        The empty folder.

    Raises:
        FileExistsError: if the folder holds something already.
        OSError: if it cannot be written; what was there before has not been changed.
    """
    directory = Path(directory).resolve()
    check_target(directory, force)
    draft = _beside(directory, "new")
    lock = None
    try:
        draft.mkdir(parents=True)
        lock = _lock(draft)
        yield draft
        readable = draft.stat().st_mode & 0o666
        for path in draft.rglob("*"):
            if path.is_file():
                path.chmod(readable)  # safetensors writes files that only their owner can read
            sync_path(path)
        _move_into_place(draft, directory)
    except OSError as error:
        raise OSError(
            f"could not write the export '{directory}': {error}; free some space or choose another "
            "folder. Nothing that was there before has been changed."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_target(directory: str | Path, force: bool) -> None:
    """See whether an export may be written there; what a killed one left is cleared up.

    Args:
        directory: the folder to make.
        force: an earlier export may be replaced.

    Raises:
        FileExistsError: if it holds something else, or something at all without ``force``.
    """
    directory = Path(directory).resolve()
    _clear_up(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"'{directory}' is a file; choose another folder for the export.")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not force:
        raise FileExistsError(
            f"folder '{directory}' is not empty; choose another one, or pass force=True (--force) "
            "to replace an earlier export."
        )
    if not is_export(directory):
        raise FileExistsError(
            f"folder '{directory}' is not empty and holds no {SLOPE_FILE} or model card of slope, "
            "so it is no earlier export and is not replaced; choose another folder."
        )


def _clear_up(directory: Path) -> None:
    """Remove the drafts of processes that were killed, and bring back what they put aside."""
    for aside in directory.parent.glob(f".{directory.name}.old-*"):
        if directory.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, directory)
    for draft in directory.parent.glob(f".{directory.name}.new-*"):
        lock = _lock(draft)
        if lock is not None:  # else somebody writes it
            shutil.rmtree(draft, ignore_errors=True)
            os.close(lock)


def _lock(draft: Path) -> int | None:
    """A lock on a folder, which ends with the process; None if another one has it."""
    try:
        descriptor = os.open(draft, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def is_export(directory: Path) -> bool:
    """Whether a folder is one that we wrote, of any format."""
    card = directory / CARD_FILE
    return (directory / SLOPE_FILE).is_file() or (
        card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    )


def _move_into_place(draft: Path, directory: Path) -> None:
    """Rename; an earlier export steps aside first and is removed last."""
    if directory.is_dir() and any(directory.iterdir()):
        aside = _beside(directory, "old")
        os.replace(directory, aside)
        try:
            os.replace(draft, directory)
        except OSError:
            os.replace(aside, directory)
            raise
        shutil.rmtree(aside, ignore_errors=True)  # the next export tries again
    else:
        os.replace(draft, directory)
    sync_path(directory.parent)


def _beside(directory: Path, purpose: str) -> Path:
    """A hidden name in the same file system that nobody else uses."""
    return directory.with_name(f".{directory.name}.{purpose}-{uuid.uuid4().hex[:12]}")
