"""Pairs of texts with hidden tokens are a pure function of seed, epoch and index."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from data_helpers import config, write_jsonl

from slope.data import BatchLoader, TokenDataset, pairs, prepare
from slope.data.dataset import HEADER_BYTES
from slope.data.pairs import IGNORED, IS_NEXT, Masking, PairDataset, Pieces

SEP, CLS, MASK, DOT = 3, 2, 4, 5
SIZE = 100  # 6 … 69 begin a word, 70 … 99 continue one
PIECES = Pieces(SIZE, CLS, SEP, MASK, np.arange(SIZE) >= 70, np.arange(SIZE) == DOT)
LENGTH = 32


def dataset(folder, masking=None, documents=60, length=LENGTH, pieces=PIECES):
    draw = np.random.default_rng(0)
    texts = []
    for _ in range(documents):
        text = draw.integers(6, SIZE, size=draw.integers(2, 90))
        text[7::9] = DOT
        texts += [text, [SEP]]
    texts += [[6], [SEP]]
    tokens = np.concatenate(texts).astype("uint16")
    path = folder / "tokens.bin"
    path.write_bytes(bytes(HEADER_BYTES) + tokens.tobytes())
    source = TokenDataset(path, "uint16", len(tokens), length)
    return PairDataset(source, SEP, pieces, masking or Masking(0.15, 5, False)), texts[::2]


@pytest.fixture
def data(tmp_path):
    return dataset(tmp_path)[0]


def all_of(data, epoch=0, seed=1):
    return data.examples(range(len(data)), seed, np.full(len(data), epoch))


def restored(batch):
    """The tokens before some were hidden."""
    ids = batch["input_ids"].clone()
    rows, places = torch.nonzero(batch["labels"] != IGNORED, as_tuple=True)
    ids[rows, batch["positions"][rows, places]] = batch["labels"][rows, places]
    return ids


def test_an_example_depends_on_seed_epoch_and_index_alone(data):
    whole = all_of(data)
    some = data.examples([7, 3], 1, np.array([0, 0]))
    for name, tensor in whole.items():
        assert torch.equal(some[name], tensor[[7, 3]]), name
        assert tensor.dtype == torch.int64
    for other in (all_of(data, epoch=1), all_of(data, seed=2)):
        assert not torch.equal(other["input_ids"], whole["input_ids"])
        assert not torch.equal(other["next_sentence_label"], whole["next_sentence_label"])


@pytest.mark.parametrize("stop", [1, 9])
def test_a_resumed_loader_goes_on_across_epochs(data, stop):
    def loader(batch_size=16):
        return BatchLoader(data, batch_size, seed=3, shuffle=True)

    count = stop + 2 * len(data) // 16
    unbroken = list(islice(loader(), count))
    before, after = loader(), loader()
    list(islice(before, stop))
    after.load_state_dict(before.state_dict())
    halves = loader(8)
    halves.load_state_dict(before.state_dict())
    for expected, batch in zip(unbroken[stop:], after, strict=False):
        both = [next(iter(halves)) for _ in range(2)]
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor), name
            assert torch.equal(torch.cat([half[name] for half in both]), tensor), name


def test_validation_hides_the_same_tokens_each_time(data):
    loader = BatchLoader(data, 16, seed=0, shuffle=False)
    once, again = list(loader), list(loader)
    assert sum(len(batch["input_ids"]) for batch in once) == len(data)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(once, again, strict=True)
    )


def test_an_example_is_laid_out_as_bert_reads_it(data):
    batch = all_of(data)
    ids = restored(batch)
    for row in range(len(data)):
        end = int(batch["attention_mask"][row].sum())
        seps = torch.nonzero(ids[row] == SEP).flatten().tolist()
        assert ids[row, 0] == CLS and len(seps) == 2 and seps[1] == end - 1
        kinds = batch["token_type_ids"][row]
        assert not kinds[: seps[0] + 1].any() and kinds[seps[0] + 1 : end].all()
        assert not ids[row, end:].any() and not kinds[end:].any()
        assert not batch["attention_mask"][row, end:].any()


def test_pieces_are_the_documents(tmp_path):
    data, texts = dataset(tmp_path)
    found: dict[int, list[int]] = {}
    for index in range(len(data)):
        document, start, end = data._piece(index)
        assert 1 <= end - start <= LENGTH - 3
        found.setdefault(document, []).extend(data.source.tokens[start:end].tolist())
    usable = [list(text) for text in texts if len(text) > 1]
    assert len(found) == len(usable) < len(texts)
    # What does not fit behind a bound that moved to the beginning of a word is left out.
    lost = sum(len(text) - len(found[number]) for number, text in enumerate(usable))
    assert lost <= 0.01 * sum(map(len, usable))
    assert [found[number][:5] for number in found] == [text[:5] for text in usable]


def test_half_of_the_second_texts_follow(data):
    batch = all_of(data)
    ids, follows = restored(batch), batch["next_sentence_label"] == IS_NEXT
    assert 0.35 < follows.double().mean() < 0.65
    for row in range(len(data)):
        document, start, end = data._piece(row)
        piece = data.source.tokens[start:end]
        first, second = (
            ids[row][(batch["token_type_ids"][row] == kind) & (ids[row] > MASK)].tolist()
            for kind in (0, 1)
        )
        assert piece[: len(first)].tolist() == first
        if DOT in piece[:-1]:
            assert first[-1] == DOT
        elif not PIECES.continues[piece[1:]].all():
            assert piece[len(first)] < 70
        if follows[row]:
            assert first + second == piece.tolist()
        else:
            mine = slice(data._starts[document], data._ends[document])
            text = " ".join(map(str, data.source.tokens[mine]))
            assert len(second) < 4 or " ".join(map(str, second)) not in text
            assert len(first + second) <= len(piece)


def test_hidden_tokens_are_80_10_10(tmp_path):
    data, _ = dataset(tmp_path, documents=600)
    batch = all_of(data)
    ids, labels = restored(batch), batch["labels"]
    special = (ids == CLS) | (ids == SEP) | (batch["attention_mask"] == 0)
    hidden = labels != IGNORED
    wanted = (0.15 * (~special).sum(1).double()).round().clamp(1, 5)
    assert torch.equal(hidden.sum(1), wanted.long())
    rows, places = torch.nonzero(hidden, as_tuple=True)
    at = batch["positions"][rows, places]
    assert not special[rows, at].any()
    assert len(set(zip(rows.tolist(), at.tolist(), strict=True))) == len(rows)
    shown, truth = batch["input_ids"][rows, at], labels[rows, places]
    count = len(truth)
    assert abs((shown == MASK).double().mean() - 0.8) < 4 * (0.16 / count) ** 0.5
    assert abs((shown == truth).double().mean() - 0.1) < 4 * (0.09 / count) ** 0.5
    others = shown[(shown != MASK) & (shown != truth)]
    assert others.min() < 10 and others.max() > 90
    untouched = torch.ones_like(ids, dtype=torch.bool)
    untouched[rows, at] = False
    assert torch.equal(batch["input_ids"][untouched], ids[untouched])
    # every place is chosen as often
    assert 0.4 < (at.double() / batch["attention_mask"].sum(1)[rows]).mean() < 0.6


def test_a_whole_word_is_hidden_or_none_of_it(tmp_path):
    data, _ = dataset(tmp_path, Masking(0.15, 5, True), documents=200)
    batch = all_of(data)
    ids = restored(batch)
    special = (ids == CLS) | (ids == SEP) | (batch["attention_mask"] == 0)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    rows, places = torch.nonzero(batch["labels"] != IGNORED, as_tuple=True)
    hidden[rows, batch["positions"][rows, places]] = True
    continues = (ids >= 70) & ~special & ~special.roll(1, 1)
    within = continues[:, 1:]
    assert within.any() and torch.equal(hidden[:, 1:][within], hidden[:, :-1][within])
    assert hidden.sum() > 0.6 * (0.15 * (~special).sum(1)).round().clamp(1, 5).sum()


@pytest.mark.parametrize(
    ("changes", "length", "text"),
    [
        ({"fraction": 0}, 128, r"masking.fraction=0 is outside \(0, 1\).*fraction=0.15"),
        ({"fraction": 1.0}, 128, r"masking.fraction=1.0 is outside"),
        ({"max_predictions": 0}, 128, r"max_predictions=0 must be between 1 and the 125 .*, 19\."),
        ({"max_predictions": 80}, 64, r"max_predictions=80 must be between 1 and the 61 tokens"),
        ({}, 4, r"datamodule.max_length=4 leaves no room for two texts.*max_length=128"),
    ],
)
def test_impossible_masking(changes, length, text):
    section = {"fraction": 0.15, "max_predictions": None, "whole_word": False, **changes}
    with pytest.raises(ValueError, match=text):
        Masking.from_config(section, length)


def test_null_predicts_the_share_of_a_whole_sequence():
    section = {"fraction": 0.15, "max_predictions": None, "whole_word": True}
    assert Masking.from_config(section, 128) == Masking(0.15, 19, True)


def test_one_document_makes_no_pairs(tmp_path):
    with pytest.raises(ValueError, match=r"holds 1 document\(s\) of two tokens.*val_ratio"):
        dataset(tmp_path, documents=1)


def test_other_tokenizers_have_no_pairs(tmp_path):
    texts = [f"one two three {number}. four five six." for number in range(60)]
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    data = prepare(config(tmp_path, [path]), progress=False)
    with pytest.raises(ValueError, match=r"has no token \[PAD\], .*tokenizer=bert-uncased"):
        pairs(data, Masking(0.15, 2, False))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["one", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    data = prepare(config(tmp_path, [path], tokenizer=str(vocabulary)), progress=False)
    with pytest.raises(ValueError, match=r"\[PAD\] is token 1 .*begins with \[PAD\]"):
        pairs(data, Masking(0.15, 2, False))
