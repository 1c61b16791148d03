"""A tiny sparse BERT with a vocabulary, and task sets in the official formats."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers

import slope
from slope.finetune import settings

GOOD, BAD = ("good", "great", "fine"), ("bad", "awful", "poor")
FILLER = ("the", "film", "is", "a", "story", "of", "it", "was", "and", "very", "in", "town")
NAMES = ("rome", "paris", "berlin", "oslo", "lima", "cairo")
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER, *NAMES,
    "what", "city", "?", ".", ",", "##s", "##ly",
]  # fmt: skip
VOCABULARY_SIZE = len(VOCABULARY)


def tiny_model(**changes):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return transformers.BertForPreTraining(config)


def sparse_model(**options):
    model = tiny_model()
    slope.sparsify(model, slope.SparsityConfig(skip=["cls"], **options))
    return model


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def write_sst2(folder: Path, train=96, dev=32) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split, count in (("train", train), ("dev", dev)):
        rows = ["sentence\tlabel"]
        for number in range(count):
            word = draw.choice((BAD, GOOD)[number % 2])
            words = [*draw.sample(FILLER, 5), word]
            draw.shuffle(words)
            rows.append(f"{' '.join(words)}\t{number % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def squad_article(count: int, seed: int, length=12) -> dict:
    draw = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = draw.choices(FILLER, k=length)
        at, name = draw.randrange(length), draw.choice(NAMES)
        words[at] = name.capitalize()
        start = len(" ".join([*words[:at], ""]))
        asked = {
            "id": f"{seed}-{number}",
            "question": "What city?",
            "answers": [{"text": name.capitalize(), "answer_start": start}],
        }
        paragraphs.append({"context": " ".join(words), "qas": [asked]})
    return {"version": "1.1", "data": [{"title": "Cities", "paragraphs": paragraphs}]}


def write_squad(folder: Path, train=96, dev=24, **options) -> Path:
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 0), ("dev", dev, 1)):
        article = squad_article(count, seed, **options)
        (folder / f"{name}-v1.1.json").write_text(json.dumps(article, indent=1))
    return folder


def chosen(*overrides):
    """Settings with a shorter length than the recipes', as the tiny model needs."""
    return settings(["max_length=32", "max_query_length=8", "accelerator=cpu", *overrides])
