"""What is written is on the disk before it is given its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def check_folder_of(path: Path) -> None:
    """Find before the work that a result could not be written.

    Raises:
        FileNotFoundError: if its folder is missing.
        NotADirectoryError: if that is a file.
        PermissionError: if nothing may be written there.
    """
    folder = path.parent
    if not os.path.lexists(folder):
        raise FileNotFoundError(f"no folder '{folder}' for --output {path}; make it.")
    if not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is no folder; give another --output than {path}.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"nothing may be written into '{folder}'; give another --output than {path}."
        )


def sync_file(file: IO[Any]) -> None:
    """Wait until all that was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def lock(file: IO[Any]) -> None:
    """Lock an open file until it is closed or the process ends, where the system can.

    Raises:
        BlockingIOError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def sync_path(path: Path) -> None:
    """The same for a closed file, or for the names in a folder (where the system has that)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
