"""Several processes at once: order, failures, stopping; with stand-ins that need no torch."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from slope.compare import plan, runner

# Does what a worker does, in a tenth of a second: `slope` fails if told so, `wait` sleeps.
STAND_IN = """
import json, os, pathlib, signal, sys, time
from omegaconf import OmegaConf
cfg = OmegaConf.load(sys.argv[1])
log_dir = pathlib.Path(cfg.paths.log_dir)
def stop(number, frame):
    (log_dir / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(log_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
(log_dir / "threads").write_text(os.environ["OMP_NUM_THREADS"])
(log_dir / "metrics.csv").write_text("step,x\\n5,1\\n10,1\\n7")
what = (log_dir / "told").read_text() if (log_dir / "told").exists() else ""
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fail":
    (log_dir / "outcome.json").write_text(json.dumps({"status": "failed", "message": "no room"}))
    sys.exit(1)
if what == "diverge":
    outcome = {"status": "diverged", "message": "loss is nan", "step": 3}
    (log_dir / "outcome.json").write_text(json.dumps(outcome))
    sys.exit(0)
if what == "wait":
    (log_dir / "waiting").touch()
    time.sleep(60)
(log_dir / "summary.json").write_text(json.dumps({"val_loss": 4.0, "wall_seconds": 61.0}))
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(
        runner, "_command", lambda job, *files: [sys.executable, str(file), *map(str, files)]
    )
    words = ["experiment=compare/smoke", f"paths.root={tmp_path}", "compare.seeds=[0]"]
    return list(plan.load(words).runs)


def tell(run, what):
    run.log_dir.mkdir(parents=True, exist_ok=True)
    (run.log_dir / "told").write_text(what)


def test_all_runs_end_and_are_not_repeated(runs, caplog):
    caplog.set_level(logging.INFO)
    several = runner.Runner(runs, jobs=2, threads=3)
    assert several.run()
    assert not several.failed
    assert [run.state() for run in runs] == ["finished"] * 3
    assert (runs[0].log_dir / "threads").read_text() == "3"
    assert plan.flat(runs[0].cfg) == plan.flat(plan.OmegaConf.load(runs[0].config_file))
    assert sorted(record.message[:3] for record in caplog.records) == ["1/3", "2/3", "3/3"]
    assert "dense seed 0: val loss 4.0000 (61 s)" in caplog.text
    for run in runs:
        (run.log_dir / "threads").unlink()
    assert runner.Runner(runs, jobs=2, threads=3).run()
    assert not any((run.log_dir / "threads").exists() for run in runs)


def test_failures_and_divergence_do_not_stop_the_others(runs, caplog):
    caplog.set_level(logging.INFO)
    tell(runs[0], "fail")
    tell(runs[1], "diverge")
    several = runner.Runner(runs, jobs=1, threads=1)
    assert several.run()
    assert several.failed == {runs[0]: "no room"}
    assert [run.state() for run in runs] == ["failed", "diverged", "finished"]
    assert "slope seed 0: diverged at step 3" in caplog.text
    assert "output.txt" in caplog.text
    tell(runs[0], "die")
    (runs[0].log_dir / plan.OUTCOME).unlink()
    several = runner.Runner(runs, jobs=1, threads=1)
    assert several.run()
    assert several.failed == {runs[0]: "its process was killed by SIGKILL"}
    tell(runs[0], "")
    assert runner.Runner(runs, jobs=1, threads=1).run()
    assert runs[0].state() == "finished"


def interrupt_when(path: Path, times: int = 1) -> None:
    def watch():
        while not path.exists():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


def test_ctrl_c_lets_the_runs_save_and_the_rest_waits(runs, caplog):
    caplog.set_level(logging.INFO)
    before = signal.getsignal(signal.SIGINT)
    tell(runs[0], "wait")
    interrupt_when(runs[0].log_dir / "waiting")
    several = runner.Runner(runs, jobs=1, threads=1)
    assert not several.run()
    assert not several.failed
    assert (runs[0].log_dir / "saved").exists()
    assert [run.state() for run in runs] == ["begun", "new", "new"]
    assert "stopping: 1 runs finish their optimizer step and save" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before
    tell(runs[0], "")
    assert runner.Runner(runs, jobs=3, threads=1).run()


def test_the_last_whole_row_tells_the_step(tmp_path):
    assert runner.last_step(tmp_path) == 0
    metrics = tmp_path / "metrics.csv"
    for text, step in (("step,x\n", 0), ("step,x\n5,1\n10,1\n12", 10), ("", 0)):
        metrics.write_text(text)
        assert runner.last_step(tmp_path) == step
    metrics.write_text("step,x\n" + "".join(f"{step},{'1' * 200}\n" for step in range(100)))
    assert runner.last_step(tmp_path) == 99
    outcome = {"status": "diverged", "step": 1, "message": ""}
    (tmp_path / plan.OUTCOME).write_text(json.dumps(outcome))
    assert plan.read_outcome(tmp_path) == outcome
