"""torchrun starts all processes again when one dies; they go on from the last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ranks
import torch
from tiny_runs import Runs

ROOT = Path(__file__).parents[2]
SAME = [
    "trainer.max_steps=30", "trainer.val_check_interval=10", "callbacks.checkpoint.every_n_steps=2",
    "model.config.resid_pdrop=0", "pruner.lora_start=0.5", "trainer.precision=64-true",
    "train.optimizer.eps=1e-4", "plot=false",
]  # fmt: skip


def children(process):
    return [
        int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def test_a_dead_process_is_started_again_and_nothing_is_lost(tmp_path):
    runs = Runs(tmp_path, ranks.write_corpus(tmp_path / "corpus"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs.run("name=alone", *SAME)
    torch.set_num_threads(threads)
    environment = os.environ | {
        "GPUS": "2", "NODES": "1", "RESTARTS": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ranks.python_path(),
    }  # fmt: skip
    command = [ROOT / "scripts" / "run_jobs_torchrun.sh", *runs.base, *SAME, "name=torchrun"]
    command += ["trainer.strategy=fsdp2", "callbacks.checkpoint.asynchronous=true"]
    with open(tmp_path / "said.txt", "w") as output:
        agent = subprocess.Popen(
            [*command, "datamodule.batch_size=2"],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        end = time.monotonic() + 90
        while not (runs.checkpoints("torchrun") / "last.ckpt").exists():
            assert agent.poll() is None and time.monotonic() < end, (
                tmp_path / "said.txt"
            ).read_text()
            time.sleep(0.01)
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        code = agent.wait(120)
    finally:
        agent.kill()
    said = (tmp_path / "said.txt").read_text()
    assert code == 0, said
    assert "going on from step" in said
    a, b = runs.last("alone"), runs.last("torchrun")
    assert b["global_step"] == 30
    for key, tensor in a["state_dict"].items():
        if not key.endswith("column_mask"):  # made anew in the next forward
            torch.testing.assert_close(b["state_dict"][key], tensor, rtol=0, atol=1e-13, msg=key)
    assert [row["step"] for row in runs.rows("torchrun")] == [
        row["step"] for row in runs.rows("alone")
    ]
