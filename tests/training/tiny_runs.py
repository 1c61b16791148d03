"""A tiny GPT-2 on a tiny corpus, runs of it in this process or in a forked child."""

from __future__ import annotations

import csv
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch

from slope import configs
from slope.training import checkpoint, run

EXACT = (
    "step", "tokens", "epoch", "train/loss", "train/perplexity", "val/loss", "val/perplexity",
    "lr", "lora_lr", "grad_norm", "adapters_active",
)  # fmt: skip


class Runs:
    """Runs under one root; each method call is one process's life, in or out of this process."""

    def __init__(self, root: Path, corpus: Path) -> None:
        self.root, self.corpus = root, corpus
        self.base = [
            "experiment=smoke", "datamodule=text", f"datamodule.data_files={corpus}/*.txt",
            f"datamodule.cache_dir={corpus}/cache", "datamodule.val_ratio=0.2",
            f"paths.root={root}", "trainer.accelerator=cpu", "trainer.max_steps=12",
            "trainer.val_check_interval=3", "callbacks.checkpoint.every_n_steps=3",
            "model.config.resid_pdrop=0.1", "pruner.lora_start=0.7", "generate.max_new_tokens=2",
        ]  # fmt: skip

    def config(self, *overrides):
        return configs.compose([*self.base, *overrides])

    def run(self, *overrides):
        return run(self.config(*overrides))

    def fork(self, *overrides, before=lambda: None):
        """The run in a child process, after ``before()``; its exit code, negative for a signal."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of rich, Python >= 3.12
            child = os.fork()
        if child == 0:
            code = 1
            try:
                before()
                self.run(*overrides)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    def checkpoints(self, name):
        return self.root / "checkpoints" / name

    def last(self, name):
        return checkpoint.load(self.checkpoints(name) / "last.ckpt")

    def rows(self, name):
        with open(self.root / "logs" / name / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def exact_rows(self, name):
        return [{column: row[column] for column in EXACT} for row in self.rows(name)]

    def assert_same(self, one, other):
        """Weights, optimizer, generators and metrics are equal bit for bit."""
        a, b = self.last(one), self.last(other)
        for key in ("global_step", "state_dict", "optimizer_states"):
            assert_equal(a[key], b[key], key)
        assert_equal(a["slope"]["rng"], b["slope"]["rng"], "rng")
        assert self.exact_rows(one) == self.exact_rows(other)


def assert_equal(a, b, where):
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def kill():
    os.kill(os.getpid(), signal.SIGKILL)
