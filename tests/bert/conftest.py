"""Fixtures of the BERT tests: a corpus, a place for runs, and two finished phases."""

from __future__ import annotations

import pytest
import torch
from bert_runs import BertRuns, write_corpus


@pytest.fixture(scope="session")
def bert_corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("bert_corpus"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # A forked child must not wait for threads that it does not have.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(tmp_path, bert_corpus):
    return BertRuns(tmp_path, bert_corpus)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, bert_corpus):
    """Unbroken runs named ``bert-demo`` and ``second``; do not write into their folders."""
    runs = BertRuns(tmp_path_factory.mktemp("bert"), bert_corpus)
    runs.summaries = [runs.phase1(), runs.phase2("name=second")]
    return runs
