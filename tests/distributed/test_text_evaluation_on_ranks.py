"""Evaluations of other texts are the same on several processes, which share out the windows."""

from __future__ import annotations

import pytest
import ranks
import torch
from tiny_runs import Runs

SAME = [
    "trainer.max_steps=4", "trainer.val_check_interval=4", "model.config.resid_pdrop=0",
    "trainer.precision=64-true", "plot=false", "train.optimizer.eps=1e-4",
    "callbacks.evaluation.every_n_steps=1", "callbacks.evaluation.stride=20",
    "callbacks.evaluation.batch_size=2",
]  # fmt: skip
WAYS = {"ddp": "trainer.strategy=ddp", "fsdp2": "trainer.strategy=fsdp2"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    made = Runs(root, ranks.write_corpus(root / "corpus"))
    words = " ".join(ranks.WORDS)
    # an odd number of batches, and less of them than processes
    (root / "long.txt").write_text(f"{words} " * 12)
    (root / "short.txt").write_text(words[:20])
    files = f"callbacks.evaluation.files=[{root}/long.txt,{root}/short.txt]"
    settings = [*SAME, files]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made.run(*settings, "name=alone", "datamodule.batch_size=4")
    torch.set_num_threads(before)
    jobs = [
        [*made.base, *settings, f"name={way}", strategy, "datamodule.batch_size=2"]
        for way, strategy in WAYS.items()
    ]
    ranks.run_on(root, jobs, devices=2)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_measure_what_one_does(runs, way):
    alone, shared = runs.rows("alone"), runs.rows(way)
    columns = [name for name in alone[0] if name.startswith("eval/")]
    assert len(columns) == 6 and list(shared[0]) == list(alone[0])
    assert [row["step"] for row in shared] == ["1", "2", "3", "4"]
    for one, other in zip(alone, shared, strict=True):
        for name in ("train/loss", *columns):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-6), name
