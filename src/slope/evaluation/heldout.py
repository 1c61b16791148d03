"""Perplexity of text that was held out: which tokens are scored, and from how much context.

The tokens of a file are one stream. A window of W tokens moves over it S tokens at a time, and each
window predicts the tokens that no window before it held; so each token is scored once, from at
least W - S tokens of context after the first window. With S = W the windows do not overlap, and the
first token of each is not predicted, as in training and in the tables of most pruning papers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slope.data.cache import UnusableCacheError, open_cache
from slope.data.files import (
    COMPRESSIONS,
    SEPARATOR,
    TEXT_FORMATS,
    find_files,
    read_documents,
    read_text,
)

Span = tuple[int, int, int]
"""A window's first token, the token after its last, and the first token that it predicts."""


@dataclass(frozen=True)
class HeldOut:
    """The tokens of a file.

    Attributes:
        ids: token ids, int64 of shape (tokens,).
        documents: how many were joined, None for a file of tokens.
        text_bytes: of the text in UTF-8, None for a file of tokens.
    """

    ids: Tensor
    documents: int | None = None
    text_bytes: int | None = None


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood of the tokens that were predicted.

    Attributes:
        loss: nats per token.
        stderr: standard error of the loss, windows being the draws; None with one window.
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
    joined by its end-of-text token. A text file is one document unless it holds ``<|endoftext|>``.

    Args:
        path: text or JSON lines, compressed or not, or parquet; ``.npy`` with token ids in one
            dimension; ``train.bin`` or ``val.bin`` of a token cache.
        tokenizer: of `transformers`; None will do for a file of tokens.
        text_field: field of JSON lines, column of a table.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of an unknown kind or damaged, or holds no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}' to evaluate on; give --data an existing file.")
    if path.suffix in (".npy", ".bin"):
        return HeldOut(_token_file(path))
    if tokenizer is None:
        raise ValueError(
            f"'{path}' holds text, and the checkpoint comes without a tokenizer; type --tokenizer "
            "<a tokenizer.json, or a folder that holds one>."
        )
    end = tokenizer.eos_token_id
    ids: list[int] = []
    count, size = 0, 0
    try:
        for document in _documents(path, text_field):
            if not document.strip():
                continue
            if ids and end is not None and ids[-1] != end:
                ids.append(end)
            ids += tokenizer(document, verbose=False)["input_ids"]
            count, size = count + 1, size + len(document.encode())
    except ValueError as error:
        raise ValueError(_in_our_words(str(error))) from error
    if not count:
        raise ValueError(f"'{path}' holds no text to evaluate on.")
    return HeldOut(torch.tensor(ids), count, size)


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


@torch.no_grad()
def score(
    model: Any,
    ids: Tensor,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    track: Callable[[list[list[Span]]], Iterable[list[Span]]] = iter,
) -> Score:
    """Score a stream of tokens.

    Args:
        model: causal language model; ``model(input_ids=(batch, length)).logits``.
        ids: token ids, shape (tokens,).
        window: tokens that the model sees at once; None: its context, or 1024 if it has no limit.
        stride: tokens from one window to the next; None: ``window``.
        batch_size: windows at once.
        track: given the batches, hands them out; the place for a progress bar.

    Raises:
        ValueError: if a number is out of range, a token is unknown to the model, the model predicts
            no next token, or there are less than two tokens.
    """
    if not getattr(model, "can_generate", lambda: True)():
        raise ValueError(
            f"{type(model).__name__} is no causal language model, so it has no perplexity."
        )
    context = getattr(model.config, "max_position_embeddings", None)
    window = window or context or 1024
    stride = stride or window
    if window < 2 or (context is not None and window > context):
        most = "" if context is None else f" and at most {context}, the model's context"
        raise ValueError(f"a window of {window} tokens must be at least 2{most}.")
    if not 1 <= stride <= window:
        raise ValueError(
            f"a stride of {stride} tokens must be from 1 to the window's {window}; a larger one "
            "would leave tokens out."
        )
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} token to evaluate on: the first one is never predicted.")
    entries = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= entries:
        raise ValueError(
            f"the tokens run from {int(ids.min())} to {int(ids.max())}, but the model has {entries}"
            " of them; the file was made with another tokenizer."
        )
    spans = list(windows(len(ids), window, stride))
    batches: list[list[Span]] = []
    for span in spans:
        # Only the last window may be shorter than the others.
        alike = batches and span[1] - span[0] == batches[-1][0][1] - batches[-1][0][0]
        if alike and len(batches[-1]) < batch_size:
            batches[-1].append(span)
        else:
            batches.append([span])
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []
    try:
        for batch in track(batches):
            rows = torch.stack([ids[start:end] for start, end, _ in batch]).to(model.device)
            logits = model(input_ids=rows).logits
            for row, logit, (start, _, first) in zip(rows, logits, batch, strict=True):
                skip = first - start
                losses = torch.nn.functional.cross_entropy(
                    logit[skip - 1 : -1].float(), row[skip:], reduction="none"
                )
                sums.append(losses.double().sum())
    finally:
        model.train(was_training)
    per_window = torch.stack(sums).cpu().numpy()
    counts = np.array([end - first for _, end, first in spans], dtype=np.float64)
    predicted = counts.sum()
    loss = float(per_window.sum() / predicted)
    stderr = None
    if len(spans) > 1:
        spread = float(np.square(per_window - loss * counts).sum())
        stderr = math.sqrt(len(spans) / (len(spans) - 1) * spread) / predicted
    return Score(loss, stderr, int(predicted), window, stride)


def _documents(path: Path, text_field: str) -> Iterable[str]:
    (path,) = find_files([str(path)])
    kinds = [kind for suffix in path.suffixes if (kind := suffix.lower()) not in COMPRESSIONS]
    if kinds[-1] in TEXT_FORMATS:
        return read_text(path).split(SEPARATOR)
    return (document for document, _ in read_documents(path, text_field))


def _token_file(path: Path) -> Tensor:
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"'{path}' cannot be read ({error}); write it with np.save."
            ) from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"'{path}' holds {array.dtype} of shape {array.shape}; token ids are whole numbers "
                "in one dimension."
            )
        return torch.from_numpy(array.astype(np.int64))
    folder = path.parent
    try:
        key = json.loads((folder / "meta.json").read_bytes())["key"]
        tokens = open_cache(folder, key).dataset(path.stem, 1).tokens
    except (OSError, ValueError, KeyError, UnusableCacheError) as error:
        raise ValueError(
            f"'{path}' is not the train.bin or val.bin of a token cache ({error}); other tokens go "
            "into a .npy file, by np.save."
        ) from error
    return torch.from_numpy(tokens.astype(np.int64))


def _in_our_words(text: str) -> str:
    """An error about a data file with the options of ``slope eval``."""
    text = text.replace("datamodule.text_field=", "--text-field ")
    return text.replace("datamodule.data_files", "--data")
