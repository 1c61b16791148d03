"""A tiny corpus, tokenized once, and comparisons that read it."""

from __future__ import annotations

import random

import pytest

WORDS = ["the", "of", "and", "history", "city", "river", "is", "was", "in", "king", "war", "music"]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Overrides of the smoke comparison on a text of its own, without ``paths.root``."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(12):
        text = " ".join(draw.choice(WORDS) for _ in range(120))
        (folder / f"{number}.txt").write_text(text + "\n")
    return [
        "experiment=compare/smoke", "datamodule=text", f"datamodule.data_files={folder}/*.txt",
        f"datamodule.cache_dir={folder}/cache", "datamodule.val_ratio=0.2",
        "trainer.accelerator=cpu",
    ]  # fmt: skip
