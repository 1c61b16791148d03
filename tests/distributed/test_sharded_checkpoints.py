"""Checkpoints in parts: written by any strategy, read by any other, on any number of processes."""

from __future__ import annotations

import shutil

import pytest
import ranks
import torch
from tiny_runs import Runs, assert_equal

from slope.training import checkpoint

SAME = [
    "trainer.max_steps=8", "trainer.val_check_interval=4", "callbacks.checkpoint.every_n_steps=4",
    "trainer.log_every_n_steps=1", "model.config.resid_pdrop=0", "pruner.lora_start=0.5",
    "trainer.gradient_clip_val=0.5", "trainer.precision=64-true", "plot=false",
    "train.optimizer.eps=1e-4", "generate.max_new_tokens=1",
]  # fmt: skip
PARTS = "callbacks.checkpoint.format=sharded"
FILE = "callbacks.checkpoint.format=file"
ASYNC = "callbacks.checkpoint.asynchronous=true"
FSDP, HSDP, DDP = "trainer.strategy=fsdp2", "trainer.strategy=hsdp", "trainer.strategy=ddp"
# name: settings of two processes that write checkpoints
WRITERS = {
    "fsdp2-auto": [FSDP],
    "fsdp2-async": [FSDP, ASYNC],
    "fsdp2-file-async": [FSDP, FILE, ASYNC],
    "ddp-parts": [DDP, PARTS],
    "ddp-async": [DDP, ASYNC],
    "zero-parts": ["optimizer=adamw-zero", PARTS, ASYNC],
}
# who wrote the checkpoint of step 4, who goes on from it, and on how many processes
READERS = [
    ("fsdp2-auto", "alone", [], 1),
    ("fsdp2-auto", "ddp-file", [DDP, FILE], 2),
    ("ddp-parts", "fsdp2", [FSDP], 2),
    ("alone", "fsdp2", [FSDP], 2),
    ("fsdp2-auto", "hsdp-4", [HSDP], 4),
    ("zero-parts", "fsdp2-4", [FSDP, ASYNC], 4),
]  # fmt: skip


def name_of(before, after):
    return f"{before}-then-{after}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    made = Runs(root, ranks.write_corpus(root / "corpus"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made.run("name=alone", *SAME)
    on_two = [
        [*made.base, *SAME, *settings, f"name={name}", "datamodule.batch_size=2"]
        for name, settings in WRITERS.items()
    ]
    ranks.run_on(root, on_two, devices=2)
    resumed = ["resume=true", "resume_iter=4"]
    jobs = {1: [], 2: [], 4: []}
    for before, after, settings, count in READERS:
        name = name_of(before, after)
        shutil.copytree(made.checkpoints(before), made.checkpoints(name))
        batch = f"datamodule.batch_size={4 // count}"
        jobs[count].append([*SAME, *settings, *resumed, f"name={name}", batch])
    for job in jobs[1]:
        made.run(*job)
    torch.set_num_threads(threads)
    for count, nodes in ((2, 1), (4, 2)):
        ranks.run_on(root, [[*made.base, *job] for job in jobs[count]], count // nodes, nodes)
    return made


def close(runs, name):
    a, b = runs.last("alone"), runs.last(name)
    assert list(a["state_dict"]) == list(b["state_dict"]) and b["global_step"] == 8
    for key, tensor in a["state_dict"].items():
        if key.endswith("column_mask"):  # made anew in the next forward
            continue
        other = b["state_dict"][key]
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, tensor, rtol=0, atol=1e-13, msg=key)
    moments, others = (state["optimizer_states"][0]["state"] for state in (a, b))
    assert set(moments) == set(others)


@pytest.mark.parametrize("writer", WRITERS)
def test_two_processes_write_what_one_would(runs, writer):
    close(runs, writer)
    folder = runs.checkpoints(writer)
    parts = sorted(path.name for path in folder.glob("parts_*"))
    in_parts = "file" not in writer and writer != "ddp-async"
    assert parts == (["parts_4", "parts_8"] if in_parts else [])
    for part in parts:
        # Each process wrote a share, and nothing is a pickle of objects.
        assert sorted(path.name for path in (folder / part).iterdir()) == [
            "__0_0.distcp", "__1_0.distcp",
        ]  # fmt: skip
    names = {path.name for path in folder.iterdir()} - set(parts)
    assert names == {"last.ckpt", "step_4.ckpt", "step_8.ckpt"}


@pytest.mark.parametrize(("before", "after"), [case[:2] for case in READERS])
def test_another_strategy_on_another_number_of_processes_goes_on(runs, before, after):
    close(runs, name_of(before, after))


def test_a_process_writes_about_half_of_it(runs):
    folder = runs.checkpoints("fsdp2-auto") / "parts_8"
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) < 0.6 * sum(sizes)


def test_both_formats_hold_the_same(runs):
    one, other = runs.last("fsdp2-auto"), runs.last("fsdp2-file-async")
    for key in ("state_dict", "optimizer_states", "global_step", "lr_schedulers"):
        assert_equal(one[key], other[key], key)
    found = checkpoint.load(runs.checkpoints("fsdp2-auto") / "step_4.ckpt")
    assert found["global_step"] == 4
