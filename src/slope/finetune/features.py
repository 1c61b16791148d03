"""Word pieces, and what a model reads of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slope.data.wordpiece import from_vocabulary
from slope.finetune.metrics import Array

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Tensor cores, dense and sparse, want the number of tokens divisible by 8.
_LENGTH_MULTIPLE = 8
_BATCH = 1000
_FILES = ("tokenizer.json", "vocab.txt")
_SPECIAL = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
}


class Feature(NamedTuple):
    """One input of the model.

    Attributes:
        input_ids: int32 (length,): [CLS] first [SEP], and if there is a second text: second [SEP].
        second: where the second text begins; ``length`` without one.
        targets: what the model's loss is made of, by argument; empty in an evaluation.
    """

    input_ids: Array
    second: int
    targets: Mapping[str, int | float]


@dataclass(frozen=True)
class WordPieces:
    """A tokenizer of `tokenizers` and its ids.

    Attributes:
        backend: the tokenizer.
        cls: id of [CLS].
        sep: id of [SEP].
        pad: id of [PAD].
        path: where it was found, for messages.
    """

    backend: Tokenizer
    cls: int
    sep: int
    pad: int
    path: str

    @property
    def size(self) -> int:
        """Largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> Iterable[Encoding]:
        """Word pieces of each text, without special tokens; ``offsets`` are characters."""
        for start in range(0, len(texts), _BATCH):
            yield from self.backend.encode_batch(
                list(texts[start : start + _BATCH]), add_special_tokens=False
            )

    def join(
        self, first: list[int], second: list[int] | None, targets: Mapping[str, int | float]
    ) -> Feature:
        """One text, or two, with the special tokens."""
        head = [self.cls, *first, self.sep]
        tail = [] if second is None else [*second, self.sep]
        return Feature(np.array(head + tail, dtype=np.int32), len(head), targets)

    def collate(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """A batch, padded to its longest input rounded up to a multiple of 8."""
        longest = max(len(feature.input_ids) for feature in features)
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        batch = {
            "input_ids": torch.full((len(features), length), self.pad),
            "token_type_ids": torch.zeros(len(features), length, dtype=torch.long),
            "attention_mask": torch.zeros(len(features), length, dtype=torch.long),
        }
        for row, feature in enumerate(features):
            end = len(feature.input_ids)
            batch["input_ids"][row, :end] = torch.from_numpy(feature.input_ids)
            batch["token_type_ids"][row, feature.second : end] = 1
            batch["attention_mask"][row, :end] = 1
        for name in features[0].targets:
            batch[name] = torch.tensor([feature.targets[name] for feature in features])
        return batch


def load_word_pieces(spec: str | None, init_from: str) -> WordPieces:
    """The tokenizer of a checkpoint.

    Args:
        spec: of the settings; None looks beside the checkpoint.
        init_from: the checkpoint, or its folder.

    Raises:
        FileNotFoundError: if there is none beside the checkpoint.
        ValueError: if it cannot be read, or is none of BERT's kind.
    """
    if spec is None:
        spec = _beside(Path(init_from))
    elif spec.startswith(("bpe:", "wordpiece:")):
        raise ValueError(
            f"tokenizer={spec} is one to train on a corpus, and a fine-tuning needs the "
            "checkpoint's; type tokenizer=<its tokenizer.json or vocab.txt>."
        )
    path = Path(spec)
    if (path / _FILES[1]).is_file() and not (path / _FILES[0]).is_file():
        path = path / _FILES[1]
    roles: Mapping[str, str] = {}
    if path.suffix == ".txt" and path.is_file():
        backend = from_vocabulary(path)
    else:
        from slope.data.config import DataConfig
        from slope.data.tokenizer import load_tokenizer

        try:
            loaded = load_tokenizer(DataConfig(tokenizer=spec), ())
        except (RuntimeError, ValueError) as error:
            text = str(error).replace("datamodule.tokenizer", "tokenizer")
            raise ValueError(text) from error
        backend, roles = loaded.backend, loaded.special_tokens
    known = backend.get_vocab(with_added_tokens=True)
    names = [roles.get(role, token) for role, token in _SPECIAL.items()]
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"tokenizer '{spec}' has no token {', '.join(missing)}, so it is none of BERT's kind; "
            "type tokenizer=<the vocab.txt or tokenizer.json that the checkpoint was trained with>."
        )
    cls, sep, pad, _ = (known[name] for name in names)
    return WordPieces(backend, cls, sep, pad, str(spec))


def _beside(init_from: Path) -> str:
    folder = init_from if init_from.is_dir() else init_from.parent
    for name in _FILES:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(
        f"no {' or '.join(_FILES)} lies beside the checkpoint in '{folder}'; type "
        "tokenizer=<the vocab.txt or tokenizer.json that it was trained with>."
    )
