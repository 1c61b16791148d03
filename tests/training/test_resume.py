"""A run that is killed and resumed ends as the unbroken one, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal

import pytest
import torch
from tiny_runs import kill

from slope.training import checkpoint
from slope.training.loop import RunLoop
from slope.training.module import LanguageModule

LONG = ("trainer.max_steps=24", "callbacks.checkpoint.every_n_steps=2")


def kill_in_micro_batch(number):
    """Die before the ``number``-th forward of this process's training."""

    def before():
        step, seen = LanguageModule.training_step, [0]

        def training_step(self, batch, batch_idx):
            seen[0] += 1
            if seen[0] == number:
                kill()
            return step(self, batch, batch_idx)

        LanguageModule.training_step = training_step

    return before


def kill_in_validation():
    def loss(self, batch):
        if not self.training:
            kill()
        return original(self, batch)

    original, LanguageModule.loss = LanguageModule.loss, loss


def kill_in_write(number):
    """Die with the ``number``-th checkpoint file of this process half-written."""

    def before():
        serialise, seen = torch.save, [0]

        def save(content, file):
            seen[0] += 1
            serialise(content, file)
            if seen[0] == number:
                file.file.flush()
                kill()

        checkpoint.torch.save = save

    return before


def kill_before_copies():
    checkpoint.copy = lambda path, other: kill()


def kill_before_row():
    RunLoop._write = lambda self, trainer, row: kill()


def test_ten_kills_at_random_steps(runs):
    runs.run("name=whole", *LONG)
    draw = random.Random(5)
    for _ in range(10):
        # Seven micro-batches are three and a half steps: past at least one checkpoint.
        before = kill_in_micro_batch(draw.randint(5, 9))
        if runs.fork("name=cut", "resume=True", *LONG, before=before) == 0:
            break
    else:
        assert runs.fork("name=cut", "resume=True", *LONG) == 0
    runs.assert_same("whole", "cut")


@pytest.mark.parametrize(
    "before",
    [
        kill_in_micro_batch(1),
        kill_in_micro_batch(6),
        kill_in_micro_batch(17),  # the last step with sleeping adapters
        kill_in_micro_batch(19),  # the first with active ones
        kill_in_micro_batch(20),
        kill_in_validation,
        kill_in_write(1),
        kill_in_write(3),
        kill_before_copies,
        kill_before_row,
    ],
)
def test_kill_anywhere(runs, finished, before):
    assert runs.fork("name=whole", before=before) == -signal.SIGKILL
    assert runs.fork("name=whole", "resume=True") == 0
    theirs = runs.root / "checkpoints" / "theirs"
    shutil.copytree(finished.checkpoints("whole"), theirs)
    shutil.copytree(finished.root / "logs" / "whole", runs.root / "logs" / "theirs")
    runs.assert_same("theirs", "whole")
    # Also the best checkpoints and the absence of leftovers.
    names = sorted(path.name for path in runs.checkpoints("whole").iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=["Ctrl-C", "SIGUSR1"])
def test_interrupt_saves_and_goes_on(runs, finished, monkeypatch, caplog, number):
    step, seen = LanguageModule.training_step, []

    def training_step(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 9:
            os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    handlers = signal.getsignal(number), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", training_step)
        result = runs.run("name=whole")
    assert result["interrupted"] and result["steps"] == 5
    assert "resume=True goes on" in caplog.text
    assert (signal.getsignal(number), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (runs.root / "logs" / "whole" / "summary.json").exists()
    summary = runs.run("name=whole", "resume=True")
    assert summary["val_loss"] == finished.summary["val_loss"]
    assert runs.exact_rows("whole") == finished.exact_rows("whole")


def test_a_second_interrupt_stops_at_once(runs, monkeypatch):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LanguageModule, "training_step", training_step)
    with pytest.raises(SystemExit):
        runs.run("name=twice")
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_corrupt_last_checkpoint_falls_back(runs, finished, damage, caplog):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    last = runs.checkpoints("whole") / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    last.write_bytes({"flip": content, "cut": content[:-1000], "empty": b""}[damage])
    (runs.checkpoints("whole") / "step_12.ckpt").unlink()
    summary = runs.run("name=whole", "resume=True")
    assert "skipped" in caplog.text and "using the previous good checkpoint" in caplog.text
    assert "step_9.ckpt" in caplog.text
    assert summary["val_loss"] == finished.summary["val_loss"]
    assert runs.exact_rows("whole") == finished.exact_rows("whole")


def test_no_usable_checkpoint(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    for path in runs.checkpoints("whole").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="no usable checkpoint in .*last.ckpt is half-written"):
        runs.run("name=whole", "resume=True")


def test_resume_of_a_finished_run_changes_nothing(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    before = (runs.root / "logs" / "whole" / "metrics.csv").read_bytes()
    summary = runs.run("name=whole", "resume=True", "demo=true")
    assert (runs.root / "logs" / "whole" / "metrics.csv").read_bytes() == before
    for key in ("val_loss", "train_loss", "steps", "optimizer_state_bytes", "bigram_val_loss"):
        assert summary[key] == finished.summary[key]


def test_resume_iter(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    with pytest.raises(
        FileNotFoundError, match="neither step_5.ckpt nor .* it holds last.ckpt, st"
    ):
        runs.run("name=whole", "resume=True", "resume_iter=5")
    with pytest.raises(ValueError, match="resume_iter=6 needs resume=True"):
        runs.run("name=whole", "resume_iter=6")
    runs.run("name=whole", "resume=True", "resume_iter=6")
    assert runs.exact_rows("whole") == finished.exact_rows("whole")


def test_another_batch_size_at_the_same_global_batch(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    summary = runs.run("name=whole", "resume=True", "resume_iter=6", "datamodule.batch_size=2",
                       "datamodule.batch_size_eval=4")  # fmt: skip
    assert [row["step"] for row in runs.rows("whole")] == [str(n) for n in range(1, 13)]
    # Dropout draws other numbers; the data are the same.
    assert summary["val_loss"] == pytest.approx(finished.summary["val_loss"], abs=0.05)


def test_a_longer_run(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    summary = runs.run("name=whole", "resume=True", "trainer.max_steps=15")
    assert summary["steps"] == 15 and len(runs.rows("whole")) == 15
    with pytest.raises(ValueError, match="is at step 15, beyond trainer.max_steps=10"):
        runs.run("name=whole", "resume=True", "trainer.max_steps=10")


def test_a_longer_run_does_not_put_trained_adapters_to_sleep(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    longer = "name=whole", "resume=True", "trainer.max_steps=20"
    message = r"are trained since step 9, but .* until step 14.*type pruner\.lora_lazy=False"
    with pytest.raises(ValueError, match=message):
        runs.run(*longer)
    assert runs.run(*longer, "pruner.lora_lazy=False")["steps"] == 20
    assert all(row["adapters_active"] == "1" for row in runs.rows("whole")[9:])


def test_adapters_join_a_run_that_was_started_without(runs, finished, caplog):
    runs.fork("name=late", "pruner.add_lora=False", before=kill_in_micro_batch(20))
    assert not any("adapter" in name for name in runs.last("late")["state_dict"])
    summary = runs.run("name=late", "resume=True")
    assert "they join at their start" in caplog.text
    assert summary["adapters_started_at_step"] == 9
    # The published way ends where the run that had them from the start does.
    assert summary["val_loss"] == finished.summary["val_loss"]
    with pytest.raises(ValueError, match="adapter rank of .* is 4 in it and absent here"):
        runs.run("name=late", "resume=True", "pruner.add_lora=False")
