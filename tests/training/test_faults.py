"""A short fault campaign, and what fails or dies while a thread writes a checkpoint."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import kill

from slope.training import checkpoint
from slope.training.module import LanguageModule

ROOT = Path(__file__).parents[2]
ASYNC = "callbacks.checkpoint.asynchronous=true"
PARTS = "callbacks.checkpoint.format=sharded"


def test_one_fault_of_each_kind(tmp_path):
    """``scripts/fault_campaign.py`` is the long one; it fails where a fault lost something."""
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "fault_campaign.py", "--faults", "9", "--jobs", "1",
         "--settings", "1-async,2-fsdp2", "--output", tmp_path, "--scratch", tmp_path / "scratch"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}, check=True,
    )  # fmt: skip
    with open(tmp_path / "faults.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["kind"] for row in rows}) == 9
    assert not any(row["problem"] for row in rows)


@pytest.mark.parametrize("settings", [[ASYNC], [ASYNC, PARTS]], ids=["file", "parts"])
def test_a_thread_writes_what_the_loop_would(runs, finished, settings):
    runs.run("name=whole", *settings)
    shutil.copytree(finished.root / "logs" / "whole", runs.root / "logs" / "theirs")
    shutil.copytree(finished.checkpoints("whole"), runs.checkpoints("theirs"))
    runs.assert_same("theirs", "whole")
    assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name]


def test_what_fails_in_the_background_stops_the_run_before_the_next_save(
    runs, finished, monkeypatch
):
    save, steps = checkpoint.save, []

    def failing(content, path, *arguments):
        steps.append(content["global_step"])
        if len(steps) == 2:
            raise RuntimeError("cannot write checkpoint: there is no room")
        save(content, path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", failing)
        with pytest.raises(RuntimeError, match="there is no room"):
            runs.run("name=whole", ASYNC)
    assert steps == [3, 6] and runs.last("whole")["global_step"] == 3
    runs.run("name=whole", "resume=True", ASYNC)
    assert runs.exact_rows("whole") == finished.exact_rows("whole")


def test_what_fails_in_the_last_save_is_an_error_too(runs, monkeypatch):
    def failing(content, path, *arguments):
        raise RuntimeError("cannot write checkpoint: there is no room")

    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(RuntimeError, match="there is no room"):
        runs.run("name=whole", ASYNC, "callbacks.checkpoint.every_n_steps=0")


def test_a_signal_waits_for_the_thread(runs, finished, monkeypatch):
    save, step, seen = checkpoint.save, LanguageModule.training_step, []

    def slow(*arguments):
        time.sleep(0.5)
        save(*arguments)

    def training_step(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 7:  # step 4, while that of step 3 is being written
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", slow)
        patch.setattr(LanguageModule, "training_step", training_step)
        result = runs.run("name=whole", ASYNC)
    assert result["interrupted"] and runs.last("whole")["global_step"] == 4
    runs.run("name=whole", "resume=True", ASYNC)
    assert runs.exact_rows("whole") == finished.exact_rows("whole")


def test_a_death_in_the_thread_loses_no_checkpoint(runs, finished):
    def before():
        serialise, seen = checkpoint.torch.save, []

        def half(content, file):
            seen.append(content)
            serialise(content, file)
            if len(seen) == 2:
                file.file.flush()
                kill()

        checkpoint.torch.save = half

    assert runs.fork("name=whole", ASYNC, before=before) == -signal.SIGKILL
    assert (runs.checkpoints("whole") / "last.ckpt.partial").exists()
    assert runs.last("whole")["global_step"] == 3
    assert runs.fork("name=whole", "resume=True", ASYNC) == 0
    assert runs.exact_rows("whole") == finished.exact_rows("whole")
    assert not (runs.checkpoints("whole") / "last.ckpt.partial").exists()


def test_an_unknown_format(runs):
    with pytest.raises(ValueError, match="format='zip' is unknown; use auto, file, sharded"):
        runs.run("name=whole", "callbacks.checkpoint.format=zip")


def kill_after_step_6():
    step, seen = LanguageModule.training_step, []

    def training_step(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 13:
            kill()
        return step(self, batch, batch_idx)

    LanguageModule.training_step = training_step


def parts_of(runs):
    assert runs.fork("name=whole", PARTS, before=kill_after_step_6) == -signal.SIGKILL
    return runs.checkpoints("whole")


def test_damaged_parts_fall_back_and_unused_ones_go(runs, finished, caplog):
    folder = parts_of(runs)
    part = folder / "parts_6" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    (folder / "parts_5").mkdir()  # of a process that died
    caplog.clear()
    runs.run("name=whole", "resume=True", PARTS)
    assert "bytes instead of" in caplog.text and "step_3.ckpt instead" in caplog.text
    assert runs.exact_rows("whole") == finished.exact_rows("whole")
    # That of step 6 was in use, so its successor has another name.
    assert {path.name for path in folder.glob("parts_*")} == {"parts_6_2", "parts_9", "parts_12"}


def test_missing_parts_are_named(runs):
    folder = parts_of(runs)
    shutil.rmtree(folder / "parts_6")
    with pytest.raises(checkpoint.CorruptCheckpointError, match="is missing; a checkpoint in par"):
        checkpoint.load(folder / "last.ckpt")


@pytest.mark.parametrize("name", ["../else", "/tmp", "parts_6/..", "..", 7])
def test_a_path_of_an_index_is_not_trusted(runs, name):
    folder = parts_of(runs)
    shutil.copytree(folder / "parts_6", folder.parent / "else")
    index, _ = checkpoint._read(folder / "last.ckpt")
    index["parts"]["folder"] = name
    checkpoint.save(index, folder / "last.ckpt", magic=checkpoint.IN_PARTS)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="is no folder of parts"):
        checkpoint.load(folder / "last.ckpt")


def test_a_file_of_an_index_is_not_trusted(runs):
    folder = parts_of(runs)
    index, _ = checkpoint._read(folder / "last.ckpt")
    index["parts"]["files"]["../../secret"] = [1, "0"]
    checkpoint.save(index, folder / "last.ckpt", magic=checkpoint.IN_PARTS)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="are no files of parts"):
        checkpoint.load(folder / "last.ckpt")
