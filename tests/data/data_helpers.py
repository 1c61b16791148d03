"""A small corpus and its configuration, shared by the tests of the data side."""

from __future__ import annotations

import json

import numpy as np

WORDS = ["sparse", "weights", "keep", "two", "of", "four", "and", "learn", "the", "rest", "again"]


def documents(count=60, words=40, seed=0):
    rng = np.random.default_rng(seed)
    return [f"doc {i}: " + " ".join(rng.choice(WORDS, size=words)) for i in range(count)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def config(folder, files, **changes):
    return {
        "dataset": "text",
        "data_files": [str(path) for path in files],
        "tokenizer": "bpe:300",
        "max_length": 16,
        "val_ratio": 0.2,
        "cache_dir": str(folder / "cache"),
        **changes,
    }
