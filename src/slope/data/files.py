"""Read documents from local files, and say exactly where a file is wrong.

Formats: ``.txt``/``.md``, JSON lines (``.jsonl``, ``.ndjson``, ``.json``), each also ``.gz``,
``.zst`` or ``.xz``, and ``.parquet``. No corpus is read whole: memory stays at some MiB per file.

A text file is cut into documents at ``<|endoftext|>`` and, where a document grows longer than
``PIECE_CHARS``, at the next blank line; so that one long book can be split for validation.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEXT_FORMATS = (".txt", ".md")
JSON_FORMATS = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst", ".xz")
EXTENSIONS = "*.txt, *.md, *.jsonl, *.ndjson, *.json (each also .gz, .zst, .xz), *.parquet"
SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 16_384
_BLOCK_BYTES = 1 << 18
_SHOWN_CHARS = 60
_MAGIC = ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst"), (b"\xfd7zXZ", ".xz"),
          (b"PAR1", ".parquet"))  # fmt: skip


def read_utf8(path: Path) -> str:
    """The text of a vocabulary or of a task's file, without a byte order mark.

    Raises:
        ValueError: if it is not UTF-8, with the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"'{path}' line {line}: not UTF-8 text ({error.reason}); convert it with "
            "iconv -t UTF-8, or give another file."
        ) from error


def find_files(patterns: Iterable[str]) -> tuple[Path, ...]:
    """Turn paths, folders and globs into files, in order and each once.

    Of a folder, what lies in folders whose names begin with a dot is left out.

    Raises:
        FileNotFoundError: if one of them matches nothing.
        ValueError: if one of them, or a file, is empty, or an extension is unknown.
    """
    found: dict[Path, Path] = {}  # by what links lead to: each is read once
    for pattern in patterns:
        if not pattern.strip():  # Path("") would be the folder we are in
            raise ValueError(
                f"datamodule.data_files={pattern!r} is empty (a shell variable that is not set?); "
                "type a path, folder or glob, or . for all files below this folder."
            )
        path = Path(pattern).expanduser()
        if path.is_dir():
            inside = sorted(p for p in _visible(path) if _known(p))
            if not inside:
                raise FileNotFoundError(
                    f"folder '{pattern}' holds no data file ({EXTENSIONS}); "
                    "check datamodule.data_files."
                )
            matches = inside
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
            matches = [p for p in matches if p.is_file()]
        if not matches:
            raise FileNotFoundError(
                f"data file '{pattern}' does not exist (looked in '{Path.cwd()}'); "
                "type datamodule.data_files= with an existing path, folder or glob."
            )
        for match in matches:
            found.setdefault(match.resolve(), match)
    for path in found.values():
        if not _known(path):
            raise ValueError(
                f"data file '{path}' has the unknown extension '{path.suffix}'; "
                f"known: {EXTENSIONS}."
            )
        if path.stat().st_size == 0:
            raise ValueError(
                f"data file '{path}' is empty (0 bytes); "
                "write it again or take it out of datamodule.data_files."
            )
    return tuple(found.values())


def _visible(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those in it that are not hidden as .slope-cache is."""
    entered = {folder.resolve()}
    for name, folders, files in os.walk(folder, followlinks=True):
        inside = Path(name)
        found = {each: (inside / each).resolve() for each in sorted(folders) if each[0] != "."}
        folders[:] = [each for each, place in found.items() if place not in entered]
        entered.update(found.values())
        yield from (path for path in map(inside.joinpath, files) if path.is_file())


def format_of(path: Path) -> tuple[str, str]:
    """Format and compression of a file by its name: ('.jsonl', '.gz')."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _known(path: Path) -> bool:
    form, compression = format_of(path)
    return form in TEXT_FORMATS + JSON_FORMATS or (form == ".parquet" and not compression)


def check_file(path: Path, text_field: str) -> None:
    """Read the beginning of a file, so that a wrong one is found before any work is done.

    Raises:
        ValueError: if the file is binary, damaged, or has no such field.
    """
    kind, compression = format_of(path)
    with path.open("rb") as file:
        head = file.read(8)
    for magic, suffix in _MAGIC:
        if head.startswith(magic) and suffix not in (compression, kind):
            raise ValueError(
                f"data file '{path}' is not '{path.suffix}' but '{suffix}' (so its first bytes "
                f"say); rename it to end in '{suffix}'."
            )
    if next(read_documents(path, text_field), None) is None:
        raise ValueError(f"data file '{path}' holds no text; take it out of datamodule.data_files.")


def read_documents(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """Yield the documents of a file, each with the number of bytes of the file read so far.

    Raises:
        ValueError: if the file is binary, damaged or truncated, or has no such field; the text
            names the file and, for JSON lines, the line.
    """
    kind, _ = format_of(path)
    if kind == ".parquet":
        return _read_parquet(path, text_field)
    if kind in JSON_FORMATS:
        return _read_json_lines(path, text_field)
    return _read_text(path)


def read_text(path: Path) -> str:
    """The text of a text file, whole and decompressed.

    Raises:
        ValueError: as :func:`read_documents`.
    """
    data = b"".join(block for block, _ in _blocks(path, lambda: "in its text"))
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    return _decode(decoder, data, path, "its text", final=True)


def _read_text(path: Path) -> Iterator[tuple[str, int]]:
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    buffer, position, read = "", 0, 0
    blocks = _blocks(path, lambda: f"after {read} bytes of text")
    for block, position in blocks:
        buffer += _decode(decoder, block, path, f"bytes {read} to {read + len(block)}")
        read += len(block)
        while (cut := _cut(buffer, final=False)) is not None:
            document, buffer = cut
            yield document, position
    buffer += _decode(decoder, b"", path, "the last bytes", final=True)
    while (cut := _cut(buffer, final=True)) is not None:
        document, buffer = cut
        yield document, position


def _decode(decoder: Any, block: bytes, path: Path, where: str, final: bool = False) -> str:
    try:
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data file '{path}' is not UTF-8 text ({error.reason} in {where}); "
            "it is binary, truncated or in another encoding: convert it with iconv -t UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"data file '{path}' is binary, not text (a zero byte in {where}); "
            "take it out of datamodule.data_files."
        )
    return text


def _cut(buffer: str, *, final: bool) -> tuple[str, str] | None:
    """Split the next document off; None: more text is needed, or none is left.

    The decision looks at no more than 4 * PIECE_CHARS, so that it does not depend on the blocks
    that the text arrived in.
    """
    limit = 4 * PIECE_CHARS
    if not buffer or (not final and len(buffer) < limit + len(SEPARATOR)):
        return None
    separator = buffer.find(SEPARATOR, 0, limit + len(SEPARATOR))
    blank = buffer.find("\n\n", PIECE_CHARS, limit)
    if separator >= 0 and (blank < 0 or separator <= blank):
        return buffer[:separator], buffer[separator + len(SEPARATOR) :]
    if blank >= 0:
        return buffer[:blank], buffer[blank + 2 :]
    if len(buffer) <= limit:
        return buffer, ""
    for mark in ("\n", " "):
        place = buffer.rfind(mark, PIECE_CHARS, limit)
        if place >= 0:
            return buffer[:place], buffer[place + 1 :]
    return buffer[:limit], buffer[limit:]


def _read_json_lines(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    for number, line, position, whole in _lines(path):
        where = f"data file '{path}' line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); "
                "the file is binary, damaged or in another encoding."
            ) from error
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            truncated = "" if whole else " and has no line end: the file is truncated"
            raise ValueError(
                f"{where} is not JSON ({error.msg} at character {error.pos}){truncated}; "
                f"it begins {text[:_SHOWN_CHARS]!r}. "
                "Each line must be one object; copy the file again or repair the line."
            ) from error
        except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
            raise ValueError(
                f"{where} cannot be read ({_first_line(error)}); repair the line or take it out."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is a JSON {type(record).__name__}, not an object; "
                f'each line must look like {{"{text_field}": "..."}}.'
            )
        if text_field not in record:
            raise ValueError(f"{where} {_no_field(text_field, record)}")
        value = record[text_field]
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: field '{text_field}' is a {type(value).__name__}, not text; "
                "type datamodule.text_field=<the field that holds the text>."
            )
        yield value, position


def _no_field(text_field: str, names: Iterable[str]) -> str:
    names = list(names)
    example = names[0] if len(names) == 1 else "<one of them>"
    return (
        f"has no field '{text_field}'; fields found: {', '.join(names) or 'none'}. "
        f"Type datamodule.text_field={example}."
    )


def _read_parquet(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"data file '{path}' is not a whole parquet file ({_first_line(error)}); "
            "it is truncated or of another kind: copy or download it again."
        ) from error
    with table:
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise ValueError(f"data file '{path}' {_no_field(text_field, schema.names)}")
        if schema.names.count(text_field) > 1:
            raise ValueError(
                f"data file '{path}' has {schema.names.count(text_field)} columns '{text_field}'; "
                "rename all but one."
            )
        kind = schema.field(text_field).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(
                f"data file '{path}': column '{text_field}' is {kind}, not string; "
                "type datamodule.text_field=<the column that holds the text>."
            )
        rows, done = max(1, table.metadata.num_rows), 0
        batches = table.iter_batches(batch_size=1024, columns=[text_field])
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(
                    f"data file '{path}' is damaged after row {done} ({_first_line(error)}); "
                    "copy or download it again."
                ) from error
            if batch is None:
                return
            done += batch.num_rows
            # A name with dots also selects fields inside of others.
            for text in batch.column(batch.schema.names.index(text_field)).to_pylist():
                if text is not None:
                    yield text, size * done // rows


def _lines(path: Path) -> Iterator[tuple[int, bytes, int, bool]]:
    """Number, bytes, position in the file, and whether a line end followed, of each line."""
    number, position = 0, 0
    parts: list[bytes] = []
    blocks = _blocks(path, lambda: f"after line {number}")
    for block, position in blocks:
        if number == 0 and b"\0" in block:
            raise ValueError(
                f"data file '{path}' is binary, not text (a zero byte near its beginning); "
                "take it out of datamodule.data_files."
            )
        first, *rest = block.split(b"\n")
        parts.append(first)
        for piece in rest:
            number += 1
            yield number, b"".join(parts), position, True
            parts = [piece]
    if last := b"".join(parts):
        yield number + 1, last, position, False


def _blocks(path: Path, where: Callable[[], str]) -> Iterator[tuple[bytes, int]]:
    """Uncompressed bytes of a file, some at a time, and the position in the file."""
    _, compression = format_of(path)
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
    if compression == ".zst":
        import zstandard

        damage = (EOFError, zstandard.ZstdError)
    with path.open("rb") as file:
        blocks = _decompress(file, compression)
        while True:
            try:
                block = next(blocks, None)
            except damage as error:
                raise ValueError(
                    f"data file '{path}' is truncated or damaged {where()} ({_first_line(error)}); "
                    "copy or download it again."
                ) from error
            if block is None:
                return
            yield block, file.tell()


def _decompress(file: BinaryIO, compression: str) -> Iterator[bytes]:
    if compression == ".zst":
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        yield from _decompress_frames(file, decompressor.decompressobj)
        return
    if compression == ".xz":
        yield from _decompress_frames(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
        return
    reader: Any = _READERS[compression](file)
    while block := reader.read(_BLOCK_BYTES):
        yield block


_READERS: dict[str, Callable[[BinaryIO], Any]] = {
    "": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
}


def _decompress_frames(file: BinaryIO, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Frame after frame; the libraries' readers let one that stops short, or is none, pass."""
    frame, frames = None, 0
    pending = b""
    while pending or (pending := file.read(_BLOCK_BYTES)):
        if frame is None:
            if frames and not (pending := pending.lstrip(b"\0")):  # xz may be padded in between
                continue
            frame, frames = begin(), frames + 1
        if block := frame.decompress(pending):
            yield block
        pending = frame.unused_data if frame.eof else b""
        if frame.eof:
            frame = None
    if frame is not None:
        raise EOFError("the file ends inside a frame")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
