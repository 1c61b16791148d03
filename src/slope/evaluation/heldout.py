"""Perplexity of text that was held out: which tokens are scored, and from how much context.

The tokens of a file are one stream. A window of W tokens moves over it S tokens at a time, and each
window predicts the tokens that no window before it held; so each token is scored once, from at
least W - S tokens of context after the first window. With S = W the windows do not overlap, and the
first token of each is not predicted, as in training and in the tables of most pruning papers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slope.data.cache import UnusableCacheError, open_cache
from slope.data.files import (
    COMPRESSIONS,
    JSON_FORMATS,
    SEPARATOR,
    TEXT_FORMATS,
    find_files,
    read_documents,
    read_text,
)
from slope.evaluation.perplexity import perplexity
from slope.evaluation.table import Measurement

METRICS = ("perplexity", "loss", "bits_per_byte")
Span = tuple[int, int, int]
"""A window's first token, the token after its last, and the first token that it predicts."""


@dataclass(frozen=True)
class HeldOut:
    """The tokens of a file.

    Attributes:
        ids: token ids, int64 of shape (tokens,).
        documents: how many were joined, None for a file of tokens.
        text_bytes: of the text in UTF-8, None for a file of tokens.
        separated: whether a token stands between two documents.
    """

    ids: Tensor
    documents: int | None = None
    text_bytes: int | None = None
    separated: bool = True


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood of the tokens that were predicted.

    Attributes:
        loss: nats per token.
        stderr: standard error of the loss, windows being the draws; None with one window, or where
            the loss is not finite.
        predicted: tokens.
        window: tokens of a window.
        stride: tokens from one window to the next.
    """

    loss: float
    stderr: float | None
    predicted: int
    window: int
    stride: int


def read_held_out(path: Path, tokenizer: Any, text_field: str = "text") -> HeldOut:
    """Read the tokens of a file, or tokenise its text.

    Documents are encoded one by one, with the special tokens that the tokenizer adds by itself, and
    joined by its end-of-text token (one that names none: ``<|endoftext|>``, if it has that). A text
    file is one document unless it holds ``<|endoftext|>``.

    Args:
        path: text or JSON lines, compressed or not, or parquet; ``.npy`` with token ids in one
            dimension; ``train.bin`` or ``val.bin`` of a token cache.
        tokenizer: of `transformers`; None will do for a file of tokens.
        text_field: field of JSON lines, column of a table.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of an unknown kind or damaged, holds no text, or its tokens are not of
            this tokenizer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}' to evaluate on; give --data an existing file.")
    if path.suffix == ".npy":
        return HeldOut(_token_array(path, tokenizer))
    if path.suffix == ".bin":
        return HeldOut(_cached_tokens(path, tokenizer))
    if tokenizer is None:
        raise ValueError(
            f"'{path}' holds text, and the checkpoint comes without a tokenizer; type --tokenizer "
            "<a tokenizer.json, or a folder that holds one>."
        )
    end = tokenizer.eos_token_id
    if end is None:  # a bare tokenizer.json does not say which token it is
        end = tokenizer.get_vocab().get(SEPARATOR)
    ids: list[int] = []
    count, size = 0, 0
    try:
        for document in _documents(path, text_field):
            if not document.strip():
                continue
            size += _bytes(document, path)
            if ids and end is not None and ids[-1] != end:
                ids.append(end)
            ids += tokenizer(document, verbose=False)["input_ids"]
            count += 1
    except ValueError as error:
        raise ValueError(_in_our_words(str(error))) from error
    if not count:
        raise ValueError(f"'{path}' holds no text to evaluate on.")
    return HeldOut(torch.tensor(ids, dtype=torch.int64), count, size, end is not None)


def has_fields(path: Path) -> bool:
    """Whether a file's name is one of JSON lines or of a table, which keep text in a named field.

    Example:
        >>> has_fields(Path("val.jsonl.gz")), has_fields(Path("val.txt"))
        (True, False)
    """
    return _kind(path) in (*JSON_FORMATS, ".parquet")


def labels(paths: Sequence[Path]) -> list[str]:
    """Names of files by which a table tells them apart: without the folder where that is enough.

    Raises:
        ValueError: if a file is given twice.

    Example:
        >>> labels([Path("a/val.txt"), Path("b/val.txt"), Path("c/book.txt")])
        ['a/val.txt', 'b/val.txt', 'book.txt']
    """
    files = [path.resolve() for path in paths]
    for path, file in zip(paths, files, strict=True):
        if files.count(file) > 1:
            raise ValueError(f"'{path}' is given {files.count(file)} times; give it once.")
    names = [path.name for path in paths]
    return [str(p) if names.count(p.name) > 1 else p.name for p in paths]


def counting(held_out: HeldOut, found: Score) -> str:
    """Which tokens were scored, in words."""
    text = f"{len(held_out.ids):,} tokens"
    if held_out.documents == 1:
        text += " in 1 document"
    elif held_out.documents is not None:
        text += f" in {held_out.documents:,} documents "
        text += (
            "joined by the end-of-text token"
            if held_out.separated
            else ("with nothing between them, as the tokenizer has no end-of-text token")
        )
    text += f"; windows of {found.window:,}, {found.stride:,} apart; {found.predicted:,} tokens "
    least = max(1, found.window - found.stride)
    return text + (
        f"predicted, each once, after the first window from at least {least:,} tokens of context."
    )


def measurements(label: str, data: str, held_out: HeldOut, found: Score) -> list[Measurement]:
    """Perplexity, loss and, of text, bits per byte; each with its standard error.

    Args:
        label: name of the model in the results.
        data: name of the file.
        held_out: its tokens.
        found: what :func:`score` made of them.
    """
    value = perplexity(found.loss)
    scales = [(value, value), (found.loss, 1.0)]
    if held_out.text_bytes is not None:
        share = len(held_out.ids) / (held_out.text_bytes * math.log(2))
        scales.append((share * found.loss, share))
    return [
        Measurement(
            label,
            data,
            metric,
            number,
            None if found.stderr is None or math.isinf(number) else slope * found.stderr,
            found.predicted,
            found.window,
            found.stride,
        )
        for metric, (number, slope) in zip(metrics(held_out), scales, strict=True)
    ]


def metrics(held_out: HeldOut) -> tuple[str, ...]:
    """What :func:`measurements` measures of a file."""
    return METRICS if held_out.text_bytes is not None else METRICS[:-1]


def windows(tokens: int, window: int, stride: int) -> Iterator[Span]:
    """The windows over a stream, in order.

    Example:
        >>> list(windows(10, 4, 2))
        [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
        >>> list(windows(10, 4, 4))
        [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    """
    done = 1  # nothing predicts the first token
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        first = max(done, start + 1)
        if first < end:
            yield start, end, first
        done = end
        if end == tokens:
            return


def check(
    model: Any, ids: Tensor, window: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Whether a stream of tokens can be scored, before any work.

    Args:
        model: as for :func:`score`.
        ids: likewise.
        window: likewise.
        stride: likewise.

    Returns:
        Window and stride in tokens.

    Raises:
        ValueError: as :func:`score`.
    """
    if not is_causal(model):
        raise ValueError(
            f"{type(model).__name__} is no causal language model, so it has no perplexity."
        )
    window, stride = check_window(model, window, stride)
    if len(ids) < 2:
        raise ValueError(
            f"{len(ids)} token to evaluate on, and the first one is never predicted: give a longer "
            "text."
        )
    entries = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= entries:
        raise ValueError(
            f"the tokens run from {int(ids.min())} to {int(ids.max())}, but the model has {entries}"
            " of them; the file was made with another tokenizer: evaluate on the text itself."
        )
    return window, stride


def is_causal(model: Any) -> bool:
    """Whether a model predicts the next token; one that is not of `transformers` is taken to."""
    return bool(getattr(model, "can_generate", lambda: True)())


def check_window(model: Any, window: int | None, stride: int | None) -> tuple[int, int]:
    """Whether a model can see so many tokens; the part of :func:`check` that needs no tokens."""
    context = getattr(model.config, "max_position_embeddings", None)
    if window is None:
        window = context or 1024
    if window < 2 or (context is not None and window > context):
        most = "" if context is None else f" and at most {context}, the model's context"
        raise ValueError(f"a window of {window} tokens must be at least 2{most}.")
    if stride is None:
        stride = window
    if not 1 <= stride <= window:
        raise ValueError(
            f"a stride of {stride} tokens must be from 1 to the window's {window}; a larger one "
            "would leave tokens out."
        )
    return window, stride


@torch.no_grad()
def score(
    model: Any,
    ids: Tensor,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    track: Callable[[list[list[Span]]], Iterable[list[Span]]] = iter,
    rank: int = 0,
    world_size: int = 1,
) -> Score:
    """Score a stream of tokens.

    Several processes share out the batches and all get the whole result. They do equally many
    forwards, as a model needs whose parameters are shared out too.

    Args:
        model: causal language model; ``model(input_ids=(batch, length)).logits``.
        ids: token ids, shape (tokens,).
        window: tokens that the model sees at once; None: its context, or 1024 if it has no limit.
        stride: tokens from one window to the next; None: ``window``.
        batch_size: windows at once.
        track: given the batches, hands them out; the place for a progress bar.
        rank: of this process.
        world_size: processes of the default group that call this together.

    Raises:
        ValueError: if a number is out of range, a token is unknown to the model, the model predicts
            no next token, or there are less than two tokens.
    """
    window, stride = check(model, ids, window, stride)
    spans = list(windows(len(ids), window, stride))
    batches: list[list[Span]] = []
    for span in spans:
        # Only the last window may be shorter than the others.
        alike = batches and span[1] - span[0] == batches[-1][0][1] - batches[-1][0][0]
        if alike and len(batches[-1]) < batch_size:
            batches[-1].append(span)
        else:
            batches.append([span])

    def logits_of(batch: list[Span]) -> tuple[Tensor, Tensor]:
        rows = torch.stack([ids[start:end] for start, end, _ in batch]).to(model.device)
        return rows, model(input_ids=rows).logits

    mine = batches[rank::world_size]
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(spans), dtype=torch.float64, device=model.device)
    place = {span: number for number, span in enumerate(spans)}
    try:
        for batch in track(mine):
            for span, row, logit in zip(batch, *logits_of(batch), strict=True):
                skip = span[2] - span[0]
                losses = torch.nn.functional.cross_entropy(
                    logit[skip - 1 : -1].float(), row[skip:], reduction="none"
                )
                sums[place[span]] = losses.double().sum()
        if len(mine) < math.ceil(len(batches) / world_size):
            logits_of(batches[0])  # to take part in the last forward of the others
    finally:
        model.train(was_training)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    per_window = sums.cpu().numpy()
    counts = np.array([end - first for _, end, first in spans], dtype=np.float64)
    predicted = float(counts.sum())
    loss = float(per_window.sum() / predicted)
    stderr = None
    if len(spans) > 1 and math.isfinite(loss):
        spread = float(np.square(per_window - loss * counts).sum())
        stderr = math.sqrt(len(spans) / (len(spans) - 1) * spread) / predicted
    return Score(loss, stderr, int(predicted), window, stride)


def _documents(path: Path, text_field: str) -> Iterable[str]:
    (path,) = find_files([str(path)])
    if _kind(path) in TEXT_FORMATS:
        return read_text(path).split(SEPARATOR)
    return (document for document, _ in read_documents(path, text_field))


def _kind(path: Path) -> str:
    """A file's suffix, before that of a compression; of a name without one, nothing."""
    kinds = [kind for suffix in path.suffixes if (kind := suffix.lower()) not in COMPRESSIONS]
    return kinds[-1] if kinds else ""


def _bytes(document: str, path: Path) -> int:
    try:
        return len(document.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"'{path}' holds half of a surrogate pair ({document[error.start]!r}), which is no "
            "character; a JSON file has it as \\ud800 to \\udfff: repair that text."
        ) from error


def _token_array(path: Path, tokenizer: Any) -> Tensor:
    try:
        array: Any = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}); write it with np.save.") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"'{path}' is an archive of arrays; write one array with np.save.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"'{path}' holds {array.dtype} of shape {array.shape}; token ids are whole numbers in "
            "one dimension."
        )
    known = None if tokenizer is None else max(tokenizer.get_vocab().values())
    if known is not None and array.size and int(array.max()) > known:
        raise ValueError(
            f"'{path}' holds token {int(array.max())}, but the tokenizer's last one is {known}; "
            "the file was made with another tokenizer: evaluate on the text itself."
        )
    return torch.from_numpy(array.astype(np.int64))


def _cached_tokens(path: Path, tokenizer: Any) -> Tensor:
    folder = path.parent
    try:
        key = json.loads((folder / "meta.json").read_bytes())["key"]
        cache = open_cache(folder, key)
        tokens = cache.dataset(path.stem, 1).tokens
    except (OSError, ValueError, KeyError, TypeError, UnusableCacheError) as error:
        raise ValueError(
            f"'{path}' is not the train.bin or val.bin of a token cache ({error}); other tokens go "
            "into a .npy file, by np.save."
        ) from error
    made_with = cache.tokenizer().backend.get_vocab(with_added_tokens=True)
    if tokenizer is not None and not made_with.items() <= tokenizer.get_vocab().items():
        raise ValueError(
            f"'{path}' was made with tokenizer '{cache.meta['tokenizer']['name']}' of "
            f"{len(made_with):,} entries, not with the model's; evaluate on the text itself."
        )
    return torch.from_numpy(tokens.astype(np.int64))


def _in_our_words(text: str) -> str:
    """An error about a data file with the options of ``slope eval``."""
    text = text.replace("datamodule.text_field=", "--text-field ")
    return text.replace("datamodule.data_files", "--data")
