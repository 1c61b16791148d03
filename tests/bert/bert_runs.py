"""A tiny BERT on a tiny corpus of several sentences per document, in two phases."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_runs import Runs

WORDS = [
    "the", "of", "and", "history", "city", "river", "is", "was", "in", "a", "king", "war", "music",
    "rivers", "cities", "kings",
]  # fmt: skip


def write_corpus(folder: Path, documents: int = 24) -> Path:
    draw = random.Random(0)
    for number in range(documents):
        sentences = [" ".join(draw.choices(WORDS, k=draw.randint(4, 9))) for _ in range(12)]
        (folder / f"{number}.txt").write_text(". ".join(sentences) + ".\n")
    return folder


class BertRuns(Runs):
    """Phase 1 and phase 2 of a BERT of two blocks; each phase takes a second."""

    def __init__(self, root: Path, corpus: Path) -> None:
        super().__init__(root, corpus)
        self.base = [
            "datamodule=text", f"datamodule.data_files={corpus}/*.txt",
            f"datamodule.cache_dir={corpus}/cache", "datamodule.val_ratio=0.2",
            "datamodule.tokenizer=wordpiece:128", "datamodule.num_workers=1",
            "datamodule.batch_size=4", "train.global_batch_size=8", f"paths.root={root}",
            "trainer.accelerator=cpu", "trainer.max_steps=8", "trainer.val_check_interval=4",
            "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "plot=false",
            "callbacks.checkpoint.every_n_steps=2", "model.config.hidden_size=32",
            "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2",
            "model.config.intermediate_size=64", "model.config.hidden_dropout_prob=0.1",
        ]  # fmt: skip
        self.first = ["experiment=bert/demo", "datamodule.max_length=16",
                      "datamodule.masking.max_predictions=2",
                      "model.config.max_position_embeddings=16"]  # fmt: skip
        self.second = ["experiment=bert/demo2", "datamodule.max_length=32",
                       "datamodule.masking.max_predictions=5", "pruner.lora_rank=4",
                       "model.config.max_position_embeddings=32"]  # fmt: skip

    def phase1(self, *overrides):
        return self.run(*self.first, *overrides)

    def phase2(self, *overrides):
        return self.run(*self.second, *overrides)
