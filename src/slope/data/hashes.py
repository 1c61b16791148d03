"""Content hashes of files, remembered as long as a file is provably the same.

A hash is reused only if path, size, inode, modification and change time all agree, and the file
had been at rest for two seconds when it was read (a later write could otherwise carry the same
time). The change time cannot be set back by hand, so an edit is never missed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

_log = logging.getLogger(__name__)
_INDEX = "file-hashes.json"
_REST_NS = 2_000_000_000
_BLOCK_BYTES = 1 << 20
_LARGE_BYTES = 1 << 30


def content_hashes(paths: Iterable[Path], cache_dir: Path) -> list[str]:
    """SHA-256 of each file, in order, from the index in ``cache_dir`` where it is still true."""
    index = _load(cache_dir / _INDEX)
    hashes, changed = [], False
    for path in paths:
        name = str(path.resolve())
        known = index.get(name)
        if known is not None and known[:-1] == _stamp(path):
            hashes.append(str(known[-1]))
            continue
        stamp, begun = _stamp(path), time.time_ns()
        if stamp[0] >= _LARGE_BYTES:
            _log.info("reading '%s' (%.1f GB) once to know its content", path, stamp[0] / 1e9)
        digest = hash_file(path)
        hashes.append(digest)
        stat = path.stat()
        at_rest = begun - max(stat.st_mtime_ns, stat.st_ctime_ns) > _REST_NS
        if at_rest and _stamp(path) == stamp:
            index[name] = [*stamp, digest]
            changed = True
    if changed:
        _save(cache_dir / _INDEX, index)
    return hashes


def hash_file(path: Path, skip: int = 0) -> str:
    """SHA-256 of a file, without its first ``skip`` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _load(path: Path) -> dict[str, list[int | str]]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # an index that cannot be read costs one more reading of the files
    return index if isinstance(index, dict) else {}


def _save(path: Path, index: dict[str, list[int | str]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{time.time_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(index), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may be a file
            temporary.unlink(missing_ok=True)
        _log.debug("cannot remember file hashes in '%s': %s", path, error)
