"""Fixtures of the training tests: a corpus, a place for runs, and one finished run."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_runs import Runs

WORDS = [
    "the",
    "of",
    "and",
    "history",
    "city",
    "river",
    "is",
    "was",
    "in",
    "a",
    "king",
    "war",
    "music",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(120)) for _ in range(12)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # A forked child must not wait for threads that it does not have.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(tmp_path, corpus):
    return Runs(tmp_path, corpus)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, corpus):
    """An unbroken run named ``whole``; do not write into its folders."""
    runs = Runs(tmp_path_factory.mktemp("finished"), corpus)
    runs.summary = runs.run("name=whole", "plot=true", "demo=true")
    return runs
