"""From the documents of a corpus to the token files of its two splits, on every core."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slope.data.cache_format import token_header
from slope.data.config import DataConfig
from slope.data.corpora import Corpus
from slope.data.dataset import HEADER_BYTES
from slope.data.progress import TokenProgress
from slope.data.tokenizer import LoadedTokenizer
from slope.disk import sync_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_CHARS = 1 << 21
_BATCH_DOCUMENTS = 2048
_IN_FLIGHT = 2


class _Document(NamedTuple):
    text: str
    number: int  # decides the split
    position: int  # how far the corpus was read with it


def training_texts(corpus: Corpus, config: DataConfig, bar: TokenProgress) -> Iterator[str]:
    """The texts that are not for validation; a tokenizer may be trained on them.

    In a small corpus the document that :func:`write_splits` holds back is among them.
    """
    limit = int(config.val_ratio * 2**64)
    for text, number, position in _documents(corpus, config):
        bar.advance(position)
        if number >= limit:
            yield text


def write_splits(
    folder: Path,
    key: str,
    dtype: np.dtype,
    tokenizer: LoadedTokenizer,
    corpus: Corpus,
    config: DataConfig,
    bar: TokenProgress,
) -> dict[str, dict[str, Any]]:
    """Tokenise every document into its split.

    The document with the smallest number so far is held back, with its copies: it becomes the
    validation split where no number is below ``val_ratio``, so that a small corpus has one document
    of it; otherwise it is trained on, later than its place in the corpus.
    """
    limit = int(config.val_ratio * 2**64)
    held: NDArray[Any] = np.empty(0, dtype)
    smallest, copies = 2**64, 0
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
            elif number == smallest:
                copies += 1
            elif val.documents == 0 and number < smallest:
                for _ in range(copies):
                    train.write(held)
                held, smallest, copies = tokens, number, 1
            else:
                train.write(tokens)
        split = train if val.documents else val
        for _ in range(copies):
            split.write(held)
    return {"train": train.entry(), "val": val.entry()}


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
            file.write(token_header(self.dtype.itemsize, self.tokens, self.key))
            sync_file(file)

    def entry(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self._digest.hexdigest(),
        }


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
