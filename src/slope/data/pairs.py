"""BERT's examples: two pieces of text with hidden tokens, drawn anew in every epoch.

Each document of a token file is cut into pieces of nearly equal length that fit a sequence. An
example is one piece, cut in two at the end of a sentence where it has one: ``[CLS] A [SEP] B
[SEP]``, padded to the sequence length. In half of the examples B is a part of another document
instead. Then tokens are hidden: of those chosen, 80 % become ``[MASK]``, 10 % a random token, 10 %
stay.

Everything that is random about an example is a pure function of (seed, epoch, index): the order and
the number of processes play no part, and a resumed run sees what the unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slope.data.dataset import TokenDataset
from slope.data.wordpiece import CONTINUES, ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of a place that is not predicted."""
IS_NEXT, IS_RANDOM = 0, 1  # transformers' order
_SPECIAL = 3  # [CLS], [SEP], [SEP]
_MASKED, _RANDOM = 0.8, 0.9  # upper ends of the shares of hidden tokens
_SENTENCE_ENDS = (".", "!", "?")
_BLOCK = 1 << 26  # tokens read at once in search of the ends of documents


@dataclass(frozen=True)
class Masking:
    """Which tokens are hidden.

    Args:
        fraction: share of the tokens of an example that is predicted.
        max_predictions: of an example, at most.
        whole_word: hide all pieces of a word or none; words that fit the number are taken, so that
            a little less than the share is hidden.
    """

    fraction: float
    max_predictions: int
    whole_word: bool

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], max_length: int) -> Masking:
        """Read ``datamodule.masking``.

        Args:
            cfg: the section.
            max_length: tokens per sequence.

        Raises:
            ValueError: for a value that cannot be.
        """
        fraction, most = cfg["fraction"], cfg["max_predictions"]
        if not 0 < fraction < 1:
            raise ValueError(
                f"datamodule.masking.fraction={fraction} is outside (0, 1); it is the share of the "
                "tokens that is predicted: type datamodule.masking.fraction=0.15."
            )
        room = max_length - _SPECIAL
        if room < 2:
            raise ValueError(
                f"datamodule.max_length={max_length} leaves no room for two texts beside [CLS] and "
                "two [SEP]; type datamodule.max_length=128."
            )
        if most is None:
            most = max(1, round(fraction * max_length))
        if not 1 <= most <= room:
            raise ValueError(
                f"datamodule.masking.max_predictions={most} must be between 1 and the {room} "
                f"tokens that datamodule.max_length={max_length} leaves; type null for the share "
                f"of a whole sequence, {max(1, round(fraction * max_length))}."
            )
        return cls(float(fraction), int(most), bool(cfg["whole_word"]))


@dataclass(frozen=True, eq=False)
class Pieces:
    """What has to be known of a vocabulary of word pieces.

    Attributes:
        size: entries.
        cls: id of [CLS].
        sep: id of [SEP].
        mask: id of [MASK].
        continues: (size,) True for a piece that continues a word.
        ends: (size,) True for a piece that ends a sentence.
    """

    size: int
    cls: int
    sep: int
    mask: int
    continues: NDArray[np.bool_]
    ends: NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, size: int) -> Pieces:
        """The tables of a tokenizer.

        Args:
            tokenizer: of the token cache.
            size: entries of its vocabulary.

        Raises:
            ValueError: if it is none of BERT's kind.
        """
        known = tokenizer.get_vocab()
        names = {role: str(getattr(tokenizer, role, None) or ROLES[role]) for role in ROLES}
        missing = [name for name in names.values() if name not in known]
        if missing:
            raise ValueError(
                f"the tokenizer has no token {', '.join(missing)}, which BERT's examples need; "
                "type datamodule.tokenizer=bert-uncased, a vocab.txt, or wordpiece:8192 to train "
                "one on the corpus."
            )
        if known[names["pad_token"]] != 0:
            raise ValueError(
                f"{names['pad_token']} is token {known[names['pad_token']]} of the tokenizer, and "
                "BERT's embedding pads with token 0; type datamodule.tokenizer=<a vocabulary that "
                f"begins with {names['pad_token']}>."
            )
        continues, ends = np.zeros(size, bool), np.zeros(size, bool)
        for token, number in known.items():
            continues[number] = token.startswith(CONTINUES)
        ends[[known[end] for end in _SENTENCE_ENDS if end in known]] = True
        roles = (known[names[role]] for role in ("cls_token", "sep_token", "mask_token"))
        return cls(size, *roles, continues, ends)


class PairDataset:
    """Pairs of texts with hidden tokens, from the documents of a token file.

    Args:
        tokens: the file and the sequence length L.
        document_end: the token behind every document.
        pieces: its vocabulary.
        masking: which tokens are hidden.

    Raises:
        ValueError: if there are not two documents to take pairs from.

    Cost: the file is read once when it is opened, in search of the ends of documents (about a
    second per billion tokens); 24 bytes per document are kept.
    """

    def __init__(
        self, tokens: TokenDataset, document_end: int, pieces: Pieces, masking: Masking
    ) -> None:
        self.max_length = tokens.max_length
        self.source = tokens
        self.pieces = pieces
        self.masking = masking
        ends = _places(tokens.tokens, document_end)
        starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
        usable = ends - starts >= 2
        self._starts, self._ends = starts[usable], ends[usable]
        room = self.max_length - _SPECIAL
        # piece number of each document's first piece, and their number at the end
        self._first = np.concatenate(([0], np.cumsum(-(-(self._ends - self._starts) // room))))
        if len(self._starts) < 2:
            other = "larger" if tokens.path.stem == "val" else "smaller"
            raise ValueError(
                f"the split '{tokens.path.stem}' of the corpus holds {len(self._starts)} "
                "document(s) of two tokens or more, and BERT's pairs are made of two; give more "
                f"documents, or type datamodule.val_ratio=<a {other} share than now>."
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def examples(
        self, indices: Sequence[int] | NDArray[Any], seed: int, epochs: NDArray[Any]
    ) -> dict[str, Tensor]:
        """A batch of B examples; P is ``max_predictions``.

        Args:
            indices: numbers of the examples.
            seed: of everything random.
            epochs: of each example.

        Returns:
            ``input_ids``, ``token_type_ids`` and ``attention_mask`` (B, L); ``positions`` of the
            predicted tokens and their ``labels`` (B, P), 0 and -100 where there are fewer;
            ``next_sentence_label`` (B,), 0 if B follows A. All int64.
        """
        rows, length = len(indices), self.max_length
        draws = np.empty((rows, 4 + 3 * length))
        ids = np.zeros((rows, length), np.int64)
        kinds, present, follows = np.zeros_like(ids), np.zeros_like(ids), np.zeros(rows, np.int64)
        special = np.ones((rows, length), bool)
        for row, (index, epoch) in enumerate(zip(indices, epochs, strict=True)):
            key = (seed % 2**64) << 64 | int(epoch) << 40 | int(index)
            np.random.Generator(np.random.Philox(key=key)).random(out=draws[row])
            first, second, follows[row] = self._pair(int(index), draws[row, :4])
            middle = 1 + len(first)
            end = middle + 1 + len(second)
            ids[row, 0], ids[row, [middle, end]] = self.pieces.cls, self.pieces.sep
            ids[row, 1:middle], ids[row, middle + 1 : end] = first, second
            special[row, 1:middle] = special[row, middle + 1 : end] = False
            kinds[row, middle + 1 : end + 1] = 1
            present[row, : end + 1] = 1
        positions, labels = self._hide(ids, special, draws[:, 4:].reshape(rows, 3, length))
        batch = {
            "input_ids": ids,
            "token_type_ids": kinds,
            "attention_mask": present,
            "positions": positions,
            "labels": labels,
            "next_sentence_label": follows,
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _pair(
        self, index: int, draws: NDArray[np.float64]
    ) -> tuple[NDArray[Any], NDArray[Any], int]:
        """A, B, and whether B follows; ``draws`` (4,): how, where to cut, what else, where."""
        tokens = self.source.tokens
        document, start, end = self._piece(index)
        piece = tokens[start:end]
        cut = self._cut(piece, draws[1])
        if draws[0] < 0.5:
            return piece[:cut], piece[cut:], IS_NEXT
        other, start, end = self._piece(int(draws[2] * len(self)))
        if other == document:
            other = (document + 1) % len(self._starts)
            other, start, end = self._piece(int(self._first[other]))
        start += self._cut(tokens[start:end], draws[3])
        # As long as what follows would be, as far as that document goes.
        end = min(start + len(piece) - cut, int(self._ends[other]))
        return piece[:cut], tokens[start:end], IS_RANDOM

    def _piece(self, index: int) -> tuple[int, int, int]:
        """Number of a piece's document, and where in the file it starts and ends."""
        document = int(np.searchsorted(self._first, index, side="right")) - 1
        place = index - int(self._first[document])
        count = int(self._first[document + 1]) - int(self._first[document])
        start, end = int(self._starts[document]), int(self._ends[document])
        tokens = self.source.tokens
        bounds = [start + (end - start) * part // count for part in (place, place + 1)]
        most = (end - start) // count // 2  # tokens to go back to the beginning of a word
        for side, bound in enumerate(bounds):
            for shift in range(most):
                if not start < bound < end or not self.pieces.continues[tokens[bound - shift]]:
                    bounds[side] = bound - shift
                    break
        return document, bounds[0], min(bounds[1], bounds[0] + self.max_length - _SPECIAL)

    def _cut(self, piece: NDArray[Any], draw: float) -> int:
        """Where a piece is cut: behind a sentence, else behind a word, else in the middle."""
        places = np.flatnonzero(self.pieces.ends[piece[:-1]]) + 1
        if not len(places):
            places = np.flatnonzero(~self.pieces.continues[piece[1:]]) + 1
        return int(places[int(draw * len(places))]) if len(places) else len(piece) // 2

    def _hide(
        self, ids: NDArray[np.int64], special: NDArray[np.bool_], draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hide tokens of ``ids`` (B, L) in place; positions and labels (B, P).

        ``draws`` (B, 3, L): which tokens are chosen, what becomes of one, which random token.
        """
        masking = self.masking
        wanted = np.round(masking.fraction * (~special).sum(axis=1))
        wanted = np.clip(wanted, 1, masking.max_predictions)[:, None]
        places = np.arange(ids.shape[1])
        order_by = draws[:, 0]
        if masking.whole_word:
            begins = ~self.pieces.continues[ids] | np.roll(special, 1, axis=1)
            begin = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
            order_by = np.take_along_axis(order_by, begin, axis=1)
        order = np.argsort(np.where(special, 2.0, order_by), axis=1, kind="stable")
        last = np.broadcast_to(places, ids.shape)
        if masking.whole_word:
            last = _last_of_word(np.take_along_axis(begin, order, axis=1))
        order = order[:, : masking.max_predictions]
        chosen = (last < wanted)[:, : masking.max_predictions]
        chosen &= ~np.take_along_axis(special, order, axis=1)
        labels = np.take_along_axis(ids, order, axis=1)
        kind = np.take_along_axis(draws[:, 1], order, axis=1)
        other = (np.take_along_axis(draws[:, 2], order, axis=1) * self.pieces.size).astype(np.int64)
        shown = np.where(kind < _MASKED, self.pieces.mask, np.where(kind < _RANDOM, other, labels))
        np.put_along_axis(ids, order, np.where(chosen, shown, labels), axis=1)
        return np.where(chosen, order, 0), np.where(chosen, labels, IGNORED)


def _last_of_word(word: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place (B, L) of the last of the equal neighbours that each entry of ``word`` stands among."""
    places = np.arange(word.shape[1])
    changes = np.ones(word.shape, bool)
    changes[:, :-1] = word[:, 1:] != word[:, :-1]
    ends = np.where(changes, places, word.shape[1])
    return np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]


def _places(tokens: NDArray[Any], token: int) -> NDArray[np.int64]:
    """Where a token stands in a file that need not fit the memory."""
    found = [
        np.flatnonzero(tokens[start : start + _BLOCK] == token) + start
        for start in range(0, len(tokens), _BLOCK)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)
