"""``slope bench`` on a GPU: every measurement, eager and from CUDA graphs."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from slope.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says that its 2:4 tensors are a prototype, and that fp32 products could be faster
    pytest.mark.filterwarnings("ignore:.*(SparseSemiStructured|TensorFloat32):UserWarning"),
]
SHAPE = ["--shapes", "1024x512", "--tokens", "256"]
COMMANDS = {
    "layer": [*SHAPE, "--precision", "mixed"],
    "setup": SHAPE,
    "lowrank": [*SHAPE, "--ranks", "0.0625", "--cold"],
    "train": ["--models", "toy", "--layers", "1", "--batch", "4", "--seq", "64"],
    "infer": ["--models", "toy", "--layers", "1", "--prompt", "64", "--tokens", "1,4"],
    "memory": ["--models", "toy", "--layers", "1", "--seq", "64"],
}


# torch's first product of a backward in a thread of its own.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("name", COMMANDS)
def test_each_measurement_runs_on_a_gpu(name, tmp_path):
    arguments = ["bench", name, "--device", "cuda", "--quick", "--output", str(tmp_path)]
    assert main([*arguments, *COMMANDS[name]]) == 0
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    failed = {(row.get("what"), row["contender"], row.get("mode")): row["failed"] for row in rows}
    ours = {key: why for key, why in failed.items() if key[1].startswith(("slope", "dense"))}
    assert not any(ours.values()), ours
    if name in ("layer", "infer"):
        assert {key[2] for key in ours} == {"eager", "graph"}
        assert all(float(row["host_us"]) > 0 for row in rows if not row["failed"])
    if name in ("train", "memory"):
        assert all(int(row["peak_bytes"]) > 0 for row in rows)
    environment = json.loads((tmp_path / "env.json").read_text(encoding="utf-8"))
    assert environment["gpu"]["gpu"] == torch.cuda.get_device_name()
    assert (tmp_path / "choices.json").is_file() and (tmp_path / "figure.png").is_file()


def test_a_graph_replays_what_was_captured():
    from slope.bench.timing import Clock, Effort, warmed

    clock = Clock(torch.device("cuda", 0))
    counter = torch.zeros((), device="cuda")
    call = warmed(lambda: counter.add_(1), clock, Effort(1, 1e-3, 2, 1))
    before = counter.item() + 1  # once more on the side stream
    replay = clock.captured(call)
    replay()
    clock.synchronize()
    assert counter.item() == before + 1
    device, host = clock.run(replay, 10)
    assert host > 0 and 0 < device < 1e-2
