"""The tensors of a checkpoint in parts: each process writes its share, any number reads them.

``torch.distributed.checkpoint`` (DCP) cuts, writes and reassembles. Its own index is a pickle,
which would run whatever somebody put into it; ours lies in the checkpoint file, in plain values:

======================  =================================================================
``last.ckpt``           all but the large tensors, and the index; SHA-256 in its footer
``parts_<step>/``       ``__<process>_<n>.distcp``, tensors alone; SHA-256 of each in the index
======================  =================================================================

The checkpoint file is written last and replaced at once, so a process that dies earlier leaves a
folder that nobody names, and the checkpoint before it as it was.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from slope.training.checkpoint import CorruptCheckpointError, HashingWriter

FOLDER = re.compile(r"parts_\d+(?:_\d+)?")
_FILE = re.compile(r"__\d+_\d+\.distcp")
_SECTIONS = ("state_dict", "optimizer_states")
_Result = TypeVar("_Result")


class _Files(FileSystem):
    """DCP's, which hashes what it writes, says what went wrong, and syncs what it buffered."""

    def __init__(self) -> None:
        self.written: dict[str, list[Any]] = {}  # name: size, SHA-256

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Called by DCP to open a file for writing."""
        with open(path, mode) as file:
            writer = HashingWriter(file)
            yield writer
            writer.finish()
        self.written[Path(path).name] = [writer.written, writer.hash.hexdigest()]


class _Writer(FileSystemWriter):
    """DCP's; ``index`` has, on the first process, what DCP would pickle."""

    index: dict[str, Any] | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = self.files = _Files()

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Called by DCP with what all processes wrote."""
        self.index = {name: [] for name in metadata.state_dict_metadata}
        for written in (result for of_one in results for result in of_one):
            name, place = written.index.fqn, written.storage_data
            entry: Any = metadata.state_dict_metadata[name]
            chunk = next(c for c in entry.chunks if tuple(c.offsets) == tuple(written.index.offset))
            self.index[name].append(
                [list(chunk.offsets), list(chunk.sizes)]
                + [place.relative_path, place.offset, place.length]
            )


class _Reader(FileSystemReader):
    """DCP's, told the index instead of unpickling one."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Called by DCP."""
        return self._metadata


def together(group: Any, work: Callable[[], _Result]) -> list[_Result]:
    """Do something on every process of a group; all fail where one does.

    Args:
        group: None for a process alone.
        work: what this process does.

    Returns:
        What ``work`` returned on each process.

    Raises:
        RuntimeError: with the text of the first process that failed.
    """
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (OSError, RuntimeError) as error:
        mine = None, str(error)
    outcomes: list[Any] = [mine]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, mine, group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise RuntimeError(failure)
    return [result for result, _ in outcomes]


def write(content: dict[str, Any], folder: Path, group: Any) -> dict[str, Any]:
    """Write this process's share of a checkpoint's tensors; all of the group do it together.

    Args:
        content: of a checkpoint; its tensors are whole ones, equal on every process that has them,
            or DTensors.
        folder: new; its name is in the index.
        group: of processes; None for a process alone.

    Returns:
        What the checkpoint file is to hold; of use on the first process.

    Raises:
        OSError: if the file system refuses.
        RuntimeError: if it refuses another process.
    """
    tensors = dict(_tensors(content))
    writer = _Writer(folder)
    _not_told_to_be_alone()
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise (cause if isinstance(cause, OSError) else RuntimeError(str(cause))) from error
    files: dict[str, list[Any]] = {}
    for of_one in together(group, lambda: writer.files.written):
        files |= of_one
    parts = {"folder": folder.name, "files": files, "tensors": writer.index}
    return _replaced(content, lambda name, tensor: _placeholder(tensor)) | {"parts": parts}


def read(content: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The whole content of a checkpoint file that :func:`write` returned.

    Args:
        content: as read from the checkpoint file.
        directory: of the checkpoint file. Nothing outside of its folder of parts is read, whatever
            the index says.

    Raises:
        CorruptCheckpointError: if a file is missing or damaged, or the index makes no sense.
    """
    try:
        parts = content["parts"]
        folder = folder_of(content, directory)
        wanted = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in _tensors(content)
        }
        metadata = _metadata(parts, wanted)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in
                 parts["files"].items()}  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCheckpointError(f"its index of parts makes no sense ({error!r}).") from error
    for name, (size, digest) in files.items():
        _verify(folder / name, size, digest)
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in wanted.items()}
    if tensors:
        _not_told_to_be_alone()
        try:
            dcp.load(tensors, storage_reader=_Reader(folder, metadata), no_dist=True)
        except dcp.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CorruptCheckpointError(f"{folder} does not fit its index ({cause}).") from error
    whole = {key: value for key, value in content.items() if key != "parts"}
    return _replaced(whole, lambda name, tensor: tensors[name])


def folder_of(content: dict[str, Any], directory: Path) -> Path:
    """The folder of parts that a checkpoint names.

    Raises:
        ValueError: if that is no name of such a folder.
    """
    name = content["parts"]["folder"]
    if not isinstance(name, str) or not FOLDER.fullmatch(name):
        raise ValueError(f"{name!r} is no folder of parts")
    return directory / name


def new_folder(directory: Path, step: int) -> Path:
    """Make the folder of a checkpoint's parts; one of that step may be in use already."""
    directory.mkdir(parents=True, exist_ok=True)
    folder, number = directory / f"parts_{step}", 1
    while folder.exists():
        number += 1
        folder = directory / f"parts_{step}_{number}"
    folder.mkdir()
    return folder


def on_cpu(value: Any) -> Any:
    """A copy of nested containers whose tensors are in CPU memory and nobody else's."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return value


def _not_told_to_be_alone() -> None:
    """DCP warns a process that says that it is alone; a thread must not restore the filters."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that go into parts, by name; counters are no matter and stay."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str, tensor: Tensor) -> Tensor:
        found.append((name, tensor))
        return tensor

    _replaced(content, note)
    yield from found


def _replaced(content: dict[str, Any], by: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    def walk(value: Any, name: str) -> Any:
        if torch.is_tensor(value):
            return by(name, value) if value.ndim else value
        if isinstance(value, dict):
            return {key: walk(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, f"{name}/{index}") for index, item in enumerate(value)]
        return value

    return {key: walk(value, key) if key in _SECTIONS else value for key, value in content.items()}


def _placeholder(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _metadata(parts: dict[str, Any], wanted: dict[str, Tensor]) -> Metadata:
    """DCP's index of the parts, checked: it may come from anywhere."""
    known, places = {}, {}
    if not all(_FILE.fullmatch(file) for file in parts["files"]):
        raise ValueError(f"{list(parts['files'])} are no files of parts")
    for name, tensor in wanted.items():
        chunks, volume = [], 0
        for offsets, sizes, file, offset, length in parts["tensors"][name]:
            box = list(zip(offsets, sizes, tensor.shape, strict=True))
            if any(start < 0 or size < 0 or start + size > end for start, size, end in box):
                raise ValueError(f"a part of {name} lies outside of it")
            volume += math.prod(sizes)
            if offset < 0 or not math.prod(sizes) * tensor.itemsize <= length:
                raise ValueError(f"a part of {name} is too short")
            if offset + length > parts["files"][file][0]:
                raise ValueError(f"a part of {name} lies behind the end of {file}")
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(name, offsets)] = _StorageInfo(file, offset, length)
        if volume != tensor.numel():
            raise ValueError(f"the parts of {name} are not the whole of it")
        properties = TensorProperties(dtype=tensor.dtype)
        known[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    return Metadata(known, storage_data=places, storage_meta=StorageMeta())


def _verify(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{path} is missing; a checkpoint in parts is its file and its folder of parts."
        )
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise CorruptCheckpointError(f"{path} has {found} bytes instead of {size}.")
        if _sha256(file) != digest:
            raise CorruptCheckpointError(f"{path} is damaged (its SHA-256 does not match).")


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()
