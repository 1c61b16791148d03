"""Start several processes of the training program; each does a list of runs one after the other.

As a script it is one of these processes: ``ranks.py <jobs.json>``, told its place by the variables
that torchrun or SLURM sets.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

WORDS = ["the", "of", "and", "history", "city", "river", "is", "was", "in", "a", "king", "war"]
FOLDER = Path(__file__).parent


def write_corpus(folder: Path, documents: int = 12) -> Path:
    """Small text files, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(documents):
        text = " ".join(draw.choice(WORDS) for _ in range(120))
        (folder / f"{number}.txt").write_text(text + "\n")
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, of those that no system gives to connections meanwhile."""
    draw, sockets = random.SystemRandom(), []
    while len(sockets) < count:
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", draw.randrange(15000, 32000)))
        except OSError:
            one.close()
        else:
            sockets.append(one)
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def python_path() -> str:
    """Where a process of a test finds the package and the helper modules."""
    source = Path(__file__).parents[2] / "src"
    return os.pathsep.join([str(source), str(FOLDER), str(FOLDER.parent / "training")])


@contextmanager
def reads_of_training():
    """The numbers of the training sequences that this process reads, one list per batch."""
    from slope.data import TokenDataset

    reads, read = [], TokenDataset.batch

    def batch(self, indices):
        if self.path.name == "train.bin":
            reads.append([int(index) for index in indices])
        return read(self, indices)

    TokenDataset.batch = batch
    try:
        yield reads
    finally:
        TokenDataset.batch = read


def torchrun_place(rank: int, devices: int, nodes: int) -> dict[str, object]:
    """What torchrun tells a process."""
    return {
        "RANK": rank, "WORLD_SIZE": devices * nodes, "LOCAL_RANK": rank % devices,
        "LOCAL_WORLD_SIZE": devices, "GROUP_RANK": rank // devices, "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip


def slurm_place(rank: int, devices: int, nodes: int) -> dict[str, object]:
    """What SLURM tells a task of srun."""
    return {
        "SLURM_JOB_ID": 17, "SLURM_JOB_NAME": "slope", "SLURM_NTASKS": devices * nodes,
        "SLURM_NTASKS_PER_NODE": devices, "SLURM_NNODES": nodes, "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % devices, "SLURM_NODEID": rank // devices,
        "SLURM_NODELIST": "localhost",
    }  # fmt: skip


def run_on(
    folder: Path,
    jobs: list[list[str]],
    devices: int,
    nodes: int = 1,
    place: Callable[[int, int, int], dict[str, object]] = torchrun_place,
    timeout: float = 600,
) -> None:
    """Do each job, the overrides of a run, on ``devices`` x ``nodes`` processes of one group.

    Args:
        folder: for notes and for what the processes print.
        jobs: overrides of each run, without devices and nodes; ``{rank}`` is the process's.
        devices: processes per node.
        nodes: pretended, on this machine.
        place: what the launcher tells a process.
        timeout: seconds for all of it.

    Raises:
        AssertionError: with what it printed, if a process fails.
    """
    same = [f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"]
    note = folder / f"jobs_{devices}x{nodes}.json"
    note.write_text(
        json.dumps({"jobs": [[*job, *same] for job in jobs], "ports": free_ports(len(jobs))})
    )
    processes = []
    for rank in range(devices * nodes):
        told = place(rank, devices, nodes) | {"OMP_NUM_THREADS": 1, "PYTHONPATH": python_path()}
        environment = os.environ | {key: str(value) for key, value in told.items()}
        with open(folder / f"rank{rank}.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "error", __file__, note],
                    env=environment, stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > end:
                break  # the others would wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    killed = -signal.SIGKILL  # by us: what the one says that failed is worth reading first
    codes = [process.returncode for process in processes]
    for rank in sorted(range(len(codes)), key=lambda rank: codes[rank] == killed):
        said = (folder / f"rank{rank}.txt").read_text()
        assert codes[rank] == 0, f"process {rank} ended with {codes[rank]}: {said}"


def main() -> None:
    """One process."""
    import torch

    from slope import configs
    from slope.training import run

    torch.set_num_threads(1)
    note = json.loads(Path(sys.argv[1]).read_text())
    for number, (job, port) in enumerate(zip(note["jobs"], note["ports"], strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
        with reads_of_training() as reads:
            run(configs.compose([words.replace("{rank}", rank) for words in job]))
        Path(sys.argv[1]).with_name(f"reads_{number}_{rank}.json").write_text(json.dumps(reads))
    sys.stdout.flush()
    # A gloo thread that asks for the interpreter's lock while that shuts down aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
