"""The launchers: torchrun on two nodes, SLURM's tasks, and the sbatch file's requeueing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import ranks
import torch
from tiny_runs import Runs

ROOT = Path(__file__).parents[2]
SAME = [
    "trainer.max_steps=6", "trainer.val_check_interval=3", "callbacks.checkpoint.every_n_steps=3",
    "model.config.resid_pdrop=0", "pruner.lora_start=0.5", "trainer.precision=64-true",
    "pruner.column_mask_interval=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("launch")
    made = Runs(root, ranks.write_corpus(root / "corpus"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # Its token cache is another: the processes of the first test build their own.
    made.run("name=alone", *SAME, f"datamodule.cache_dir={root}/other")
    torch.set_num_threads(before)
    return made


def close(runs, name):
    one, two = runs.rows("alone"), runs.rows(name)
    for a, b in zip(one, two, strict=True):
        assert float(b["train/loss"]) == pytest.approx(float(a["train/loss"]), rel=1e-6)
    a, b = (runs.last(which)["state_dict"] for which in ("alone", name))
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, rtol=0, atol=1e-13, msg=key)


def namespaces(stack: ExitStack) -> list[tuple[list[str], dict[str, str]]]:
    """Two machines with a cable between them: how to run something there, and its environment.

    Where the kernel does not let us, both are this machine.
    """
    names = [f"slope{os.getpid()}{end}" for end in "ab"]
    links = [f"sl{os.getpid()}{end}" for end in "ab"]

    def ip(*words: str) -> bool:
        try:
            return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    made = ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
    if not made:
        return [([], {"MASTER": "127.0.0.1"})] * 2
    for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
        stack.callback(ip, "netns", "del", name)
        made = made and ip("netns", "add", name) and ip("link", "set", link, "netns", name)
        inside = ["-n", name]
        made = made and ip(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", link)
        made = made and ip(*inside, "link", "set", link, "up")
        made = made and ip(*inside, "link", "set", "lo", "up")
    if not made:
        ip("link", "del", links[0])
        return [([], {"MASTER": "127.0.0.1"})] * 2
    return [
        (["ip", "netns", "exec", name], {"MASTER": "10.77.0.1", "GLOO_SOCKET_IFNAME": link})
        for name, link in zip(names, links, strict=True)
    ]


def test_two_nodes_of_torchrun_train_the_model_of_one_process(runs):
    overrides = [*runs.base, *SAME, "name=torchrun", "datamodule.batch_size=2"]
    port = ranks.free_ports(1)[0]
    with ExitStack() as stack:
        agents = []
        for node, (where, settings) in enumerate(namespaces(stack)):
            environment = os.environ | settings | {
                "GPUS": "1", "NODES": "2", "NODE_RANK": str(node), "RESTARTS": "0",
                "MASTER": f"{settings['MASTER']}:{port}", "OMP_NUM_THREADS": "1",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": ranks.python_path(),
            }  # fmt: skip
            command = [*where, ROOT / "scripts" / "run_jobs_torchrun.sh", *overrides]
            with open(runs.root / f"node{node}.txt", "w") as output:
                agent = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            agents.append(agent)
            stack.callback(agent.kill)
        codes = [agent.wait(120) for agent in agents]
    said = [(runs.root / f"node{node}.txt").read_text() for node in (0, 1)]
    assert codes == [0, 0], said
    close(runs, "torchrun")
    # One of them built the token cache; only rank 0 says what it did.
    assert len(list((runs.root / "corpus" / "cache").glob("*/meta.json"))) == 1


def test_tasks_of_slurm_train_the_model_of_one_process(runs, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    jobs = [[*runs.base, *SAME, "name=slurm", "datamodule.batch_size=2"]]
    ranks.run_on(runs.root, jobs, devices=1, nodes=2, place=ranks.slurm_place)
    close(runs, "slurm")


def test_the_bare_command_starts_the_processes_of_a_sharded_model(runs):
    command = [
        sys.executable, "-W", "error", ROOT / "training" / "run.py", *runs.base, *SAME, "name=bare",
        "trainer.devices=2", "datamodule.batch_size=2", "trainer.strategy=fsdp2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": ranks.python_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    close(runs, "bare")


@pytest.mark.parametrize(
    ("at_signal", "signalled", "code", "requeued"),
    [("exit 130", True, 0, True), ("exit 0", True, 0, False), ("exit 1", False, 1, False)],
    ids=["time is up", "finished in time", "failed"],
)
def test_the_sbatch_file_requeues_what_ran_out_of_time(
    tmp_path, at_signal, signalled, code, requeued
):
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    last = "while :; do sleep 0.05; done" if signalled else at_signal
    scripts = {
        # srun passes signals on to its tasks.
        "srun": 'echo "$@" > arguments; shift; exec "$@"',
        "python": f"trap '{at_signal}' USR1; touch started; {last}",
        "scontrol": 'echo "$@" > requeued',
    }
    for name, text in scripts.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3",
        "SLURM_JOB_ID": "17",
    }  # fmt: skip
    script = ROOT / "scripts" / "run_jobs_slurm.sh"
    job = subprocess.Popen(["bash", script, "name=my-run"], env=environment)
    if signalled:
        end = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < end:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    words = (tmp_path / "arguments").read_text()
    assert "trainer.devices=2 trainer.num_nodes=3 resume=True name=my-run" in words
    found = tmp_path / "requeued"
    assert (found.read_text() if found.exists() else "") == ("requeue 17\n" if requeued else "")
