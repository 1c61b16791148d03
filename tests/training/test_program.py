"""A run from its configuration: what it writes, what it refuses, how it stops."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from slope.training import checkpoint, program
from slope.training.module import LanguageModule

KEYS = {
    "val_loss", "val_perplexity", "train_loss", "steps", "tokens", "tokens_per_second",
    "peak_memory_bytes", "parameters_dense", "parameters_stored", "weight_bytes_sparse_layers",
    "weight_bytes_dense_equivalent", "optimizer_state_bytes", "adapters_started_at_step",
    "wall_seconds", "device",
}  # fmt: skip


def test_summary(finished):
    summary = finished.summary
    assert set(summary) == KEYS | {"bigram_val_loss", "bigram_val_perplexity"}
    logs = finished.root / "logs" / "whole"
    assert json.loads((logs / "summary.json").read_text()) == summary
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 8 * 32
    assert summary["adapters_started_at_step"] == 9
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert summary["weight_bytes_sparse_layers"] < 0.6 * summary["weight_bytes_dense_equivalent"]
    rows = finished.rows("whole")
    assert summary["val_loss"] == float(rows[-1]["val/loss"])
    losses = [float(row["train/loss"]) for row in rows]
    assert summary["train_loss"] == pytest.approx(sum(losses) / len(losses))
    for name in ("config.yaml", "report.txt", "run.log", "curves.png", "sample.txt"):
        assert (logs / name).stat().st_size > 0, name
    assert "first linear layer" in (logs / "report.txt").read_text()
    assert "adapters start at step 9" in (logs / "run.log").read_text()


def test_rows(finished):
    rows = finished.rows("whole")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert [row["adapters_active"] for row in rows] == ["0"] * 9 + ["1"] * 3
    assert [bool(row["val/loss"]) for row in rows] == [step % 3 == 0 for step in range(1, 13)]
    lora = [float(row["lora_lr"]) for row in rows]
    assert lora[:9] == [0.0] * 9 and lora[9] == pytest.approx(0.1 * 2e-3)
    assert lora[11] == pytest.approx(lora[9] / 3)


def test_best_checkpoints_are_kept(finished):
    names = {path.name for path in finished.checkpoints("whole").iterdir()}
    assert names == {"last.ckpt", "step_6.ckpt", "step_9.ckpt", "step_12.ckpt"}
    best = dict(map(tuple, finished.last("whole")["slope"]["state"]["best"]))
    assert set(best) == {6, 9, 12}


def test_optimizer_groups_and_state(finished):
    content = finished.last("whole")
    (state,) = content["optimizer_states"]
    groups = {group["name"]: group for group in state["param_groups"]}
    assert list(groups) == ["decay", "no_decay", "adapters"]
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"decay": 0.1, "no_decay": 0.0, "adapters": 0.0}
    # Adapters have stepped three times, from their own start; the model twelve times.
    steps = {n: {float(state["state"][i]["step"]) for i in g["params"]} for n, g in groups.items()}
    assert steps == {"decay": {12.0}, "no_decay": {12.0}, "adapters": {3.0}}
    assert all(torch.load(path, weights_only=True) for path in
               finished.checkpoints("whole").iterdir())  # fmt: skip


def test_sleeping_adapters_have_no_optimizer_state(finished):
    content = checkpoint.load(finished.checkpoints("whole") / "step_9.ckpt")
    (state,) = content["optimizer_states"]
    adapters = state["param_groups"][-1]
    assert adapters["name"] == "adapters" and adapters["params"]
    assert not set(adapters["params"]) & set(state["state"])


def test_dense_baseline(runs, finished):
    summary = runs.run("name=dense", "pruner.pruned_matrix=none")
    assert set(summary) == KEYS
    assert summary["parameters_stored"] == summary["parameters_dense"]
    assert summary["parameters_dense"] == finished.summary["parameters_dense"]
    assert summary["adapters_started_at_step"] is None
    assert summary["optimizer_state_bytes"] == 2 * 4 * summary["parameters_dense"]
    assert {row["lora_lr"] for row in runs.rows("dense")} == {""}


def test_adapters_do_not_change_what_comes_before_them(runs, finished):
    runs.run("name=plain", "pruner.add_lora=False")
    for with_, without in zip(finished.rows("whole")[:10], runs.rows("plain"), strict=False):
        assert with_["train/loss"] == without["train/loss"]  # also at the step they wake


def test_progress_checkpoints_and_sparse_rows(runs):
    runs.run(
        "name=some",
        "callbacks.checkpoint.progress_every_n_steps=4",
        "callbacks.checkpoint.save_top_k=0",
        "trainer.log_every_n_steps=5",
    )
    names = sorted(path.name for path in runs.checkpoints("some").iterdir())
    assert names == ["last.ckpt", *(f"progress_step_{k}.ckpt" for k in (12, 4, 8))]
    # The first step, each fifth, each validation (3, 6, …) and the last.
    steps = [row["step"] for row in runs.rows("some")]
    assert steps == ["1", "3", "5", "6", "9", "10", "12"]


def test_a_name_is_never_overwritten(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in runs.root.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="'whole' exists already .* type resume=True to go on"):
        runs.run("name=whole")
    assert {path: path.read_bytes() for path in runs.root.rglob("*") if path.is_file()} == before


def test_resume_without_checkpoint(runs, finished):
    logs = runs.root / "logs" / "gone"
    shutil.copytree(finished.root / "logs" / "whole", logs)
    with pytest.raises(ValueError, match="holds no checkpoint while other files of run 'gone' exi"):
        runs.run("name=gone", "resume=True")
    assert runs.run("name=new", "resume=True")["steps"] == 12


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.config.n_layer=3", "model.config.n_layer is 2 in it and 3 here"),
        ("datamodule.max_length=16", "datamodule.max_length is 32 in it and 16 here"),
        ("pruner.pattern=1:4", "pattern of .*c_proj is '2:4' in it and '1:4' here"),
        ("pruner.lora_rank=2", "adapter rank of .* is 4 in it and 2 here"),
        ("pruner.pruned_matrix=none", "pattern of .* is '2:4' in it and absent here"),
        ("pruner.add_lora=False", "adapter rank of .* is 4 in it and absent here"),
    ],
)
def test_a_checkpoint_of_another_model(runs, finished, override, text):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=f"is of another model: .*{text}"):
        runs.run("name=whole", "resume=True", override)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["train.global_batch_size=6"],
         "global_batch_size=6 is no multiple of datamodule.batch_size=4 x trainer.devices=1 x "
         "trainer.num_nodes=1 = 4; try train.global_batch_size=8"),
        (["trainer.strategy=fsdp"], "trainer.strategy='fsdp' is unknown"),
        (["trainer.devices=0"], "trainer.devices=0 is not a number of devices"),
        (["pruner.lora_start=0"], r"lora_start=0 is outside \(0, 1\]"),
        (["pruner.lora_start=1.5"], r"lora_start=1.5 is outside \(0, 1\]"),
        (["pruner.lora_rank=64"], "lora_rank=64 does not fit"),
        (["model.config.n_embd=36", "model.config.n_head=2", "pruner.pattern=2:8"],
         "is not divisible by m=8"),
        (["model.config.n_layer=0"], "model.config.n_layer=0 must be at least 1"),
        (["model.config.n_layer=-1", "pruner=none"], "model.config.n_layer=-1 must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_before_any_work(runs, overrides, text):
    with pytest.raises(ValueError, match=text):
        runs.run("name=bad", *overrides)
    assert not (runs.root / "logs").exists() and not (runs.root / "checkpoints").exists()


def test_a_run_that_could_not_begin_leaves_its_name_free(runs):
    with pytest.raises((FileNotFoundError, ValueError)):
        runs.run("name=typo", "datamodule.data_files=/nowhere/*.txt")
    assert runs.run("name=typo")["steps"] == 12


def test_no_gpu(runs):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="finds no GPU; check nvidia-smi"):
        runs.run("name=bad", "trainer.accelerator=gpu")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_diverged_run_stops_and_keeps_its_checkpoint(runs, monkeypatch, what):
    original, seen = LanguageModule.training_step, []

    def training_step(self, batch, batch_idx):
        seen.append(1)
        loss = original(self, batch, batch_idx)
        if len(seen) < 9:
            return loss
        if what == "loss":
            self.losses[-1] = loss.detach() * float("nan")
        return loss * float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", training_step)
        with pytest.raises(
            RuntimeError, match=r"step 5; training stops, .*last.ckpt.*optimizer.lr"
        ):
            runs.run("name=diverged", "trainer.log_every_n_steps=3")
    assert runs.last("diverged")["global_step"] == 3
    assert all(
        torch.isfinite(value).all() for value in runs.last("diverged")["state_dict"].values()
    )
    assert runs.run("name=diverged", "resume=True")["steps"] == 12


def test_a_full_disk_loses_nothing(runs, finished, monkeypatch):
    original, limit = checkpoint.HashingWriter.write, [400_000]

    def write(self, data):
        limit[0] -= len(data)
        if limit[0] < 0:
            data = b""

            class Full:
                def write(self, data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            self.file = Full() if not isinstance(self.file, Full) else self.file
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.HashingWriter, "write", write)
        text = "cannot write checkpoint .*last.ckpt: No space left on device after .* MB free there"
        with pytest.raises(RuntimeError, match=text):
            runs.run("name=whole")
    names = sorted(path.name for path in runs.checkpoints("whole").iterdir())
    assert names and not any(name.endswith(".partial") for name in names)
    assert runs.last("whole")["global_step"] in (3, 6, 9)
    runs.run("name=whole", "resume=True")
    assert runs.exact_rows("whole") == finished.exact_rows("whole")


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(runs, monkeypatch, logger):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=f"logger={logger} needs .* pip install {logger}, or lo"):
        runs.run("name=bad", f"logger={logger}")


@pytest.mark.parametrize(
    ("batch", "micro", "devices", "nodes", "expected"),
    [(512, 16, 8, 2, 2), (8, 4, 1, 1, 2), (8, 8, 1, 1, 1)],
)
def test_accumulation(runs, batch, micro, devices, nodes, expected):
    cfg = runs.config(
        "name=x",
        f"train.global_batch_size={batch}",
        f"datamodule.batch_size={micro}",
        f"trainer.devices={devices}",
        f"trainer.num_nodes={nodes}",
    )
    assert program.accumulation(cfg, devices * nodes) == expected


def test_logging_is_left_as_it_was(finished):
    assert logging.getLogger("slope").handlers == []


def test_two_processes_equal_one(runs, tmp_path):
    """DDP on gloo with the optimizer's state shared out; dropout off, it draws per process."""
    same = ["model.config.resid_pdrop=0", "trainer.max_steps=6", "pruner.lora_start=0.5"]
    runs.run("name=one", *same)
    script = tmp_path / "main.py"
    script.write_text("import sys; from slope.cli import main; sys.exit(main(sys.argv[1:]))")
    many = ["trainer.devices=2", "datamodule.batch_size=2", "optimizer=adamw-zero"]
    command = [sys.executable, "-W", "error", script, "train", *runs.base, "name=two", *same, *many]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    one, two = runs.rows("one"), runs.rows("two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-5)
        if a["val/loss"]:
            assert float(a["val/loss"]) == pytest.approx(float(b["val/loss"]), rel=1e-5)
    # Its checkpoint goes on in one process.
    assert len(runs.last("two")["slope"]["rng"]) == 2
    assert runs.run("name=two", "resume=True", *same, "trainer.max_steps=8")["steps"] == 8
