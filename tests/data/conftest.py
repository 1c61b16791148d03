"""Fixtures of the data side."""

from __future__ import annotations

import pytest
from data_helpers import config, documents, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", documents())


@pytest.fixture
def settings(tmp_path, corpus):
    return config(tmp_path, [corpus])
